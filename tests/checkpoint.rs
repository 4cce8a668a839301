//! Checkpoints of every format, written by the small writers in `writers`, are read back; broken ones
//! are refused with a message that names what is wrong.
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]
#![allow(clippy::needless_pass_by_value, reason = "tables of cases read better without `&`")]

#[path = "checkpoint/broken_folders.rs"]
mod broken_folders;
#[path = "checkpoint/broken_gguf.rs"]
mod broken_gguf;
#[path = "checkpoint/gguf.rs"]
mod gguf;
#[path = "checkpoint/specs.rs"]
mod specs;
#[path = "checkpoint/writers.rs"]
mod writers;
