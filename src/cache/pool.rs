//! The tensors behind the cache: pages of keys and values, one set per layer.

use crate::backend::{Backend, Heads, LayerKv};
use crate::config::BLOCK_SIZE;
use crate::error::{Error, ErrorKind, Result};

/// Keys and values of all layers.
#[derive(Debug)]
pub struct KvPool {
    layers: Vec<LayerKv>,
}

impl KvPool {
    /// Pages for `num_blocks` blocks in each of `num_layers` layers.
    pub fn new(
        backend: &Backend,
        num_layers: usize,
        num_blocks: usize,
        heads: Heads,
    ) -> Result<Self> {
        let out_of_memory = |error: Error| {
            let tokens = num_blocks * BLOCK_SIZE;
            let bytes = tokens * num_layers * backend.kv_bytes_per_token(heads);
            Error::new(
                ErrorKind::OutOfMemory,
                format!("a KV cache of {tokens} tokens needs {bytes} bytes: {error}"),
            )
        };
        let layers = (0..num_layers)
            .map(|_| backend.layer_kv(num_blocks, heads).map_err(out_of_memory))
            .collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// Pages of layer `index`.
    #[must_use]
    pub fn layer(&self, index: usize) -> &LayerKv {
        &self.layers[index]
    }
}
