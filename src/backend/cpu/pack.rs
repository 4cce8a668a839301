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

use std::borrow::Cow;
use std::sync::Arc;

use half::{bf16, f16};

use super::memory::{Buffer, CACHE_LINE, Shared};
use super::pool::Place;
use super::{Arithmetic, Cpu};
use crate::backend::reference;
use crate::config::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::weights::{Bytes, Encoding, StoredTensor};

/// Counts the layouts that there have been: what was kept in another is packed again.
pub(super) const LAYOUT: u32 = 1;

/// Rows of a panel.
pub(super) const PANEL: usize = 32;

/// Rows of one or more matrices, by encoding.
pub(crate) struct Packed {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) segments: Vec<Segment>,
    /// One per row, or empty.
    pub(super) bias: Vec<f32>,
    /// What was read after these weights, the last time.
    pub(super) followed_by: Arc<Place>,
}

impl Packed {
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Whether both halves of the rows are panels of their own.
    pub(crate) fn has_halves(&self) -> bool {
        self.rows.is_multiple_of(2 * PANEL)
            && self.segments.iter().all(|segment| segment.start.is_multiple_of(PANEL))
    }

    pub(super) fn panels(&self) -> usize {
        self.segments.iter().map(Segment::panels).sum()
    }

    /// The segment that has panel number `index` of all, and the panel's number there.
    pub(super) fn panel(&self, mut index: usize) -> Option<(&Segment, usize)> {
        for segment in &self.segments {
            if index < segment.panels() {
                return Some((segment, index));
            }
            index -= segment.panels();
        }
        None
    }

    /// Where panel number `index` starts, or, behind the last, what followed when these weights were last read.
    pub(super) fn panel_start(&self, index: usize) -> *const u8 {
        match self.panel(index) {
            Some((segment, panel)) => segment.panel(panel).as_ptr(),
            None => self.followed_by.get().0,
        }
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
    pub(super) data: Data,
}

/// Where packed numbers lie.
pub(super) enum Data {
    Made(Buffer),
    Kept(Bytes),
}

impl Data {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Made(buffer) => buffer.as_slice(),
            Self::Kept(bytes) => bytes.as_slice(),
        }
    }
}

impl Segment {
    /// Whether its products need the sums of activations: for minima, or for an offset that integers take off last.
    pub(super) fn reads_sums(&self) -> bool {
        match self.encoding {
            Encoding::Q4_1 => true,
            Encoding::Q4_0 => self.arithmetic == Arithmetic::Integers,
            _ => false,
        }
    }

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

/// f16 numbers per row in front of each block: none, a scale, or a scale and a minimum.
pub(super) fn scales(encoding: Encoding) -> usize {
    match encoding {
        Encoding::F32 | Encoding::F16 | Encoding::BF16 => 0,
        Encoding::Q4_0 | Encoding::Q8_0 => 1,
        Encoding::Q4_1 => 2,
    }
}

/// Bytes of one block of a panel.
pub(super) fn block_bytes(encoding: Encoding) -> usize {
    let bits = match encoding {
        Encoding::F32 => 32,
        Encoding::F16 | Encoding::BF16 => 16,
        Encoding::Q8_0 => 8,
        Encoding::Q4_0 | Encoding::Q4_1 => 4,
    };
    PANEL * (2 * scales(encoding) + block_len(encoding) * bits / 8)
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
    let mut packed = Packed { rows, cols, segments: Vec::new(), bias, followed_by: Arc::default() };
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
    let segment = |data| Segment { encoding, arithmetic, start, rows: sources.len(), stride, data };
    let name = parts.iter().map(|part| part.name.as_str()).collect::<Vec<_>>().join(" + ");
    let len = panels.checked_mul(stride).ok_or_else(|| out_of_memory(&name))?;
    let fits = |bytes: &Bytes| {
        let slice = bytes.as_slice();
        slice.len() == len && slice.as_ptr().addr().is_multiple_of(CACHE_LINE)
    };
    if let Some(bytes) = cpu.kept(|kept| kept.find(&name, len)).flatten().filter(fits) {
        return Ok(segment(Data::Kept(bytes)));
    }
    let mut data = cpu.weights.zeroed(len).ok_or_else(|| out_of_memory(&name))?;
    let shared = Shared::new(data.as_mut_slice());
    cpu.pool.run(panels, &|panel| {
        // SAFETY: each panel is its own part, and is visited once.
        let bytes = unsafe { shared.part(panel * stride, stride) };
        let sources = sources[panel * PANEL..].iter().take(PANEL);
        let rows: Vec<_> = sources.map(|&(part, row)| kept_row(part, row, encoding)).collect();
        pack_panel(&rows, bytes, encoding, arithmetic);
    });
    for part in parts {
        part.data.release();
    }
    cpu.kept(|kept| kept.keep(&name, data.as_slice()));
    Ok(segment(Data::Made(data)))
}

fn out_of_memory(tensor: &str) -> Error {
    Error::new(ErrorKind::OutOfMemory, format!("tensor `{tensor}` does not fit in memory"))
}

/// A row in the encoding that it is kept in, filled up with zeros to whole blocks.
fn kept_row(part: &StoredTensor, row: usize, encoding: Encoding) -> Cow<'_, [u8]> {
    let (stored, cols) = (part.row_bytes(row), part.cols());
    let missing = cols.next_multiple_of(block_len(encoding)) - cols;
    if part.encoding == encoding && missing == 0 {
        return stored.into();
    }
    let mut values = vec![0.0; cols + missing];
    reference::dequantize(part.encoding, stored, &mut values[..cols]);
    let bytes: Vec<u8> = match encoding {
        Encoding::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Encoding::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
    };
    bytes.into()
}

