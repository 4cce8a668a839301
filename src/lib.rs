//! `astrai_rs`: an LLM inference engine.

pub mod backend;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod error;
pub mod layers;
pub mod runner;
pub mod spec;
pub mod step;
pub mod weights;
