//! Cache bookkeeping (integers) and, in `pool`, the tensors behind it.
//!
//! [`KvCache`] is what the scheduler talks to. A block is *free*, *used* (held by at least one
//! [`BlockTable`]) or *idle* (held by none, but findable by its prefix until it is evicted).

pub mod block;
pub mod pool;
mod prefix;

use block::{BlockId, BlockName, BlockPool, BlockTable};
use prefix::PrefixIndex;

use crate::config::BLOCK_SIZE;
use crate::error::{Error, Result};

/// Blocks and prefix look-ups, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheStats {
    /// Blocks held by live sequences.
    pub used: usize,
    /// All blocks.
    pub total: usize,
    /// Blocks that no sequence holds but that a prefix can still find.
    pub cached: usize,
    /// Tokens looked up, since the start.
    pub queries: u64,
    /// Tokens found, since the start.
    pub hits: u64,
}

/// What [`KvCache::allocate`] allocates for.
#[derive(Debug, Clone, Copy)]
pub struct Allocation<'a> {
    /// All tokens of the sequence.
    pub tokens: &'a [u32],
    /// The request. Without prefix caching only its own samples share blocks.
    pub request: u64,
    /// Whether blocks that hold the first tokens already may be used.
    pub lookup: bool,
    /// Blocks that must stay available afterwards.
    pub spare: usize,
}

/// Hands out blocks and finds those that hold a prefix already.
#[derive(Debug)]
pub struct KvCache {
    pool: BlockPool,
    index: PrefixIndex,
    keep_idle: bool,
    queries: u64,
    hits: u64,
}

impl KvCache {
    /// A cache of `num_blocks` free blocks.
    ///
    /// Without `enable_prefix_caching` blocks are forgotten when their last owner goes and are
    /// found by samples of the same request only.
    #[must_use]
    pub fn new(num_blocks: usize, enable_prefix_caching: bool) -> Self {
        Self {
            pool: BlockPool::new(num_blocks),
            index: PrefixIndex::new(num_blocks),
            keep_idle: enable_prefix_caching,
            queries: 0,
            hits: 0,
        }
    }

    /// A table that covers all tokens; its first [`BlockTable::named_tokens`] are computed already.
    ///
    /// A hit never covers the last token: its logits are needed. `None`, and nothing changed, when
    /// there are too few blocks.
    pub fn allocate(&mut self, wanted: &Allocation<'_>) -> Option<BlockTable> {
        let salt = if self.keep_idle { 0 } else { wanted.request };
        let root = BlockName::Root { salt };
        let (mut blocks, name) =
            if wanted.lookup { self.find(root, wanted.tokens) } else { (Vec::new(), root) };
        let named = blocks.len();
        let idle_hits = blocks.iter().filter(|&&block| self.pool.owners(block) == 0).count();
        let fresh = wanted.tokens.len().div_ceil(BLOCK_SIZE) - named;
        if fresh + idle_hits + wanted.spare > self.available() {
            return None;
        }
        if wanted.lookup && self.keep_idle {
            self.queries += wanted.tokens.len() as u64;
            self.hits += (named * BLOCK_SIZE) as u64;
        }
        for &block in &blocks {
            self.share(block);
        }
        for _ in 0..fresh {
            blocks.push(self.take());
        }
        Some(BlockTable { blocks, named, name, epoch: self.index.epoch() })
    }

    /// Grows the table to cover `num_tokens`. False, and nothing changed, when there are too few blocks.
    pub fn append(&mut self, table: &mut BlockTable, num_tokens: usize) -> bool {
        let fresh = num_tokens.div_ceil(BLOCK_SIZE).saturating_sub(table.blocks.len());
        if fresh > self.available() {
            return false;
        }
        for _ in 0..fresh {
            table.blocks.push(self.take());
        }
        true
    }

    /// Makes the blocks findable that `computed` leading tokens fill.
    ///
    /// A block that another sequence has computed meanwhile replaces the table's own: one block per
    /// history keeps children next to their parents and saves the duplicate. Rows do not depend on
    /// their batch, so both blocks hold the same numbers.
    pub fn commit(&mut self, table: &mut BlockTable, tokens: &[u32], computed: usize) {
        if table.epoch != self.index.epoch() {
            return;
        }
        while (table.named + 1) * BLOCK_SIZE <= computed {
            let own = table.blocks[table.named];
            let held = &tokens[table.named * BLOCK_SIZE..][..BLOCK_SIZE];
            table.name = if let Some((known, name)) = self.index.find(table.name, held) {
                self.share(known);
                table.blocks[table.named] = known;
                self.release(own);
                name
            } else {
                self.index.insert(own, table.name, held)
            };
            table.named += 1;
        }
    }

