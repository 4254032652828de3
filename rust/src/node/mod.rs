//! The agent, and the part of a worker process that needs no GIL.
//!
//! | file | what it promises |
//! |---|---|
//! | `state.rs` | PURE: the client's and the workers' events, exits and ticks in; [`actions`] out |
//! | `workers.rs`, `tasks.rs`, `results.rs` | its parts: roles, spares, isolation, blame; assigned tasks; results until acknowledged |
//! | `agent.rs` | the loop: client, workers, clock; carries the actions out |
//! | `supervisor.rs`, `exit.rs` | starts, follows and ends worker processes; how a process ended, in words |
//! | `process_group.rs` | all that a worker started |
//! | `slot_table.rs` | what each slot runs, in memory that outlives the process |
//! | `stripes.rs` | further streams from the client, which bring blobs |
//! | `stdio.rs` | what workers print, by lines |
//! | `worker/` | a worker process: reads tasks, sends results, watches for the agent |

pub mod actions;
pub mod agent;
mod exit;
pub mod process_group;
mod results;
pub mod slot_table;
pub mod state;
pub mod stdio;
pub mod stripes;
mod supervisor;
mod tasks;
pub mod worker;
pub mod workers;
