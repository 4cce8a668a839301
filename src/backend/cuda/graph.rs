//! CUDA graphs of steps in which every sequence decodes one token.
//!
//! A graph has a fixed number of rows; a step takes the next larger one and pads. All that differs from
//! step to step lies in one buffer of device memory, refreshed by one copy. A graph
//! is captured when a step of its size has run once, so nearly all memory that it needs is there.
//!
//! What a graph leaves in its intermediate buffers is dead after the step, so all graphs and all other
//! steps share them. Nothing that outlives a step may be allocated after the first capture; but for the tokens that a
//! step draws, which are copied out, and copied to where the next step looks for them, before that is launched.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUresult::{
    CUDA_ERROR_OUT_OF_MEMORY as NO_MEMORY, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED as CAPTURE_ENDED,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED as CAPTURE_REFUSED,
};
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, DriverError};
use candle_core::{DType, Tensor};

use super::batch::{DeviceBatch, Places, PlanSize, words};
use super::{Cuda, address, failed, memory};
use crate::backend::{Batch, Heads, Placement, Run, StepSizes};
use crate::config::BLOCK_SIZE;
use crate::error::{Error, ErrorKind, Result};

/// Steps of more rows are launched kernel by kernel, which they are long enough to hide.
const MAX_ROWS: usize = 512;
/// Captures that may come to nothing before there are no more.
const MAX_FAILURES: usize = 16;

/// Held while a graph is captured, and while a device is opened: that waits for the whole GPU.
pub(super) static CAPTURE: Mutex<()> = Mutex::new(());

/// What all graphs share, and the graphs by their number of rows.
pub struct DecodeGraphs {
    cuda: Arc<Cuda>,
    heads: Heads,
    windows: Vec<Option<usize>>,
    /// Most rows, and the longest sequence.
    rows: usize,
    positions: usize,
    numbers: Tensor,
    graphs: HashMap<usize, Graph>,
    /// Captures that came to nothing.
    failures: usize,
}

struct Graph {
    captured: CudaGraph,
    logits: Tensor,
}

impl DecodeGraphs {
    /// Bytes that graphs keep at most: the logits of each, and block tables.
    pub(super) fn bytes(steps: StepSizes) -> usize {
        let (sequences, positions) = steps.sequences;
        let largest = padded(sequences.min(MAX_ROWS));
        let rows: usize = (1..=largest).filter(|&rows| rows == padded(rows)).sum();
        let blocks = largest.saturating_mul(positions.div_ceil(BLOCK_SIZE));
        let numbers = rows.saturating_mul(steps.vocab_size).saturating_add(blocks);
        numbers.saturating_mul(size_of::<f32>())
    }

    /// For up to `rows` sequences of up to `positions` tokens, with the attention windows of all layers.
    pub(in crate::backend) fn new(
        cuda: &Arc<Cuda>,
        heads: Heads,
        windows: &[Option<usize>],
        (rows, positions): (usize, usize),
    ) -> Result<Self> {
        let mut distinct = windows.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let rows = padded(rows.min(MAX_ROWS));
        let sizes = distinct.iter().map(|&w| (w, PlanSize::of_decode(rows, positions, heads)));
        let size = Places::new(rows, sizes).words(rows * positions.div_ceil(BLOCK_SIZE));
        let numbers = cuda.empty(size, DType::U32)?;
        let (cuda, graphs) = (cuda.clone(), HashMap::new());
        Ok(Self { cuda, heads, windows: distinct, rows, positions, numbers, graphs, failures: 0 })
    }

