//! What the kernels need to know about a batch, in device memory.

use std::ops::Range;

use candle_core::Tensor;

use super::launch::Address;
use super::{Cuda, address};
use crate::backend::{Batch, Heads, Run};
use crate::config::BLOCK_SIZE;
use crate::error::{Error, Result};

/// Queries in a tile of the attention kernels.
pub(super) const TILE: usize = 16;
/// Keys in a split of the attention kernels.
const SPLIT: usize = 256;
/// The item has all splits of its tile.
const WHOLE: u32 = u32::MAX;
/// A row whose keys and values go nowhere.
const NO_SLOT: u32 = u32::MAX;
/// Most splits that are items of their own: their results are kept until they are merged.
const MAX_PARTIALS: usize = 2048;
/// Splits up to which a tile is one item where there are enough of them.
const LEAST_LONG: usize = 8;
/// Words of the kernels' structs `AttentionItem` and `MergeItem`.
const ITEM_WORDS: usize = 7;
const MERGE_WORDS: usize = 5;

/// How the attention of a batch is cut into the work of blocks.
#[derive(Debug, Default)]
pub(super) struct Plan {
    items: Vec<u32>,
    merges: Vec<u32>,
    /// Items of several tiles, for `prefill`.
    prefills: Vec<u32>,
    num_partials: usize,
}

/// How much work keeps a GPU busy, and how it may be cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Blocks of the attention kernels; with fewer, tiles are cut into splits.
    pub(super) blocks_wanted: usize,
    /// Tiles of an item of `prefill`; 0 where there is no such kernel.
    pub(super) prefill_tiles: usize,
}

/// Most that a plan has.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlanSize {
    items: usize,
    merges: usize,
    prefills: usize,
    partials: usize,
}

/// Attention of a batch, as tiles of queries and splits of keys.
struct Tiles<'a> {
    batch: &'a Batch,
    /// Of the batch, those that count.
    rows: usize,
    heads: Heads,
    window: Option<usize>,
    cut: Cut,
}

impl Tiles<'_> {
    fn runs(&self) -> impl Iterator<Item = &Run> {
        self.batch.runs.iter().filter(|run| run.rows.start < self.rows)
    }

    fn group(&self) -> usize {
        self.heads.num_heads / self.heads.num_kv_heads
    }

    fn count(&self, run: &Run) -> usize {
        (run.rows.len() * self.group()).div_ceil(TILE)
    }

    /// One row never is, however many heads it has: decode steps are captured without `prefill`.
    fn is_long(&self, run: &Run) -> bool {
        self.cut.prefill_tiles > 1
            && run.rows.len() > 1
            && self.count(run) >= self.cut.prefill_tiles
    }

    /// The splits that a tile's queries see.
    fn splits(&self, run: &Run, tile: usize) -> Range<usize> {
        let position = |row: usize| self.batch.positions[run.rows.start + row] as usize;
        let last_row = (((tile + 1) * TILE - 1) / self.group()).min(run.rows.len() - 1);
        let seen = self.window.unwrap_or(usize::MAX);
        let first = (position(tile * TILE / self.group()) + 1).saturating_sub(seen) / SPLIT;
        first..position(last_row) / SPLIT + 1
    }

    fn is_enough(&self, blocks: usize) -> bool {
        blocks * self.heads.num_kv_heads >= self.cut.blocks_wanted
    }

    /// Whether long runs are for `prefill`: there are enough blocks also then. One counts twice, as it reads keys
    /// and values once for several tiles; that has not been measured.
    fn prefills(&self) -> bool {
        let blocks = |run| match self.count(run) {
            tiles if self.is_long(run) => 2 * tiles.div_ceil(self.cut.prefill_tiles),
            tiles => tiles,
        };
        self.is_enough(self.runs().map(blocks).sum())
    }

    /// Splits up to which a tile is one item.
    fn most_splits(&self) -> usize {
        if self.cut.blocks_wanted == 0 {
            return usize::MAX;
        }
        if !self.is_enough(self.runs().map(|run| self.count(run)).sum()) {
            return 1;
        }
        let all = self.runs().flat_map(|run| (0..self.count(run)).map(move |tile| (run, tile)));
        let splits: usize = all.map(|(run, tile)| self.splits(run, tile).len()).sum();
        // One that takes twice its share would be waited for.
        LEAST_LONG.max(2 * splits * self.heads.num_kv_heads / self.cut.blocks_wanted)
    }
}

