//! What the kernels need to know about a batch, in device memory.

use candle_core::Tensor;

use super::Cuda;
use super::launch::Address;
use crate::backend::{Batch, Heads};
use crate::config::BLOCK_SIZE;
use crate::error::Result;

/// Queries in a tile of the attention kernels.
const TILE: usize = 16;
/// Keys in a split of the attention kernels.
const SPLIT: usize = 256;
/// The item has all splits of its tile.
const WHOLE: u32 = u32::MAX;

/// Positions, page slots and block tables of a batch.
#[derive(Debug)]
pub(in crate::backend) struct DeviceBatch {
    /// u32: positions `[rows]`, slots `[rows]`, block tables.
    numbers: Tensor,
    rows: usize,
}

impl DeviceBatch {
    pub(super) fn upload(cuda: &Cuda, batch: &Batch) -> Result<Self> {
        let rows = batch.positions.len();
        let mut numbers = batch.positions.clone();
        for run in &batch.runs {
            let blocks = &batch.blocks[run.blocks.clone()];
            numbers.extend(batch.positions[run.rows.clone()].iter().map(|&position| {
                let block = blocks[position as usize / BLOCK_SIZE].0;
                block * BLOCK_SIZE as u32 + position % BLOCK_SIZE as u32
            }));
        }
        numbers.extend(batch.blocks.iter().map(|block| block.0));
        Ok(Self { numbers: cuda.upload(numbers)?, rows })
    }

    pub(super) fn positions(&self) -> Result<Address> {
        super::address(&self.numbers)
    }

    pub(super) fn slots(&self) -> Result<Address> {
        Ok(self.positions()? + (self.rows * size_of::<u32>()) as u64)
    }

    pub(super) fn blocks(&self) -> Result<Address> {
        Ok(self.positions()? + (2 * self.rows * size_of::<u32>()) as u64)
    }
}

/// How the attention of a batch is cut into the work of blocks.
#[derive(Debug)]
pub(super) struct Plan {
    /// Items of the attention kernel and of the merge, each as the kernel's struct.
    numbers: Vec<u32>,
    num_items: usize,
    num_merges: usize,
    num_partials: usize,
}

/// A [`Plan`] in device memory.
pub(super) struct DevicePlan {
    numbers: Tensor,
    pub(super) num_items: usize,
    pub(super) num_merges: usize,
    pub(super) num_partials: usize,
}

const ITEM_WORDS: usize = 7;

impl Plan {
    /// `blocks_wanted`: as many items make a tile's splits items of their own not worth while.
    pub(super) fn new(
        batch: &Batch,
        heads: Heads,
        window: Option<usize>,
        blocks_wanted: usize,
    ) -> Self {
        let group = heads.num_heads / heads.num_kv_heads;
        let tiles = batch.runs.iter().map(|run| (run.rows.len() * group).div_ceil(TILE));
        let enough = tiles.sum::<usize>() * heads.num_kv_heads >= blocks_wanted;
        let (mut items, mut merges, mut num_partials) = (Vec::new(), Vec::new(), 0);
        for run in &batch.runs {
            let (first_row, rows) = (run.rows.start, run.rows.len());
            for tile in 0..(rows * group).div_ceil(TILE) {
                let last_row = (((tile + 1) * TILE - 1) / group).min(rows - 1);
                let position = |row: usize| batch.positions[first_row + row] as usize;
                let seen = window.unwrap_or(usize::MAX);
                let first = (position(tile * TILE / group) + 1).saturating_sub(seen) / SPLIT;
                let last = position(last_row) / SPLIT;
                let head = [first_row, rows, tile].map(|number| number as u32);
                let mut item = |first: usize, last: usize, partial: u32| {
                    items.extend(head);
                    items.extend([run.blocks.start as u32, first as u32, last as u32, partial]);
                };
                if enough || first == last {
                    item(first, last, WHOLE);
                    continue;
                }
                merges.extend(head);
                merges.extend([num_partials as u32, (last - first + 1) as u32]);
                for split in first..=last {
                    item(split, split, num_partials as u32);
                    num_partials += 1;
                }
            }
        }
        let (num_items, num_merges) = (items.len() / ITEM_WORDS, merges.len() / 5);
        let mut numbers = vec![num_items as u32, num_merges as u32];
        numbers.extend(items);
        numbers.extend(merges);
        Self { numbers, num_items, num_merges, num_partials }
    }

    pub(super) fn upload(self, cuda: &Cuda) -> Result<DevicePlan> {
        let Self { numbers, num_items, num_merges, num_partials } = self;
        Ok(DevicePlan { numbers: cuda.upload(numbers)?, num_items, num_merges, num_partials })
    }
}

impl DevicePlan {
    fn at(&self, word: usize) -> Result<Address> {
        Ok(super::address(&self.numbers)? + (word * size_of::<u32>()) as u64)
    }

    /// Where the number of items lies, and where they do.
    pub(super) fn items(&self) -> Result<(Address, Address)> {
        Ok((self.at(0)?, self.at(2)?))
    }

    /// Where the number of merges lies, and where they do.
    pub(super) fn merges(&self) -> Result<(Address, Address)> {
        Ok((self.at(1)?, self.at(2 + ITEM_WORDS * self.num_items)?))
    }
}
