//! What runs on a node.

pub mod actions;
pub mod agent;
mod exit;
pub mod process_group;
mod results;
pub mod slot_table;
pub mod state;
pub mod stdio;
mod supervisor;
mod tasks;
pub mod worker;
pub mod workers;
