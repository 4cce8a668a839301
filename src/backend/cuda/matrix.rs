//! Weights in device memory: as numbers of the compute type, or quantised in the order in which
//! `kernels/weights.cuh` describes them.

use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::{DType, Tensor};
use half::{bf16, f16};

use super::launch::Address;
use super::{Cuda, address, failed};
use crate::backend::reference::dequantize;
use crate::error::Result;
use crate::weights::{Encoding, StoredTensor};

/// Rows of a packed panel.
const PANEL: usize = 16;
/// Columns of its chunks, and of a stage of `gemm`.
pub(super) const CHUNK: usize = 32;

/// Rows of one or more stored matrices on top of each other, `[outs, cols]`.
pub(in crate::backend) struct Matrix {
    pub(super) weight: Tensor,
    /// `[outs]` f32.
    pub(super) bias: Option<Tensor>,
    pub(super) format: Format,
    outs: usize,
    cols: usize,
}

/// How the weights lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// `[outs, cols]` of the compute type.
    Dense,
    Q8_0,
    Q4_0,
    Q4_1,
}

impl Format {
    /// As the kernels are named.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
        }
    }

    /// Bytes of [`PANEL`] rows × [`CHUNK`] columns: numbers, then rows of scales and minima.
    pub(super) fn chunk_bytes(self) -> usize {
        match self {
            Self::Dense => 0,
            Self::Q8_0 => 512 + 32,
            Self::Q4_0 => 256 + 32,
            Self::Q4_1 => 256 + 64,
        }
    }

    /// The packed format of an encoding; that of floats is [`Self::Dense`].
    fn of(encoding: Encoding) -> Self {
        match encoding {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => Self::Dense,
            Encoding::Q8_0 => Self::Q8_0,
            Encoding::Q4_0 => Self::Q4_0,
            Encoding::Q4_1 => Self::Q4_1,
        }
    }
}

impl Matrix {
    pub(in crate::backend) fn outs(&self) -> usize {
        self.outs
    }

    pub(in crate::backend) fn cols(&self) -> usize {
        self.cols
    }
}

impl Cuda {
    /// Numbers of any stored encoding, in device memory. Quantised ones stay so beside tensor cores,
    /// unless stacked with others.
    pub(in crate::backend) fn matrix(
        &self,
        parts: &[StoredTensor],
        bias: Option<Vec<f32>>,
    ) -> Result<Matrix> {
        let (outs, cols) = (parts.iter().map(StoredTensor::rows).sum::<usize>(), parts[0].cols());
        let encoding = parts[0].encoding;
        let same = parts.iter().all(|part| part.encoding == encoding);
        let format = if same && !self.is_exact() { Format::of(encoding) } else { Format::Dense };
        let weight = if format != Format::Dense {
            let packed = packed(parts, outs, format);
            let weight = self.empty(packed.len() / 4, DType::U32)?;
            self.copy_weights(&packed, address(&weight)?)?;
            weight
        } else if same && stored_as(self.dtype) == encoding {
            self.copied(parts, (outs, cols))?
        } else {
            let device = self.device();
            match self.dtype {
                DType::BF16 => {
                    Tensor::from_vec(converted(parts, bf16::from_f32), (outs, cols), &device)
                }
                DType::F16 => {
                    Tensor::from_vec(converted(parts, f16::from_f32), (outs, cols), &device)
                }
                _ => Tensor::from_vec(converted(parts, |x| x), (outs, cols), &device),
            }
            .map_err(|error| self.explain(error))?
        };
        let bias = bias.map(|bias| Tensor::from_vec(bias, outs, &self.device())).transpose();
        let bias = bias.map_err(|error| self.explain(error))?;
        Ok(Matrix { weight, bias, format, outs, cols })
    }

    /// Numbers that are stored as they are computed with, from where they lie.
    fn copied(&self, parts: &[StoredTensor], shape: (usize, usize)) -> Result<Tensor> {
        let weight = self.empty(shape, self.dtype)?;
        let mut to = address(&weight)?;
        for part in parts {
            self.copy_weights(part.data.as_slice(), to)?;
            to += part.data.as_slice().len() as u64;
        }
        Ok(weight)
    }

    /// Copies from where the numbers lie, and waits: they may go afterwards.
    fn copy_weights(&self, bytes: &[u8], to: Address) -> Result<()> {
        // SAFETY: callers give addresses of tensors with room for the bytes.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }.map_err(failed)?;
        self.stream.synchronize().map_err(failed)
    }

