//! The ops: shapes have been checked by the methods of [`crate::backend::Backend`].

use candle_core::{DType, Tensor};

use super::batch::{Cut, DevicePlan, TILE, partial_len};
use super::launch::{
    Address, Arguments, AttentionArgs, EmbeddingArgs, GateArgs, GatedActivationArgs, GatherArgs,
    Grid, LinearArgs, RmsNormArgs, RopeArgs, SHARED_BYTES,
};
use super::matrix::{CHUNK, Format, Matrix};
use super::{Cuda, DeviceBatch, Sums, address};
use crate::backend::{AttentionOp, Batch, Heads, LayerKv, RopeOp};
use crate::error::{Error, Result};
use crate::spec::{AttentionSpec, ModelSpec, QkNorm, RopePairing};
use half::bf16;

const ROW_THREADS: u32 = 256;
const ROPE_WARPS: usize = 8;
const ATTENTION_WARPS: usize = 4;
const MERGE_THREADS: u32 = 512;
/// Keys of a step of `prefill`.
const STEP_KEYS: usize = 64;
/// Rows of the weights that a block of `linear` takes, and rows of the input in a tensor-core tile.
const TILE_OUTS: usize = 16;
const TILE_ROWS: usize = 8;
/// Most tiles of the input in a block of `linear`; more rows are for `gemm`. And most that a first cache holds.
const MAX_TILES: usize = 8;
const CACHED_TILES: usize = 4;
const EXACT_WARPS: usize = 4;
/// Widest head that the kernels can hold.
const MAX_HEAD_DIM: usize = 256;
/// Blocks of the attention kernels that a multiprocessor is given, for each key/value head.
const BLOCKS_PER_MULTIPROCESSOR: usize = 8;

impl Cuda {
    /// Queues kernel `name`, of which there is one for each compute type.
    fn launch<A: Arguments>(&self, name: &str, grid: Grid, args: A) -> Result<()> {
        self.queue(&self.typed(name), grid, args)
    }

    /// The kernel of the compute type.
    fn typed(&self, name: &str) -> String {
        let dtype = match self.dtype {
            DType::F32 => "f32",
            DType::F16 => "f16",
            _ => "bf16",
        };
        name.replace("{}", dtype)
    }

    pub(super) fn queue<A: Arguments>(&self, name: &str, grid: Grid, args: A) -> Result<()> {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 {
            return Ok(());
        }
        // SAFETY: the ops below take the addresses from tensors whose shapes have been checked; memory
        // that is freed after this is reused by later work of the same stream only.
        unsafe { self.kernels.launch(&self.stream, name, grid, args) }
    }

    /// Whether there are kernels for a model of these sizes.
    pub(in crate::backend) fn supports(&self, spec: &ModelSpec) -> Result<()> {
        let AttentionSpec { num_heads, head_dim, .. } = spec.attention;
        chunks_of(head_dim)?;
        if self.is_exact() {
            return Ok(());
        }
        check_inputs("a hidden size", spec.hidden_size)?;
        check_inputs("heads", num_heads * head_dim)?;
        check_inputs("an intermediate size", spec.mlp.intermediate_size)
    }

    pub(in crate::backend) fn embedding(&self, table: &Matrix, batch: &Batch) -> Result<Tensor> {
        let out = self.empty((batch.ids.len(), table.cols()), DType::F32)?;
        let encoding = match (table.format, self.dtype) {
            (Format::Dense, DType::F32) => 0,
            (Format::Dense, DType::F16) => 1,
            (Format::Dense, _) => 2,
            (Format::Q8_0, _) => 3,
            (Format::Q4_0, _) => 4,
            (Format::Q4_1, _) => 5,
        };
        let args = EmbeddingArgs {
            table: address(&table.weight)?,
            ids: placed(batch)?.ids()?,
            out: address(&out)?,
            cols: table.cols() as u32,
            encoding,
        };
        self.queue("embedding", Grid::each(batch.ids.len(), ROW_THREADS), args)?;
        Ok(out)
    }

