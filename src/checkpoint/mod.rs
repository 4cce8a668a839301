//! stub
use crate::{spec::ModelSpec, weights::Weights};
/// stub
#[derive(Debug)]
pub struct Checkpoint {
    /// stub
    pub spec: ModelSpec,
    /// stub
    pub weights: Weights,
}
