//! Block ids and reference counts.

/// One block of [`crate::config::BLOCK_SIZE`] cached tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);