    /// Adds `x` to `residual` in place, where there is one; the norm of the sum.
    pub(in crate::backend) fn add_rms_norm(
        &self,
        residual: &Tensor,
        x: Option<&Tensor>,
        weight: &Tensor,
        eps: f32,
    ) -> Result<Tensor> {
        let out = self.empty(residual.dims(), self.dtype)?;
        let args = RmsNormArgs {
            residual: address(residual)?,
            x: x.map_or(Ok(0), address)?,
            weight: address(weight)?,
            out: address(&out)?,
            cols: residual.dims()[1] as u32,
            eps,
        };
        self.launch("rms_norm_{}", Grid::each(residual.dims()[0], ROW_THREADS), args)?;
        Ok(out)
    }

    /// `out_dtype`: f32 or the compute type.
    pub(in crate::backend) fn linear(
        &self,
        x: &Tensor,
        matrix: &Matrix,
        out_dtype: DType,
    ) -> Result<Tensor> {
        let (rows, outs) = (x.dims()[0], matrix.outs());
        let out = self.empty((rows, outs), out_dtype)?;
        let args = linear_args(x, matrix, &out)?;
        if self.is_exact() {
            let blocks = (outs.div_ceil(EXACT_WARPS) as u32, rows.div_ceil(TILE_ROWS) as u32);
            let grid = Grid { blocks, threads: EXACT_WARPS as u32 * 32, shared_bytes: 0 };
            self.queue("linear_f32", grid, args)?;
            return Ok(out);
        }
        check_inputs("a layer", matrix.cols())?;
        let format = matrix.format;
        if !self.is_few(rows, outs) {
            self.gemm(rows, outs, format, args)?;
            return Ok(out);
        }
        // Half a tile's rows where multiprocessors would be left without, while the input that each block
        // reads is small beside them.
        let is_narrow = format == Format::Dense
            && rows <= TILE_ROWS / 2
            && outs.div_ceil(TILE_OUTS) < self.multiprocessors;
        let (block_outs, lower) = if is_narrow { (8, 0) } else { (TILE_OUTS as u32, 8) };
        self.few_rows(outs, format, LinearArgs { block_outs, lower, ..args })?;
        Ok(out)
    }

    /// `gated_activation` of `linear`, bit for bit, where a kernel does both.
    pub(in crate::backend) fn gated_linear(
        &self,
        x: &Tensor,
        matrix: &Matrix,
    ) -> Result<Option<Tensor>> {
        let (rows, width) = (x.dims()[0], matrix.outs() / 2);
        let is_few = self.is_few(rows, matrix.outs()) && matrix.cols().is_multiple_of(8);
        if self.is_exact() || !is_few || matrix.format != Format::Dense || width <= 8 {
            return Ok(None);
        }
        let out = self.empty((rows, width), self.dtype)?;
        let args = linear_args(x, matrix, &out)?;
        let args = LinearArgs { block_outs: 8, lower: width as u32, ..args };
        self.few_rows(width, matrix.format, args)?;
        Ok(Some(out))
    }

    /// Whether `linear` reads less than `gemm`: each of its blocks reads all rows, which is not for nothing once
    /// they no longer lie in a first cache; `gemm` then needs a block for each multiprocessor.
    fn is_few(&self, rows: usize, outs: usize) -> bool {
        let suits_gemm = outs.div_ceil(64) >= self.multiprocessors;
        rows <= TILE_ROWS * if suits_gemm { CACHED_TILES } else { MAX_TILES }
    }