impl Plan {
    fn new(tiles: &Tiles<'_>) -> Self {
        let (prefills, most) = (tiles.prefills(), tiles.most_splits());
        let mut plan = Self::default();
        for run in tiles.runs() {
            let head = |tile| [run.rows.start, run.rows.len(), tile].map(|number| number as u32);
            let blocks = run.blocks.start as u32;
            if prefills && tiles.is_long(run) {
                for tile in (0..tiles.count(run)).step_by(tiles.cut.prefill_tiles) {
                    plan.prefills.extend(head(tile));
                    plan.prefills.extend([blocks, 0, 0, 0]);
                }
                continue;
            }
            for tile in 0..tiles.count(run) {
                plan.add(head(tile), blocks, tiles.splits(run, tile), most);
            }
        }
        plan
    }

    /// Adds a tile, as one item where it has no more than `most` splits.
    fn add(&mut self, head: [u32; 3], blocks: u32, splits: Range<usize>, most: usize) {
        let mut item = |first: usize, last: usize, partial: u32| {
            self.items.extend(head);
            self.items.extend([blocks, first as u32, last as u32, partial]);
        };
        let partial = self.num_partials;
        if splits.len() <= most || partial + splits.len() > MAX_PARTIALS {
            item(splits.start, splits.end - 1, WHOLE);
            return;
        }
        for (index, split) in splits.clone().enumerate() {
            item(split, split, (partial + index) as u32);
        }
        self.merges.extend(head);
        self.merges.extend([partial as u32, splits.len() as u32]);
        self.num_partials += splits.len();
    }

    fn size(&self) -> PlanSize {
        PlanSize {
            items: self.items.len() / ITEM_WORDS,
            merges: self.merges.len() / MERGE_WORDS,
            prefills: self.prefills.len() / ITEM_WORDS,
            partials: self.num_partials,
        }
    }
}

/// Numbers of the partial results of a layer, at most.
pub(super) fn partials(heads: Heads) -> usize {
    MAX_PARTIALS * partial_len(heads)
}

/// Numbers of one: of each head and query of a tile, sums, a maximum and a weight.
pub(super) fn partial_len(heads: Heads) -> usize {
    heads.num_kv_heads * TILE * (heads.head_dim + 2)
}

impl PlanSize {
    /// For up to `rows` sequences of up to `positions` tokens, one row of each.
    pub(super) fn of_decode(rows: usize, positions: usize, heads: Heads) -> Self {
        let tiles = rows * (heads.num_heads / heads.num_kv_heads).div_ceil(TILE);
        let partials = (tiles * positions.div_ceil(SPLIT)).min(MAX_PARTIALS);
        Self { items: tiles + partials, merges: tiles, prefills: 0, partials }
    }

    fn fits(self, other: Self) -> bool {
        self.items <= other.items
            && self.merges <= other.merges
            && self.prefills <= other.prefills
            && self.partials <= other.partials
    }

    fn words(self) -> usize {
        3 + ITEM_WORDS * (self.items + self.prefills) + MERGE_WORDS * self.merges
    }
}

/// Where a plan lies, and for how much its launches are made.
#[derive(Debug, Clone, Copy)]
struct PlacedPlan {
    window: Option<usize>,
    /// Word at which it starts: numbers of items, merges and prefills, then these.
    start: usize,
    size: PlanSize,
}

/// Where everything lies in the words of a batch: ids, positions and slots `[rows]` each, plans, block
/// tables.
#[derive(Debug, Clone)]
pub(super) struct Places {
    rows: usize,
    plans: Vec<PlacedPlan>,
    blocks: usize,
}

impl Places {
    pub(super) fn new(rows: usize, plans: impl Iterator<Item = (Option<usize>, PlanSize)>) -> Self {
        let mut start = 3 * rows;
        let plans = plans.map(|(window, size)| {
            let placed = PlacedPlan { window, start, size };
            start += size.words();
            placed
        });
        let plans = plans.collect();
        Self { rows, plans, blocks: start }
    }

