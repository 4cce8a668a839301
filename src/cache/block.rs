//! Block ids, reference counts, and the table of blocks that a sequence holds.

use crate::config::BLOCK_SIZE;

/// One block of [`crate::config::BLOCK_SIZE`] cached tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// What a full block is called in the prefix index: the end of a chain of blocks.
///
/// Serials are never used twice, so equal names mean equal token histories; see `cache::prefix`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum BlockName {
    /// The empty chain. Chains with different salts never meet.
    Root { salt: u64 },
    /// A chain of at least one block.
    Block { serial: u64 },
}

/// The blocks of one sequence, in order of position.
///
/// Made by [`KvCache::allocate`](super::KvCache::allocate) and consumed by
/// [`KvCache::free`](super::KvCache::free); not `Clone`, so a double free does not compile.
#[derive(Debug)]
#[must_use = "blocks leak unless the table is given back with KvCache::free"]
pub struct BlockTable {
    pub(super) blocks: Vec<BlockId>,
    /// How many leading blocks are in the prefix index.
    pub(super) named: usize,
    /// Name of the last of them.
    pub(super) name: BlockName,
    /// Generation of the prefix index in which they were named.
    pub(super) epoch: u64,
}

impl BlockTable {
    /// The blocks, in order of position.
    #[must_use]
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Tokens in blocks that the prefix index knows. In a fresh table these are the prefix hit.
    #[must_use]
    pub fn named_tokens(&self) -> usize {
        self.named * BLOCK_SIZE
    }
}

/// Which blocks are free, and how many tables hold each of the others.
#[derive(Debug)]
pub(super) struct BlockPool {
    free: Vec<BlockId>,
    owners: Vec<u32>,
}

impl BlockPool {
    /// `total` free blocks.
    pub(super) fn new(total: usize) -> Self {
        // Reversed, so that a fresh pool hands out 0, 1, 2, …
        Self { free: (0..total as u32).rev().map(BlockId).collect(), owners: vec![0; total] }
    }

    /// A free block, now with one owner.
    pub(super) fn take(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.owners[block.0 as usize] = 1;
        Some(block)
    }

    /// One more owner.
    pub(super) fn share(&mut self, block: BlockId) {
        self.owners[block.0 as usize] += 1;
    }

    /// One owner less; true when that was the last. The block is not yet free.
    pub(super) fn release(&mut self, block: BlockId) -> bool {
        let owners = &mut self.owners[block.0 as usize];
        *owners =
            owners.checked_sub(1).expect("only owned blocks are released: tables are not Clone");
        *owners == 0
    }

    /// Makes a block without owners free.
    pub(super) fn put_back(&mut self, block: BlockId) {
        debug_assert_eq!(self.owners(block), 0, "a free block has no owner");
        self.free.push(block);
    }

    /// How many tables hold `block`.
    pub(super) fn owners(&self, block: BlockId) -> u32 {
        self.owners[block.0 as usize]
    }

    /// The free blocks.
    pub(super) fn free(&self) -> &[BlockId] {
        &self.free
    }

    /// All blocks.
    pub(super) fn total(&self) -> usize {
        self.owners.len()
    }
}