    /// `linear` of few rows. `outs`: columns of its output.
    fn few_rows(&self, outs: usize, format: Format, args: LinearArgs) -> Result<()> {
        let tiles = (args.rows as usize).div_ceil(TILE_ROWS).next_power_of_two();
        let blocks = outs.div_ceil(args.block_outs as usize);
        let kernel = self.typed(&format!("linear_{{}}_{}_{tiles}", format.name()));
        // Most warps of the kernel, and blocks of so many that a multiprocessor has room for.
        let (most, together) = if tiles <= 2 { (14, 2) } else { (12, 1) };
        #[cfg(feature = "cuda-emulator")]
        assert_eq!(super::emulator::launch_bounds(&kernel), (most * 32, together), "{kernel}");
        let args = match self.sums {
            Sums::Fixed => args,
            // A slice for each warp.
            Sums::Free => LinearArgs { slice: 128 * args.cols.div_ceil(128 * most as u32), ..args },
        };
        let slices = args.cols.div_ceil(args.slice) as usize;
        // Where there are many, small blocks: while some of a multiprocessor end, others load.
        let is_wide = blocks >= 4 * self.multiprocessors;
        let (most, together) = if is_wide { (most / 2, 2 * together) } else { (most, together) };
        let warps = slices.div_ceil(slices.div_ceil(most));
        let tile = tiles * TILE_OUTS * TILE_ROWS * size_of::<f32>();
        // What all blocks of a multiprocessor have is about half of the least that one has.
        let rounds = (SHARED_BYTES as usize / together / tile - 1) / warps;
        let slots = slices.min(rounds.max(1) * warps);
        let shared = (slots + 1) * tile;
        debug_assert!(shared <= self.shared_bytes, "tiles and warps are few enough");
        let grid = Grid {
            blocks: (blocks as u32, 1),
            threads: warps as u32 * 32,
            shared_bytes: shared as u32,
        };
        let args = LinearArgs { slots: slots as u32, ..args };
        self.queue(&kernel, grid, args)
    }

    /// `linear` of many rows, in the blocks that are done first.
    fn gemm(&self, rows: usize, outs: usize, format: Format, args: LinearArgs) -> Result<()> {
        let blocks = |block: GemmBlock| (rows.div_ceil(block.rows), outs.div_ceil(block.outs));
        // As if a multiprocessor had one block at a time.
        let time = |block: GemmBlock| {
            let (x, y) = blocks(block);
            (x * y).div_ceil(self.multiprocessors) * block.rows * block.outs * block.slowness
        };
        let (large, small) = (GemmBlock::large(format), GemmBlock::SMALL);
        let block = if time(large) <= time(small) { large } else { small };
        let (x, y) = blocks(block);
        let grid = Grid {
            blocks: (x as u32, y as u32),
            threads: block.threads,
            shared_bytes: block.shared_bytes(format) as u32,
        };
        let slice = match self.sums {
            Sums::Fixed => args.slice,
            Sums::Free => args.cols.next_multiple_of(CHUNK as u32),
        };
        let args = LinearArgs { slice, ..args };
        self.launch(&format!("gemm_{{}}_{}_{}", format.name(), block.rows), grid, args)
    }