    /// Words with block tables of `blocks` blocks.
    pub(super) fn words(&self, blocks: usize) -> usize {
        self.blocks + blocks
    }
}

/// The words of a batch whose first `rows` rows are real ones, the others padding.
pub(super) fn words(
    cuda: &Cuda,
    batch: &Batch,
    rows: usize,
    heads: Heads,
    windows: &[Option<usize>],
    places: Option<&Places>,
) -> (Vec<u32>, Places) {
    let cut = cuda.cut(heads);
    let plan = |&window: &Option<usize>| Plan::new(&Tiles { batch, rows, heads, window, cut });
    let plans: Vec<Plan> = windows.iter().map(plan).collect();
    let exact = || {
        Places::new(
            batch.positions.len(),
            windows.iter().copied().zip(plans.iter().map(Plan::size)),
        )
    };
    let places = places.cloned().unwrap_or_else(exact);
    let mut words = Vec::with_capacity(places.words(batch.blocks.len()));
    words.extend(&batch.ids);
    words.resize(places.rows, 0); // ops that look at no ids
    words.extend(&batch.positions);
    for run in &batch.runs {
        let blocks = &batch.blocks[run.blocks.clone()];
        words.extend(run.rows.clone().map(|row| {
            let (position, size) = (batch.positions[row], BLOCK_SIZE as u32);
            let block = blocks[(position / size) as usize].0;
            if row < rows { block * size + position % size } else { NO_SLOT }
        }));
    }
    for (plan, placed) in plans.iter().zip(&places.plans) {
        let size = plan.size();
        assert!(size.fits(placed.size), "a plan of {size:?} in the place of {:?}", placed.size);
        words.extend([size.items, size.merges, size.prefills].map(|count| count as u32));
        words.extend(&plan.items);
        words.resize(placed.start + 3 + ITEM_WORDS * placed.size.items, 0);
        words.extend(&plan.merges);
        words.extend(&plan.prefills);
        words.resize(placed.start + placed.size.words(), 0);
    }
    words.extend(batch.blocks.iter().map(|block| block.0));
    (words, places)
}

/// A batch in device memory.
#[derive(Debug)]
pub(in crate::backend) struct DeviceBatch {
    numbers: Tensor,
    places: Places,
}

/// A plan in device memory.
pub(super) struct DevicePlan {
    /// Where the number of items lies, and where they do.
    pub(super) items: (Address, Address),
    pub(super) merges: (Address, Address),
    pub(super) prefills: (Address, Address),
    /// Blocks of the launches, and partial results between them.
    pub(super) num_items: usize,
    pub(super) num_merges: usize,
    pub(super) num_prefills: usize,
    pub(super) num_partials: usize,
}

impl DeviceBatch {
    pub(super) fn new(numbers: Tensor, places: Places) -> Self {
        Self { numbers, places }
    }

    fn at(&self, word: usize) -> Result<Address> {
        Ok(address(&self.numbers)? + (word * size_of::<u32>()) as u64)
    }

    pub(super) fn ids(&self) -> Result<Address> {
        self.at(0)
    }

    pub(super) fn positions(&self) -> Result<Address> {
        self.at(self.places.rows)
    }

    pub(super) fn slots(&self) -> Result<Address> {
        self.at(2 * self.places.rows)
    }

    pub(super) fn blocks(&self) -> Result<Address> {
        self.at(self.places.blocks)
    }

    pub(super) fn plan(&self, window: Option<usize>) -> Result<DevicePlan> {
        let placed = self.places.plans.iter().find(|plan| plan.window == window);
        let placed = placed.ok_or_else(|| {
            Error::bug(format!("the batch was placed without the attention window {window:?}"))
        })?;
        let (counts, size) = (placed.start, placed.size);
        let items = counts + 3;
        let merges = items + ITEM_WORDS * size.items;
        let prefills = merges + MERGE_WORDS * size.merges;
        Ok(DevicePlan {
            items: (self.at(counts)?, self.at(items)?),
            merges: (self.at(counts + 1)?, self.at(merges)?),
            prefills: (self.at(counts + 2)?, self.at(prefills)?),
            num_items: size.items,
            num_merges: size.merges,
            num_prefills: size.prefills,
            num_partials: size.partials,
        })
    }
}