    /// The logits `[rows, vocab]` of `batch`, every row of which is a sequence of its own and wants them.
    /// `forward` queues the whole pass over a batch.
    pub fn run(
        &mut self,
        batch: Batch,
        mut forward: impl FnMut(&Batch) -> Result<Option<Tensor>>,
    ) -> Result<Option<Tensor>> {
        let rows = batch.ids.len();
        if rows == 0 || rows > self.rows {
            let placed = self.cuda.place(&batch, self.heads, &self.windows)?;
            return forward(&Batch { placement: Placement { cuda: Some(placed) }, ..batch });
        }
        let batch = self.place(pad(batch), rows)?;
        if let Some(graph) = self.graphs.get(&batch.ids.len()) {
            graph.captured.launch().map_err(failed)?;
            return Ok(Some(graph.logits.narrow(0, 0, rows)?));
        }
        let logits = forward(&batch)?;
        if self.failures < MAX_FAILURES {
            self.capture(&batch, forward)?;
        }
        logits.map(|logits| Ok(logits.narrow(0, 0, rows)?)).transpose()
    }

    /// Copies what the kernels need to know to where the graphs look for it.
    fn place(&mut self, mut batch: Batch, rows: usize) -> Result<Batch> {
        let size = PlanSize::of_decode(batch.ids.len(), self.positions, self.heads);
        let places = Places::new(batch.ids.len(), self.windows.iter().map(|&w| (w, size)));
        let (words, places) =
            words(&self.cuda, &batch, rows, self.heads, &self.windows, Some(&places));
        let room = self.numbers.elem_count();
        if words.len() > room {
            let len = words.len();
            return Err(Error::bug(format!("a decode step has {len} words, with room for {room}")));
        }
        self.cuda.staging.copy_in(&self.cuda.stream, &words, address(&self.numbers)?)?;
        let placed = DeviceBatch::new(self.numbers.clone(), places);
        self.cuda.follow(&batch, &placed)?;
        batch.placement = Placement { cuda: Some(placed) };
        Ok(batch)
    }

    fn capture(
        &mut self,
        batch: &Batch,
        mut forward: impl FnMut(&Batch) -> Result<Option<Tensor>>,
    ) -> Result<()> {
        let stream = &self.cuda.stream;
        let _alone = CAPTURE.lock().unwrap_or_else(PoisonError::into_inner);
        // A step may take its first memory here, which other modes forbid.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        stream.begin_capture(mode).map_err(failed)?;
        memory::begin_capture(stream.cu_stream().cast());
        let logits = forward(batch);
        let captured = stream.end_capture(CUgraphInstantiate_flags(0));
        let captured = captured.and_then(|captured| {
            captured.as_ref().map_or(Ok(()), CudaGraph::upload)?;
            Ok(captured)
        });
        let is_kept = matches!((&logits, &captured), (Ok(Some(_)), Ok(Some(_))));
        memory::end_capture(stream.cu_stream().cast(), is_kept);
        match (logits, captured) {
            (Ok(Some(logits)), Ok(Some(captured))) => {
                self.graphs.insert(batch.ids.len(), Graph { captured, logits });
            }
            // Somebody else in the process may have waited for the whole GPU, which ends a capture. Or there is no
            // memory. The step itself has run: it goes without a graph.
            (_, Err(DriverError(CAPTURE_ENDED | CAPTURE_REFUSED | NO_MEMORY))) => self.give_up(),
            (Err(error), _) if error.kind() == ErrorKind::OutOfMemory => self.give_up(),
            (logits, captured) => {
                logits?;
                captured.map_err(failed)?;
            }
        }
        Ok(())
    }

    fn give_up(&mut self) {
        self.failures += 1;
        let stream = self.cuda.stream.cu_stream().cast();
        let _ = memory::refused(stream);
        memory::trim(stream);
    }
}

/// Rows of the graph for a step of `rows`: each count up to 8, then powers of two.
fn padded(rows: usize) -> usize {
    if rows <= 8 { rows } else { rows.next_power_of_two() }
}

/// Adds rows of padding, which look at the first sequence and write nothing.
fn pad(mut batch: Batch) -> Batch {
    let blocks = batch.runs[0].blocks.clone();
    for row in batch.ids.len()..padded(batch.ids.len()) {
        batch.ids.push(0);
        batch.positions.push(0);
        batch.runs.push(Run { rows: row..row + 1, blocks: blocks.clone() });
    }
    batch
}

impl std::fmt::Debug for DecodeGraphs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DecodeGraphs({}, {} failures)", self.graphs.len(), self.failures)
    }
}