    pub(in crate::backend) fn gated_activation(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, width) = (x.dims()[0], x.dims()[1] / 2);
        let out = self.empty((rows, width), self.dtype)?;
        let args = GatedActivationArgs { x: address(x)?, out: address(&out)?, width: width as u32 };
        let grid = Grid::shares(rows, width, 4 * ROW_THREADS as usize, ROW_THREADS);
        self.launch("gated_activation_{}", grid, args)?;
        Ok(out)
    }

    pub(in crate::backend) fn gate_attention(
        &self,
        out: &Tensor,
        qkv: &Tensor,
        offset: usize,
    ) -> Result<()> {
        let args = GateArgs {
            out: address(out)?,
            gate: address(qkv)?,
            width: out.dims()[1] as u32,
            gate_width: qkv.dims()[1] as u32,
            offset: offset as u32,
        };
        let (rows, width) = (out.dims()[0], out.dims()[1]);
        let grid = Grid::shares(rows, width, ROW_THREADS as usize, ROW_THREADS);
        self.launch("gate_attention_{}", grid, args)
    }

    pub(in crate::backend) fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let out = self.empty((rows.len(), x.dims()[1]), x.dtype())?;
        let bytes = x.dims()[1] * x.dtype().size_in_bytes();
        if !bytes.is_multiple_of(4) {
            return Err(Error::unsupported(format!(
                "on a GPU, rows must be a multiple of 4 bytes; given: {bytes}"
            )));
        }
        if rows.is_empty() {
            return Ok(out);
        }
        let rows = self.upload(rows)?;
        let args = GatherArgs {
            x: address(x)?,
            rows: address(&rows)?,
            out: address(&out)?,
            words: bytes as u32 / 4,
        };
        self.queue("gather_rows", Grid::each(rows.elem_count(), ROW_THREADS), args)?;
        Ok(out)
    }

    pub(in crate::backend) fn rope_and_cache(
        &self,
        qkv: &Tensor,
        heads: Heads,
        op: &RopeOp,
        kv: &LayerKv,
        batch: &Batch,
    ) -> Result<()> {
        let placed = placed(batch)?;
        let (keys, values) = pages(kv)?;
        let norm = |weight: &Option<Tensor>| weight.as_ref().map_or(Ok(0), address);
        let args = RopeArgs {
            qkv: address(qkv)?,
            cos: address(&op.cos)?,
            sin: address(&op.sin)?,
            q_norm: norm(&op.q_norm)?,
            k_norm: norm(&op.k_norm)?,
            positions: placed.positions()?,
            slots: placed.slots()?,
            keys,
            values,
            heads: heads.num_heads as u32,
            kv_heads: heads.num_kv_heads as u32,
            dim: heads.head_dim as u32,
            width: qkv.dims()[1] as u32,
            page_dim: page_dim(heads) as u32,
            adjacent: (op.pairing == RopePairing::Adjacent).into(),
            qk_norm: match op.qk_norm {
                QkNorm::None => 0,
                QkNorm::BeforeRope => 1,
                QkNorm::AfterRope => 2,
            },
            eps: op.eps,
        };
        let all_heads = heads.num_heads + 2 * heads.num_kv_heads;
        let grid = Grid::shares(qkv.dims()[0], all_heads, ROPE_WARPS, ROPE_WARPS as u32 * 32);
        self.launch("rope_and_cache_{}", grid, args)
    }

    pub(in crate::backend) fn paged_attention(
        &self,
        qkv: &Tensor,
        heads: Heads,
        op: AttentionOp,
        kv: &LayerKv,
        batch: &Batch,
    ) -> Result<Tensor> {
        let dim = heads.head_dim;
        let out = self.empty((qkv.dims()[0], heads.num_heads * dim), self.dtype)?;
        let placed = placed(batch)?;
        let plan = placed.plan(op.window)?;
        let partial = self.empty((plan.num_partials, partial_len(heads)), DType::F32)?;
        let (keys, values) = pages(kv)?;
        let (num_items, items) = plan.items;
        let args = AttentionArgs {
            qkv: address(qkv)?,
            keys,
            values,
            out: address(&out)?,
            partial: address(&partial)?,
            positions: placed.positions()?,
            blocks: placed.blocks()?,
            items,
            num_items,
            heads: heads.num_heads as u32,
            kv_heads: heads.num_kv_heads as u32,
            dim: dim as u32,
            width: qkv.dims()[1] as u32,
            page_dim: page_dim(heads) as u32,
            window: op.window.unwrap_or(0) as u32,
            scale: op.scale * std::f32::consts::LOG2_E,
        };
        self.attend(heads, &plan, args)?;
        Ok(out)
    }

    /// Launches what the plan has work for.
    fn attend(&self, heads: Heads, plan: &DevicePlan, args: AttentionArgs) -> Result<()> {
        // Blocks share the items: there may be fewer than a captured launch has room for.
        let grid = |count: usize, threads| Grid {
            blocks: (
                count.min(BLOCKS_PER_MULTIPROCESSOR * self.multiprocessors) as u32,
                heads.num_kv_heads as u32,
            ),
            threads,
            shared_bytes: 0,
        };
        let chunks = chunks_of(heads.head_dim)?;
        if self.is_exact() {
            return self.queue("attention_f32", grid(plan.num_items, 32), args);
        }
        let of_tiles = |count| grid(count, ATTENTION_WARPS as u32 * 32);
        self.launch(&format!("attention_{{}}_{chunks}"), of_tiles(plan.num_items), args)?;
        let with = |(num_items, items)| AttentionArgs { items, num_items, ..args };
        if plan.num_partials > 0 {
            // Only where blocks are too few are many tiles cut.
            let most = (2 * self.multiprocessors).div_ceil(heads.num_kv_heads);
            let grid = grid(plan.num_merges.min(most), MERGE_THREADS);
            self.launch("merge_{}", grid, with(plan.merges))?;
        }
        if plan.num_prefills > 0 {
            // Keys and values of two steps, and the queries.
            let rows = 2 * 2 * STEP_KEYS + ATTENTION_WARPS * TILE;
            let shared_bytes = (rows * 32 * chunks * size_of::<bf16>()) as u32;
            let grid = Grid { shared_bytes, ..of_tiles(plan.num_prefills) };
            self.launch(&format!("prefill_{{}}_{chunks}"), grid, with(plan.prefills))?;
        }
        Ok(())
    }

    /// How attention with these heads is cut into blocks.
    pub(super) fn cut(&self, heads: Heads) -> Cut {
        let blocks_wanted = if self.is_exact() { 0 } else { 2 * self.multiprocessors };
        let prefill_tiles = match chunks_of(heads.head_dim) {
            _ if self.is_exact() => 0,
            Ok(1..=4) => ATTENTION_WARPS,
            _ => 0,
        };
        Cut { blocks_wanted, prefill_tiles }
    }
}

