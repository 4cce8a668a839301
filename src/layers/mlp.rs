//! Gated feed-forward network (arXiv 2002.05202).

use candle_core::Tensor;

use super::linear::{Builder, Part};
use crate::backend::{Backend, Linear};
use crate::error::Result;
use crate::spec::{Activation, ModelSpec};

/// `down(activation(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Mlp {
    /// Gate and up in one projection.
    gate_up: Linear,
    down: Linear,
    activation: Activation,
}

impl Mlp {
    /// Takes the weights `layers.{layer}.mlp.*`.
    pub fn load(builder: &mut Builder<'_>, spec: &ModelSpec, layer: usize) -> Result<Self> {
        let (hidden, inner) = (spec.hidden_size, spec.mlp.intermediate_size);
        let part = |name: &str, out| Part {
            name: format!("layers.{layer}.mlp.{name}"),
            out,
            bias: spec.mlp.bias,
        };
        Ok(Self {
            gate_up: builder.projection(&[part("gate", inner), part("up", inner)], hidden)?,
            down: builder.projection(&[part("down", hidden)], inner)?,
            activation: spec.mlp.activation,
        })
    }

    /// `[tokens, hidden]` → `[tokens, hidden]`.
    pub fn forward(&self, backend: &Backend, x: &Tensor) -> Result<Tensor> {
        let inner = backend.gated_linear(x, &self.gate_up, self.activation)?;
        backend.linear(&inner, &self.down)
    }
}
