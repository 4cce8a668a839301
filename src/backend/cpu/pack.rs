//! [`Packed`]: the rows of a projection, rearranged once at load for the kernels in [`super::gemm`].
//!
//! Rows stand in panels of 32, two tiles of 16. A panel holds its blocks of `k` one after the other;
//! a block is 8 numbers per row of a dense encoding, and the file's 32 of a quantised one:
//!
//! ```text
//! dense        [k][tile][16]                                  one row per lane
//! bf16 pairs   [k / 2][tile][16][2]                           one row's two k per lane
//! Q8_0         scales [tile][16] f16, then as dense or pairs  of i8
//! Q4_0, Q4_1   scales (, minima) [tile][16] f16, then [k / 8][tile][16][2] words of 16 bits; bits
//!              4j..4j + 4 of word p hold the number of k = 2j + p
//! ```
//!
//! Missing rows of the last panel and missing `k` of the last dense block are zeros.
#![allow(unsafe_code)] // Threads pack disjoint panels of one buffer.

use half::{bf16, f16};

use super::memory::{Buffer, Shared};
use super::{Arithmetic, Cpu};
use crate::backend::reference;
use crate::config::DType;
use crate::error::{Error, Result};
use crate::weights::{Encoding, StoredTensor};

/// Rows of a panel.
pub(super) const PANEL: usize = 32;

/// Rows of one or more matrices, by encoding.
pub(crate) struct Packed {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) segments: Vec<Segment>,
    /// One per row, or empty.
    pub(super) bias: Vec<f32>,
}

impl Packed {
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }
}

/// Consecutive rows of one encoding.
pub(super) struct Segment {
    pub(super) encoding: Encoding,
    pub(super) arithmetic: Arithmetic,
    /// First row within the whole projection.
    pub(super) start: usize,
    pub(super) rows: usize,
    /// Bytes of one panel.
    pub(super) stride: usize,
    pub(super) data: Buffer,
}

impl Segment {
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(super) fn panel(&self, index: usize) -> &[u8] {
        &self.data.as_slice()[index * self.stride..(index + 1) * self.stride]
    }
}

/// Numbers per row and block.
pub(super) fn block_len(encoding: Encoding) -> usize {
    encoding.block_len().max(8)
}

/// Bytes of one block of a panel.
pub(super) fn block_bytes(encoding: Encoding) -> usize {
    let scales = PANEL * 2;
    match encoding {
        Encoding::F32 => PANEL * 8 * 4,
        Encoding::F16 | Encoding::BF16 => PANEL * 8 * 2,
        Encoding::Q4_0 => scales + PANEL * 16,
        Encoding::Q4_1 => 2 * scales + PANEL * 16,
        Encoding::Q8_0 => scales + PANEL * 32,
    }
}

/// The encoding that a stored one is kept in.
fn kept_as(stored: Encoding, dtype: DType) -> Encoding {
    match (stored, dtype) {
        (Encoding::F32, DType::Auto | DType::BFloat16) | (Encoding::F16, DType::BFloat16) => {
            Encoding::BF16
        }
        (Encoding::F32 | Encoding::BF16, DType::Float16) => Encoding::F16,
        _ => stored,
    }
}

/// Packs `parts`, all of `cols` columns, on top of each other.
pub(crate) fn pack(cpu: &Cpu, parts: &[StoredTensor], bias: Vec<f32>) -> Result<Packed> {
    let cols = parts.first().map_or(0, StoredTensor::cols);
    let rows = parts.iter().map(StoredTensor::rows).sum();
    let mut packed = Packed { rows, cols, segments: Vec::new(), bias };
    let mut start = 0;
    for group in
        parts.chunk_by(|a, b| kept_as(a.encoding, cpu.dtype) == kept_as(b.encoding, cpu.dtype))
    {
        let segment = pack_segment(cpu, group, start)?;
        start += segment.rows;
        packed.segments.push(segment);
    }
    Ok(packed)
}