    /// Bytes that `len` numbers take when they are stored as `encoding`, about.
    pub(in crate::backend) fn weight_bytes(&self, encoding: Encoding, len: usize) -> usize {
        match Format::of(encoding) {
            Format::Dense => len * self.dtype.size_in_bytes(),
            _ if self.is_exact() => len * size_of::<f32>(),
            format => len.div_ceil(PANEL * CHUNK) * format.chunk_bytes(),
        }
    }
}

fn stored_as(dtype: DType) -> Encoding {
    match dtype {
        DType::F32 => Encoding::F32,
        DType::F16 => Encoding::F16,
        _ => Encoding::BF16,
    }
}

fn converted<T: Clone + Default + Send>(
    parts: &[StoredTensor],
    convert: impl Fn(f32) -> T + Sync,
) -> Vec<T> {
    let rows = rows_of(parts);
    let cols = parts[0].cols();
    let mut numbers = vec![T::default(); rows.len() * cols];
    in_parallel(&rows, &mut numbers, (1, cols), |rows, out| {
        let (encoding, bytes) = rows[0];
        let mut row = vec![0.0; cols];
        dequantize(encoding, bytes, &mut row);
        for (out, &x) in out.iter_mut().zip(&row) {
            *out = convert(x);
        }
    });
    numbers
}

/// Encoding and bytes of each row of `parts`.
fn rows_of<'a>(parts: &'a [StoredTensor]) -> Vec<(Encoding, &'a [u8])> {
    let rows = |part: &'a StoredTensor| {
        (0..part.rows()).map(move |row| (part.encoding, part.row_bytes(row)))
    };
    parts.iter().flat_map(rows).collect()
}

/// Calls `fill(rows, out)` for each `count` rows and their `len` places of `out`, on all CPUs.
fn in_parallel<R: Sync, T: Send>(
    rows: &[R],
    out: &mut [T],
    (count, len): (usize, usize),
    fill: impl Fn(&[R], &mut [T]) + Sync,
) {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let share = rows.len().div_ceil(count).div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (rows, out) in rows.chunks(share * count).zip(out.chunks_mut((share * len).max(1))) {
            let fill = &fill;
            scope.spawn(move || {
                for (rows, out) in rows.chunks(count).zip(out.chunks_exact_mut(len)) {
                    fill(rows, out);
                }
            });
        }
    });
}

/// Whole panels; rows that are lacking are zeros.
fn packed(parts: &[StoredTensor], outs: usize, format: Format) -> Vec<u8> {
    let panel_bytes = parts[0].cols() / CHUNK * format.chunk_bytes();
    let mut bytes = vec![0; outs.div_ceil(PANEL) * panel_bytes];
    in_parallel(&rows_of(parts), &mut bytes, (PANEL, panel_bytes), |rows, panel| {
        pack_panel(rows, panel, format);
    });
    bytes
}

fn pack_panel(rows: &[(Encoding, &[u8])], panel: &mut [u8], format: Format) {
    let (block, scales) = match format {
        Format::Q8_0 => (34, 2),
        Format::Q4_1 => (20, 4),
        _ => (18, 2),
    };
    for (lane, (_, row)) in rows.iter().enumerate() {
        let (g, lower) = (lane % 8, lane / 8);
        let chunks = panel.chunks_exact_mut(format.chunk_bytes());
        for (stored, chunk) in row.chunks_exact(block).zip(chunks) {
            let (numbers, rest) =
                chunk.split_at_mut(if format == Format::Q8_0 { 512 } else { 256 });
            for (given, kept) in stored[..scales].chunks_exact(2).zip(rest.chunks_exact_mut(32)) {
                kept[4 * g + 2 * lower..][..2].copy_from_slice(given);
            }
            for t in 0..4 {
                let lane = 4 * g + t;
                if format == Format::Q8_0 {
                    let kept = &mut numbers[16 * lane + 8 * lower..][..8];
                    for (kept, &number) in kept.iter_mut().zip(&stored[2 + 8 * t..]) {
                        *kept = number ^ 0x80; // plus 128
                    }
                } else {
                    let word = eight_nibbles(&stored[scales..], t).to_le_bytes();
                    numbers[8 * lane + 4 * lower..][..4].copy_from_slice(&word);
                }
            }
        }
    }
}

/// Numbers 8t to 8t + 7 of a block, whose low halves of bytes are the first 16: pairs, the first of
/// each in the lower half of the word.
fn eight_nibbles(block: &[u8], t: usize) -> u32 {
    let (bytes, shift) = (&block[t % 2 * 8..][..8], t / 2 * 4);
    let pairs = bytes.chunks_exact(2).enumerate();
    pairs.fold(0, |word, (pair, bytes)| {
        let number = |byte: u8| u32::from(byte >> shift & 15);
        word | number(bytes[0]) << (4 * pair) | number(bytes[1]) << (4 * pair + 16)
    })
}