/// A block of `gemm`. Its kernel is named by its rows of the input.
#[derive(Clone, Copy)]
struct GemmBlock {
    rows: usize,
    outs: usize,
    threads: u32,
    stages: usize,
    /// Time for an output, relative to that in a large block; a guess until it is measured.
    slowness: usize,
}

impl GemmBlock {
    const SMALL: Self = Self { rows: 64, outs: 64, threads: 4 * 32, stages: 6, slowness: 2 };

    fn large(format: Format) -> Self {
        let outs = if format == Format::Dense { 192 } else { 128 };
        Self { rows: 128, outs, threads: 8 * 32, stages: 4, slowness: 1 }
    }

    /// For the stages, and for the outputs in their place.
    fn shared_bytes(self, format: Format) -> usize {
        let row = CHUNK * size_of::<bf16>();
        let weights = match format {
            Format::Dense => self.outs * row,
            _ => self.outs / TILE_OUTS * format.chunk_bytes(),
        };
        let stages = self.stages * (weights + self.rows * row);
        stages.max(self.rows * (self.outs + 4) * size_of::<f32>())
    }
}

/// The batch in device memory.
fn placed(batch: &Batch) -> Result<&DeviceBatch> {
    batch
        .placement
        .cuda
        .as_ref()
        .ok_or_else(|| Error::bug("the batch was not placed on the device"))
}

/// Of a layer whose blocks have whole tiles of its rows.
fn linear_args(x: &Tensor, matrix: &Matrix, out: &Tensor) -> Result<LinearArgs> {
    Ok(LinearArgs {
        weight: address(&matrix.weight)?,
        x: address(x)?,
        bias: matrix.bias.as_ref().map_or(Ok(0), address)?,
        out: address(out)?,
        rows: x.dims()[0] as u32,
        cols: matrix.cols() as u32,
        outs: matrix.outs() as u32,
        slice: slice_of(matrix.cols()) as u32,
        out_is_f32: (out.dtype() == DType::F32).into(),
        block_outs: TILE_OUTS as u32,
        lower: 8,
        slots: 0,
    })
}

/// Columns of a slice of `linear`: at most 64 slices, each a multiple of what a warp loads at once.
fn slice_of(cols: usize) -> usize {
    128 * cols.div_ceil(128 * 64).max(1)
}

/// 32-column chunks of the attention kernel that holds heads of `dim`.
fn chunks_of(dim: usize) -> Result<usize> {
    [1, 2, 3, 4, 6, 8].into_iter().find(|chunks| dim <= 32 * chunks).ok_or_else(|| {
        Error::unsupported(format!("on a GPU, heads are at most {MAX_HEAD_DIM} wide; given: {dim}"))
    })
}

/// Tensor cores are fed eight inputs of a layer at once.
fn check_inputs(what: &str, inputs: usize) -> Result<()> {
    if inputs.is_multiple_of(8) {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "on a GPU, layers have a multiple of 8 inputs, but in float32; given: {what} of {inputs}"
    )))
}

/// Columns of a head in the pages of the cache.
pub(in crate::backend) fn page_dim(heads: Heads) -> usize {
    heads.head_dim.next_multiple_of(8)
}

/// Keys and values of a layer.
fn pages(kv: &LayerKv) -> Result<(Address, Address)> {
    let keys = address(&kv.pages)?;
    let half = kv.pages.elem_count() / 2 * kv.pages.dtype().size_in_bytes();
    Ok((keys, keys + half as u64))
}
