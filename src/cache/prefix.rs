//! The prefix index: full, computed blocks by what they hold.
//!
//! A block's key is its parent's name, its tokens and (through the root of its chain) a salt. Keys
//! are compared in full and names are serial numbers that are never used twice, so by induction a
//! hit is the same token history from position 0: a collision of hashes costs time, never a wrong hit.
//!
//! ```text
//! root(salt) ── tokens 0..16 ──> name 7 ── tokens 16..32 ──> name 8
//!                                   └───── tokens 16..32 ──> name 9   (another continuation)
//! ```
//!
//! Named blocks without an owner are *idle*: findable, and evicted least recently used first. A
//! table owns every ancestor of its named blocks and gives them back in reverse, so a child always
//! turns idle before its parent and eviction takes leaves first.

use std::collections::{BTreeMap, HashMap};

use super::block::{BlockId, BlockName};
use crate::config::BLOCK_SIZE;

/// What a full block holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    parent: BlockName,
    tokens: [u32; BLOCK_SIZE],
}

impl Key {
    fn new(parent: BlockName, tokens: &[u32]) -> Self {
        Self { parent, tokens: tokens.try_into().expect("only full blocks are named") }
    }
}

#[derive(Debug)]
struct Entry {
    key: Key,
    name: BlockName,
    /// When the block lost its last owner.
    idle_since: Option<u64>,
}

/// The named blocks.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    by_key: HashMap<Key, BlockId>,
    /// By block id.
    entries: Vec<Option<Entry>>,
    /// Idle blocks, oldest first.
    idle: BTreeMap<u64, BlockId>,
    clock: u64,
    next_serial: u64,
    epoch: u64,
}

impl PrefixIndex {
    /// An empty index over `total` blocks.
    pub(super) fn new(total: usize) -> Self {
        Self {
            by_key: HashMap::new(),
            entries: std::iter::repeat_with(|| None).take(total).collect(),
            idle: BTreeMap::new(),
            clock: 0,
            next_serial: 0,
            epoch: 0,
        }
    }

    /// The block that holds `tokens` after the chain `parent`.
    pub(super) fn find(&self, parent: BlockName, tokens: &[u32]) -> Option<(BlockId, BlockName)> {
        let block = *self.by_key.get(&Key::new(parent, tokens))?;
        Some((block, self.entry(block).name))
    }

    /// Names `block`, which [`Self::find`] must not know yet.
    pub(super) fn insert(
        &mut self,
        block: BlockId,
        parent: BlockName,
        tokens: &[u32],
    ) -> BlockName {
        let (key, name) = (Key::new(parent, tokens), BlockName::Block { serial: self.next_serial });
        self.next_serial += 1;
        self.by_key.insert(key.clone(), block);
        self.entries[block.0 as usize] = Some(Entry { key, name, idle_since: None });
        name
    }

    /// Whether `block` has a name.
    pub(super) fn is_named(&self, block: BlockId) -> bool {
        self.entries[block.0 as usize].is_some()
    }

    /// Notes that a named block has lost its last owner.
    pub(super) fn park(&mut self, block: BlockId) {
        self.clock += 1;
        self.idle.insert(self.clock, block);
        let entry = self.entries[block.0 as usize].as_mut();
        entry.expect("only named blocks are parked").idle_since = Some(self.clock);
    }

    /// Notes that a named block has an owner again.
    pub(super) fn wake(&mut self, block: BlockId) {
        let entry = self.entries[block.0 as usize].as_mut();
        if let Some(since) = entry.expect("only named blocks are found").idle_since.take() {
            self.idle.remove(&since);
        }
    }

    /// Takes the name from the least recently used idle block.
    pub(super) fn evict(&mut self) -> Option<BlockId> {
        let block = *self.idle.first_key_value()?.1;
        self.forget(block);
        Some(block)
    }

    /// Takes the name from `block`.
    pub(super) fn forget(&mut self, block: BlockId) {
        if let Some(entry) = self.entries[block.0 as usize].take() {
            self.by_key.remove(&entry.key);
            if let Some(since) = entry.idle_since {
                self.idle.remove(&since);
            }
        }
    }

    /// Takes every name and returns the blocks that were idle. Tables of before stay out of the
    /// index from now on: their blocks belong to the past that was to be forgotten.
    pub(super) fn clear(&mut self) -> Vec<BlockId> {
        self.epoch += 1;
        self.by_key.clear();
        self.entries.fill_with(|| None);
        std::mem::take(&mut self.idle).into_values().collect()
    }

    /// Counts the calls of [`Self::clear`].
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Number of idle blocks.
    pub(super) fn idle_len(&self) -> usize {
        self.idle.len()
    }

    /// What is wrong with the index, if anything: `owners` counts the tables of a block.
    pub(super) fn fault(&self, owners: impl Fn(BlockId) -> u32) -> Option<String> {
        let by_name: HashMap<BlockName, BlockId> =
            self.by_key.values().map(|&block| (self.entry(block).name, block)).collect();
        for (key, &block) in &self.by_key {
            let entry = self.entry(block);
            if entry.key != *key {
                return Some(format!("{block:?} is found under another block's key"));
            }
            if entry.idle_since.is_some() != (owners(block) == 0) {
                return Some(format!("{block:?} is idle with {} owners", owners(block)));
            }
            if matches!(key.parent, BlockName::Root { .. }) {
                continue;
            }
            let Some(&parent) = by_name.get(&key.parent) else {
                return Some(format!("{block:?} has lost its parent"));
            };
            if owners(parent) < owners(block) {
                return Some(format!("{block:?} has more owners than its parent {parent:?}"));
            }
            let parent_since = self.entry(parent).idle_since;
            if parent_since.is_some() && parent_since < entry.idle_since {
                return Some(format!("{parent:?} would be evicted before its child {block:?}"));
            }
        }
        let named = self.entries.iter().flatten().count();
        (named != self.by_key.len()).then(|| format!("{named} names, {} keys", self.by_key.len()))
    }

    fn entry(&self, block: BlockId) -> &Entry {
        self.entries[block.0 as usize].as_ref().expect("every key leads to a named block")
    }
}