/// Writes up to [`PANEL`] rows of whole blocks into a panel of zeros.
fn pack_panel(
    rows: &[Cow<'_, [u8]>],
    panel: &mut [u8],
    encoding: Encoding,
    arithmetic: Arithmetic,
) {
    let scales = scales(encoding);
    let len = block_len(encoding) / encoding.block_len() * encoding.block_bytes();
    for (index, block) in panel.chunks_exact_mut(block_bytes(encoding)).enumerate() {
        let stored = |lane: usize| rows.get(lane).map(|row| &row[index * len..(index + 1) * len]);
        let (head, numbers) = block.split_at_mut(scales * PANEL * 2);
        interleave::<2>(|lane| Some(&stored(lane)?[..scales * 2]), head);
        let body = |lane: usize| Some(&stored(lane)?[scales * 2..]);
        match (encoding, arithmetic) {
            (Encoding::Q4_0 | Encoding::Q4_1, _) => interleave_nibbles(body, numbers),
            (Encoding::Q8_0, Arithmetic::Exact) => interleave::<1>(body, numbers),
            (Encoding::F32, _) | (Encoding::F16 | Encoding::BF16, Arithmetic::Pairs) => {
                interleave::<4>(body, numbers);
            }
            (Encoding::F16 | Encoding::BF16, Arithmetic::Integers) => {
                unreachable!("only quantised numbers are integers")
            }
            (Encoding::Q8_0, Arithmetic::Pairs | Arithmetic::Integers)
            | (Encoding::F16 | Encoding::BF16, Arithmetic::Exact) => interleave::<2>(body, numbers),
        }
    }
}

/// Rows of units of `N` bytes → `[unit][lane]`. `row` gives a lane's units, or `None` for no row.
fn interleave<'a, const N: usize>(row: impl Fn(usize) -> Option<&'a [u8]>, out: &mut [u8]) {
    for (lane, row) in (0..PANEL).map_while(|lane| Some((lane, row(lane)?))) {
        for (unit, out) in row.chunks_exact(N).zip(out.chunks_exact_mut(PANEL * N)) {
            out[lane * N..(lane + 1) * N].copy_from_slice(unit);
        }
    }
}

