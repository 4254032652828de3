//! The agent, and the part of a worker process that needs no GIL.
//!
//! | file | what it promises |
//! |---|---|
//! | `state.rs` | PURE: the client's and the workers' events, exits and ticks in; [`actions`] out |
//! | `workers.rs`, `tasks.rs`, `results.rs` | its parts: roles, spares, isolation, blame; assigned tasks; results until acknowledged |
//! | `exits.rs`, `renewal.rs` | its parts: a worker has ended; fresh workers take over |
//! | `generations.rs` | PURE: tasks that wait for fresh workers, because the client's modules have changed |
//! | `blobs.rs` | PURE: which blobs are here, which tasks wait for some, which worker has which |
//! | `agent.rs` | the lock around the decider; carries the actions out |
//! | `session.rs`, `greeting.rs` | the loop: client, workers, clock; the client comes back after a cut; the answer to its hello |
//! | `arrivals.rs` | the streams that come to the agent's socket |
//! | `blob_files.rs`, `memory_file.rs`, `mapping.rs` | blobs as they arrive; files in memory; their mappings |
//! | `descriptors.rs`, `handover.rs` | sockets that carry descriptors; results whose parts come as files |
//! | `lease.rs` | how long a process may go on unheard, suspended or not |
//! | `limits.rs` | open files and memory that the system allows |
//! | `supervisor.rs`, `exit.rs` | starts, follows and ends worker processes; how a process ended, in words |
//! | `process_group.rs`, `mark.rs`, `processes.rs` | all that a worker started: how it ends, is found, is seen |
//! | `slot_table.rs` | what each slot runs, in memory that outlives the process |
//! | `stripes.rs` | further streams from the client, which bring blobs |
//! | `stdio.rs` | what workers print, by lines |
//! | `worker/` | a worker process: reads tasks, sends results, watches for the agent |

pub mod actions;
pub mod agent;
pub mod arrivals;
pub mod blob_files;
mod blobs;
mod descriptors;
mod exit;
mod exits;
pub mod generations;
mod greeting;
mod handover;
pub mod lease;
mod limits;
pub mod mapping;
pub mod mark;
pub mod memory_file;
pub mod process_group;
pub mod processes;
mod renewal;
mod results;
pub mod session;
pub mod slot_table;
pub mod state;
pub mod stdio;
pub mod stripes;
mod supervisor;
mod tasks;
pub mod worker;
pub mod workers;