    /// Gives all blocks of the table back, the last first: tails of chains are evicted before heads.
    pub fn free(&mut self, table: BlockTable) {
        for block in table.blocks.into_iter().rev() {
            self.release(block);
        }
    }

    /// Forgets every prefix. Live sequences go on undisturbed.
    pub fn clear_prefix_cache(&mut self) {
        for block in self.index.clear() {
            self.pool.put_back(block);
        }
    }

    /// Blocks that an allocation could use: free or idle.
    #[must_use]
    pub fn available(&self) -> usize {
        self.pool.free().len() + self.index.idle_len()
    }

    /// The counts of now.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            used: self.pool.total() - self.available(),
            total: self.pool.total(),
            cached: self.index.idle_len(),
            queries: self.queries,
            hits: self.hits,
        }
    }

    /// Checks every count against `live`, the tables of all live sequences. For tests: it is slow.
    pub fn check<'a>(&self, live: impl IntoIterator<Item = &'a BlockTable>) -> Result<()> {
        let mut owners = vec![0_u32; self.pool.total()];
        for block in live.into_iter().flat_map(BlockTable::blocks) {
            owners[block.0 as usize] += 1;
        }
        for (index, &count) in owners.iter().enumerate() {
            let block = BlockId(index as u32);
            if self.pool.owners(block) != count {
                let kept = self.pool.owners(block);
                return Err(Error::bug(format!("{block:?}: {count} owners, {kept} counted")));
            }
        }
        let mut is_free = vec![false; self.pool.total()];
        for &block in self.pool.free() {
            let twice = std::mem::replace(&mut is_free[block.0 as usize], true);
            if twice || owners[block.0 as usize] > 0 || self.index.is_named(block) {
                return Err(Error::bug(format!("{block:?} is free and something else")));
            }
        }
        let used = owners.iter().filter(|&&count| count > 0).count();
        let (free, idle, total) =
            (self.pool.free().len(), self.index.idle_len(), self.pool.total());
        if free + idle + used != total {
            return Err(Error::bug(format!("{free} free + {idle} idle + {used} used != {total}")));
        }
        match self.index.fault(|block| self.pool.owners(block)) {
            Some(fault) => Err(Error::bug(fault)),
            None => Ok(()),
        }
    }

    /// The longest chain of named blocks that starts `tokens`, short of the last token.
    fn find(&self, root: BlockName, tokens: &[u32]) -> (Vec<BlockId>, BlockName) {
        let (mut blocks, mut end) = (Vec::new(), root);
        let findable = tokens.len().saturating_sub(1) / BLOCK_SIZE;
        for held in tokens.chunks_exact(BLOCK_SIZE).take(findable) {
            let Some((block, name)) = self.index.find(end, held) else { break };
            blocks.push(block);
            end = name;
        }
        (blocks, end)
    }

    fn share(&mut self, block: BlockId) {
        self.pool.share(block);
        self.index.wake(block);
    }

    fn release(&mut self, block: BlockId) {
        if !self.pool.release(block) {
            return;
        }
        if self.keep_idle && self.index.is_named(block) {
            self.index.park(block);
        } else {
            self.index.forget(block);
            self.pool.put_back(block);
        }
    }

    /// A free block, at the cost of the least recently used idle one if need be. Callers have
    /// counted the available blocks.
    fn take(&mut self) -> BlockId {
        if self.pool.free().is_empty() {
            let evicted = self.index.evict().expect("an available block is free or idle");
            self.pool.put_back(evicted);
        }
        self.pool.take().expect("one was put back if there was none")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(count: usize) -> Vec<u32> {
        (0..count as u32).collect()
    }

    fn allocation(tokens: &[u32]) -> Allocation<'_> {
        Allocation { tokens, request: 1, lookup: true, spare: 0 }
    }

    fn computed(cache: &mut KvCache, tokens: &[u32]) -> BlockTable {
        let mut table = cache.allocate(&allocation(tokens)).expect("fits");
        cache.commit(&mut table, tokens, tokens.len());
        table
    }

    #[test]
    fn only_full_computed_blocks_are_found_and_never_the_last_token() {
        let mut cache = KvCache::new(8, true);
        let prompt = tokens(40);
        let mut table = cache.allocate(&allocation(&prompt)).expect("fits");
        for (done, hit) in [(0, 0), (15, 0), (16, 16), (39, 32)] {
            cache.commit(&mut table, &prompt, done);
            for (len, expect) in [(40, hit), (33, hit), (32, hit.min(16)), (16, 0), (1, 0)] {
                let other = cache.allocate(&allocation(&prompt[..len])).expect("fits");
                assert_eq!(other.named_tokens(), expect, "{done} computed, {len} tokens");
                cache.free(other);
            }
        }
        cache.free(table);
        cache.check([]).expect("sound");
        assert_eq!(cache.stats().cached, 2);
    }

    #[test]
    fn blocks_are_evicted_oldest_first_and_leaves_before_parents() {
        let mut cache = KvCache::new(4, true);
        let (first, second) = (tokens(48), vec![9; 16]);
        let table = computed(&mut cache, &first);
        cache.free(table);
        let table = computed(&mut cache, &second);
        cache.free(table);
        let filler = vec![7; 20];
        let table =
            cache.allocate(&allocation(&filler)).expect("two blocks of the oldest chain go");
        cache.check([&table]).expect("sound");
        let mut longer = first.clone();
        longer.push(0);
        assert_eq!(cache.find(BlockName::Root { salt: 0 }, &longer).0.len(), 1);
        assert_eq!(cache.find(BlockName::Root { salt: 0 }, &[9; 17]).0.len(), 1);
        cache.free(table);
    }

    #[test]
    fn a_block_computed_twice_is_kept_once() {
        let mut cache = KvCache::new(8, true);
        let prompt = tokens(32);
        let mut one = cache.allocate(&allocation(&prompt)).expect("fits");
        let mut two = cache.allocate(&allocation(&prompt)).expect("fits");
        assert_eq!(cache.stats().used, 4);
        cache.commit(&mut one, &prompt, 32);
        cache.commit(&mut two, &prompt, 32);
        assert_eq!((one.blocks(), cache.stats().used), (two.blocks(), 2));
        cache.check([&one, &two]).expect("sound");
        cache.free(one);
        cache.free(two);
        cache.check([]).expect("sound");
    }

    #[test]
    fn without_prefix_caching_only_samples_of_one_request_share() {
        let mut cache = KvCache::new(8, false);
        let prompt = tokens(33);
        let table = computed(&mut cache, &prompt);
        for (request, hit) in [(1, 32), (2, 0)] {
            let other =
                cache.allocate(&Allocation { request, ..allocation(&prompt) }).expect("fits");
            assert_eq!(other.named_tokens(), hit);
            cache.free(other);
        }
        cache.free(table);
        let expect = CacheStats { total: 8, ..CacheStats::default() };
        assert_eq!(cache.stats(), expect, "nothing stays behind");
    }

    #[test]
    fn clearing_forgets_live_blocks_too() {
        let mut cache = KvCache::new(8, true);
        let prompt = tokens(40);
        let mut live = computed(&mut cache, &prompt[..20]);
        let idle = computed(&mut cache, &[5; 32]);
        cache.free(idle);
        cache.clear_prefix_cache();
        assert!(cache.append(&mut live, 40));
        cache.commit(&mut live, &prompt, 40);
        assert_eq!(cache.find(BlockName::Root { salt: 0 }, &prompt).0, []);
        cache.check([&live]).expect("sound");
        cache.free(live);
        assert_eq!((cache.available(), cache.stats().cached), (8, 0));
    }

    #[test]
    fn a_refused_call_changes_nothing() {
        let mut cache = KvCache::new(2, true);
        let mut table = cache.allocate(&allocation(&tokens(17))).expect("fits");
        let before = cache.stats();
        assert!(cache.allocate(&allocation(&tokens(1))).is_none());
        assert!(!cache.append(&mut table, 33));
        assert_eq!((cache.stats(), table.blocks().len()), (before, 2));
        cache.free(table);
        assert!(cache.allocate(&Allocation { spare: 1, ..allocation(&tokens(17)) }).is_none());
    }
}