fn pack_segment(cpu: &Cpu, parts: &[StoredTensor], start: usize) -> Result<Segment> {
    let encoding = kept_as(parts[0].encoding, cpu.dtype);
    let arithmetic = cpu.arithmetic(encoding);
    let sources: Vec<_> =
        parts.iter().flat_map(|part| (0..part.rows()).map(move |row| (part, row))).collect();
    let stride = parts[0].cols().div_ceil(block_len(encoding)) * block_bytes(encoding);
    let panels = sources.len().div_ceil(PANEL);
    let mut data = panels
        .checked_mul(stride)
        .and_then(Buffer::zeroed)
        .ok_or_else(|| Error::checkpoint(format!("tensor `{}` is too large", parts[0].name)))?;
    let shared = Shared::new(data.as_mut_slice());
    cpu.pool.run(panels, &|panel| {
        // SAFETY: each panel is its own part, and is visited once.
        let bytes = unsafe { shared.part(panel * stride, stride) };
        let first = panel * PANEL;
        for (lane, &(part, row)) in sources[first..].iter().take(PANEL).enumerate() {
            let writer = RowWriter { bytes, lane, encoding, arithmetic };
            if encoding.block_len() == 1 {
                writer.dense(part, row);
            } else {
                writer.quantised(part.row_bytes(row));
            }
        }
    });
    Ok(Segment { encoding, arithmetic, start, rows: sources.len(), stride, data })
}

/// Writes one row into its lane of a panel.
struct RowWriter<'a> {
    bytes: &'a mut [u8],
    lane: usize,
    encoding: Encoding,
    arithmetic: Arithmetic,
}

impl RowWriter<'_> {
    fn dense(self, part: &StoredTensor, row: usize) {
        let mut values = vec![0.0; part.cols()];
        reference::dequantize(part.encoding, part.row_bytes(row), &mut values);
        for (k, &value) in values.iter().enumerate() {
            let slot = self.slot(k);
            match self.encoding {
                Encoding::F32 => put(self.bytes, slot * 4, value.to_le_bytes()),
                Encoding::F16 => put(self.bytes, slot * 2, f16::from_f32(value).to_le_bytes()),
                _ => put(self.bytes, slot * 2, bf16::from_f32(value).to_le_bytes()),
            }
        }
    }

    fn quantised(self, row: &[u8]) {
        let block = block_bytes(self.encoding);
        let stored = row.chunks_exact(self.encoding.block_bytes());
        for (stored, panel) in stored.zip(self.bytes.chunks_exact_mut(block)) {
            let scales = if self.encoding == Encoding::Q4_1 { 2 } else { 1 };
            for i in 0..scales {
                put(panel, (i * PANEL + self.lane) * 2, [stored[2 * i], stored[2 * i + 1]]);
            }
            let (numbers, panel) = (&stored[2 * scales..], &mut panel[scales * PANEL * 2..]);
            if self.encoding == Encoding::Q8_0 {
                for (k, &number) in numbers.iter().enumerate() {
                    panel[slot(self.arithmetic, self.lane, k)] = number;
                }
            } else {
                for k in 0..32 {
                    let number = if k < 16 { numbers[k] & 15 } else { numbers[k - 16] >> 4 };
                    self::nibble(panel, self.lane, k, number);
                }
            }
        }
    }

    fn slot(&self, k: usize) -> usize {
        slot(self.arithmetic, self.lane, k)
    }
}

/// Where the number of row `lane` and `k` stands, counted in numbers.
fn slot(arithmetic: Arithmetic, lane: usize, k: usize) -> usize {
    match arithmetic {
        Arithmetic::Exact => k * PANEL + lane,
        Arithmetic::Pairs => (k / 2 * PANEL + lane) * 2 + k % 2,
    }
}

/// Writes a 4-bit number of a block that was zero.
fn nibble(panel: &mut [u8], lane: usize, k: usize, number: u8) {
    let word = (k / 8 * PANEL + lane) * 2 + k % 2;
    let j = k % 8 / 2;
    panel[word * 2 + j / 2] |= number << (4 * (j % 2));
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}
