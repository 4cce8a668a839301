//! What the kernels need to know about a batch, in device memory.

use candle_core::Tensor;

use super::launch::Address;
use super::{Cuda, address};
use crate::backend::{Batch, Heads, Run};
use crate::config::BLOCK_SIZE;
use crate::error::{Error, Result};

/// Queries in a tile of the attention kernels.
const TILE: usize = 16;
/// Keys in a split of the attention kernels.
const SPLIT: usize = 256;
/// The item has all splits of its tile.
const WHOLE: u32 = u32::MAX;
/// A row whose keys and values go nowhere.
const NO_SLOT: u32 = u32::MAX;
/// Most splits that are items of their own: their results are kept until they are merged.
const MAX_PARTIALS: usize = 2048;
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

impl Plan {
    /// For the first `rows` rows of `batch`. Long runs are for `prefill`, and splits no items of their
    /// own, where there are enough blocks without.
    fn new(batch: &Batch, rows: usize, heads: Heads, window: Option<usize>, cut: Cut) -> Self {
        let group = heads.num_heads / heads.num_kv_heads;
        let runs = || batch.runs.iter().filter(|run| run.rows.start < rows);
        let tiles = |run: &Run| (run.rows.len() * group).div_ceil(TILE);
        let each = cut.prefill_tiles.max(1);
        let is_long = |run: &Run| each > 1 && tiles(run) >= each;
        let blocks = |run| if is_long(run) { tiles(run).div_ceil(each) } else { tiles(run) };
        let is_enough = |tiles: usize| tiles * heads.num_kv_heads >= cut.blocks_wanted;
        let prefills = is_enough(runs().map(blocks).sum());
        let enough = prefills || is_enough(runs().map(tiles).sum());
        let mut plan = Self::default();
        for run in runs() {
            let (first_row, rows) = (run.rows.start, run.rows.len());
            if prefills && is_long(run) {
                for tile in (0..tiles(run)).step_by(each) {
                    let numbers = [first_row, rows, tile, run.blocks.start, 0, 0, 0];
                    plan.prefills.extend(numbers.map(|number| number as u32));
                }
                continue;
            }
            for tile in 0..tiles(run) {
                let last_row = (((tile + 1) * TILE - 1) / group).min(rows - 1);
                let position = |row: usize| batch.positions[first_row + row] as usize;
                let seen = window.unwrap_or(usize::MAX);
                let first = (position(tile * TILE / group) + 1).saturating_sub(seen) / SPLIT;
                let splits = first..position(last_row) / SPLIT + 1;
                let head = [first_row, rows, tile].map(|number| number as u32);
                plan.add(head, run.blocks.start as u32, splits, enough);
            }
        }
        plan
    }

    fn add(&mut self, head: [u32; 3], blocks: u32, splits: std::ops::Range<usize>, enough: bool) {
        let mut item = |first: usize, last: usize, partial: u32| {
            self.items.extend(head);
            self.items.extend([blocks, first as u32, last as u32, partial]);
        };
        let partial = self.num_partials;
        if enough || splits.len() == 1 || partial + splits.len() > MAX_PARTIALS {
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

impl PlanSize {
    /// For up to `rows` sequences of up to `positions` tokens, one row of each.
    pub(super) fn of_decode(rows: usize, positions: usize, heads: Heads) -> Self {
        let tiles = rows * (heads.num_heads / heads.num_kv_heads).div_ceil(TILE);
        let partials = (tiles * positions.div_ceil(SPLIT)).min(MAX_PARTIALS);
        Self { items: tiles + partials, merges: tiles, prefills: 0, partials }
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
    let plan = |&window: &Option<usize>| Plan::new(batch, rows, heads, window, cut);
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
