//! What runs on a node.

pub mod agent;
pub mod process_group;
pub mod slot_table;
pub mod stdio;
mod supervisor;
pub mod worker;
