//! The parts of a decoder layer: each takes its weights by canonical name and calls the fused ops.

mod attention;
mod linear;
mod mlp;
mod rope;

pub use attention::Attention;
pub use linear::Builder;
pub use mlp::Mlp;
pub use rope::{inverse_frequencies, rope_tables};
