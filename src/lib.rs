//! astrai_rs: an LLM inference engine.

pub mod backend;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod engine;
pub mod error;
pub mod layers;
#[cfg(feature = "python")]
mod py;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod spec;
pub mod step;
pub mod weights;