/// Rows of 16 bytes, whose low halves are the numbers 0..16 and high halves 16..32, → `[k / 8][lane]`
/// words of 32 bits, as the module describes them.
fn interleave_nibbles<'a>(row: impl Fn(usize) -> Option<&'a [u8]>, out: &mut [u8]) {
    let mut stored = [[0u32; PANEL]; 4];
    for (lane, row) in (0..PANEL).map_while(|lane| Some((lane, row(lane)?))) {
        for (stored, four) in stored.iter_mut().zip(row.chunks_exact(4)) {
            stored[lane] = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        }
    }
    for (eight, out) in out.chunks_exact_mut(PANEL * 4).enumerate() {
        let (first, shift) = (eight % 2 * 2, eight / 2 * 4);
        for (lane, out) in out.chunks_exact_mut(4).enumerate() {
            let word = spread(stored[first][lane] >> shift)
                | spread(stored[first + 1][lane] >> shift) << 8;
            out.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// The low halves of bytes 0 to 3, moved to the bits 0, 16, 4 and 20.
fn spread(bytes: u32) -> u32 {
    bytes & 0xf | (bytes & 0xf00) << 8 | (bytes & 0xf_0000) >> 12 | (bytes & 0xf00_0000) >> 4
}

#[cfg(test)]
mod tests {
    use super::super::Tier;
    use super::*;

    /// Zeros, `[rows, 32]`.
    fn part(rows: usize, encoding: Encoding) -> StoredTensor {
        let bytes = Arc::new(vec![0; encoding.bytes_for(rows * 32).expect("blocks")]);
        let whole = 0..bytes.len();
        let bytes = Bytes::new(bytes, whole).expect("the whole");
        StoredTensor::new("w", vec![rows, 32], encoding, bytes).expect("its size")
    }

    #[test]
    fn weights_learn_what_follows() {
        let cpu = Cpu::new(Some(1), DType::Float32, Tier::Portable).expect("a thread");
        let packed = || pack(&cpu, &[part(64, Encoding::F32)], Vec::new()).expect("packs");
        let (a, b) = (packed(), packed());
        for weight in [&a, &b, &a] {
            cpu.reads(weight, weight.panels());
        }
        assert_eq!(a.followed_by.get(), (b.panel_start(0), 2, 32 * 32 * 4));
        assert_eq!(b.panel_start(2), a.panel_start(0));
    }

    #[test]
    fn halves_are_apart_where_panels_are_whole() {
        let cpu = Cpu::new(Some(1), DType::Auto, Tier::Portable).expect("a thread");
        for (rows, encodings, expect) in [
            ([64, 64], [Encoding::Q4_0, Encoding::Q4_0], true),
            ([32, 32], [Encoding::Q4_0, Encoding::Q8_0], true),
            ([48, 48], [Encoding::F32, Encoding::F32], false),
            ([48, 80], [Encoding::Q4_0, Encoding::Q8_0], false),
        ] {
            let parts = [part(rows[0], encodings[0]), part(rows[1], encodings[1])];
            let packed = pack(&cpu, &parts, Vec::new()).expect("packs");
            assert_eq!(packed.has_halves(), expect, "{rows:?} {encodings:?}");
        }
    }

    /// What changes these bytes counts [`LAYOUT`] up.
    #[test]
    fn the_layout_is_the_one_that_is_counted() {
        let mut found = Vec::new();
        for (encoding, arithmetic) in Encoding::ALL.into_iter().flat_map(|encoding| {
            [Arithmetic::Exact, Arithmetic::Pairs, Arithmetic::Integers].map(|a| (encoding, a))
        }) {
            if encoding.block_len() == 1 && arithmetic == Arithmetic::Integers {
                continue;
            }
            let bytes = encoding.bytes_for(32).expect("a block");
            let row = |lane: usize| (0..bytes).map(|i| (31 * lane + 7 * i) as u8).collect();
            let rows: Vec<Cow<'_, [u8]>> =
                (0..PANEL - 3).map(|lane| Cow::Owned(row(lane))).collect();
            let mut panel = vec![0; 32 / block_len(encoding) * block_bytes(encoding)];
            pack_panel(&rows, &mut panel, encoding, arithmetic);
            found.extend(crc32fast::hash(&panel).to_le_bytes());
        }
        // Converted first: what becomes zero, is rounded up, to even, down, and to infinity.
        let numbers = [1e-42_f32, 1.0 + 3.0 / 2048.0, 1.0 + 1.0 / 256.0, -0.1, f32::MAX];
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let bytes = Bytes::new(Arc::new(bytes), 0..20).expect("the whole");
        let part = StoredTensor::new("w", vec![1, 5], Encoding::F32, bytes).expect("its size");
        for encoding in [Encoding::F32, Encoding::F16, Encoding::BF16] {
            found.extend_from_slice(&kept_row(&part, 0, encoding));
        }
        assert_eq!((LAYOUT, crc32fast::hash(&found)), (1, 0x4a66_7d67));
    }
}
