//! NVIDIA GPUs: our kernels on candle's CUDA device.
//!
//! Activations are of the compute type (bf16, f16 or f32), the residual stream and logits are f32.
//! All work of a backend is queued on one stream of its own, in order.
#![allow(unsafe_code)] // Launches, device memory and the driver's functions.

mod batch;
mod draw;
mod driver;
#[cfg(feature = "cuda-emulator")]
pub mod emulator;
mod graph;
mod launch;
mod matrix;
mod memory;
mod ops;
mod staging;

use std::sync::{Arc, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr};
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::{DType, Device, Layout, Shape, Storage, Tensor};
use half::{bf16, f16};

use super::{Batch, Heads, StepSizes};
use crate::error::{Error, ErrorKind, Result};
pub(super) use batch::DeviceBatch;
pub use draw::PendingDraws;
pub use graph::DecodeGraphs;
use launch::{Address, Kernels};
pub(super) use matrix::Matrix;
pub(super) use ops::page_dim;
use staging::Staging;

/// What the driver takes when a kernel first runs, and for what it and the pool round up; a guess.
const DRIVER_BYTES: usize = 128 << 20;

/// How linear layers cut what they sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sums {
    /// The same for any number of rows.
    Fixed,
    /// As suits the kernel.
    Free,
}

/// A GPU with our kernels.
pub(super) struct Cuda {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    kernels: Kernels,
    staging: Staging,
    /// Type of activations, weights and cache.
    dtype: DType,
    sums: Sums,
    multiprocessors: usize,
    /// Dynamic shared memory that a block may have, in bytes.
    shared_bytes: usize,
}

impl Cuda {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] without a driver, without such a GPU, or when it is too old.
    pub(super) fn open(ordinal: usize, dtype: DType, sums: Sums) -> Result<Self> {
        driver::load()?;
        let unavailable = |error: candle_core::Error| {
            Error::from(error).context(format!("GPU {ordinal} cannot be used"))
        };
        let device = {
            let _alone = graph::CAPTURE.lock().unwrap_or_else(PoisonError::into_inner);
            CudaDevice::new_with_stream(ordinal).map_err(unavailable)?
        };
        // SAFETY: everything of this device runs on its one stream.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        let attribute = |which| stream.context().attribute(which).map_err(failed);
        let multiprocessors =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let kernels = Kernels::load(stream.context(), shared as u32)?;
        let shared_bytes = shared as usize;
        let staging = Staging::default();
        Ok(Self { device, stream, kernels, staging, dtype, sums, multiprocessors, shared_bytes })
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    /// Bytes that weights (in bytes) and steps leave of `utilization` of the memory.
    pub(super) fn memory_left(
        &self,
        utilization: f64,
        weights: usize,
        steps: StepSizes,
    ) -> Result<usize> {
        let (free, total) = self.memory()?;
        let share = ((total as f64 * utilization) as usize).min(free);
        // No longer than what there is room for.
        let room = share.saturating_sub(weights) / steps.bytes_per_token.max(1);
        let sequences = (steps.sequences.0, steps.sequences.1.min(room));
        let steps = StepSizes { sequences, ..steps };
        let rope_tables = sequences.1 * steps.heads.head_dim;
        let numbers = steps.activations + rope_tables + batch::partials(steps.heads);
        let needed =
            weights + numbers * size_of::<f32>() + DecodeGraphs::bytes(steps) + DRIVER_BYTES;
        share.checked_sub(needed).filter(|&left| left > 0).ok_or_else(|| {
            let message = format!(
                "the model needs {needed} bytes of GPU memory beside its cache; {share} may be used \
                 ({free} of {total} are free, gpu_memory_utilization is {utilization})"
            );
            Error::new(ErrorKind::OutOfMemory, message)
        })
    }

    /// Free and total bytes of the GPU's memory.
    fn memory(&self) -> Result<(usize, usize)> {
        self.stream.context().mem_get_info().map_err(failed)
    }

    /// Memory that nobody has written yet.
    fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        // SAFETY: the numbers lie on the device, where kernels and copies write them before anybody reads them.
        unsafe { Tensor::empty(shape, dtype, &self.device()) }.map_err(|error| self.explain(error))
    }

    /// A vector in device memory.
    fn upload(&self, numbers: &[u32]) -> Result<Tensor> {
        let tensor = self.empty(numbers.len(), DType::U32)?;
        self.staging.copy_in(&self.stream, numbers, address(&tensor)?)?;
        Ok(tensor)
    }

    /// Puts a batch into device memory, with plans for attention with these windows.
    pub(super) fn place(
        &self,
        batch: &Batch,
        heads: Heads,
        windows: &[Option<usize>],
    ) -> Result<DeviceBatch> {
        let mut distinct = windows.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let rows = batch.positions.len();
        let (words, places) = batch::words(self, batch, rows, heads, &distinct, None);
        let placed = DeviceBatch::new(self.upload(&words)?, places);
        self.follow(batch, &placed)?;
        Ok(placed)
    }

    fn is_exact(&self) -> bool {
        self.dtype == DType::F32
    }

    pub(super) fn zeros(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::zeros(shape, self.dtype, &self.device()).map_err(|error| self.explain(error))
    }

    /// Says so when it was memory that was lacking.
    pub(super) fn explain(&self, error: candle_core::Error) -> Error {
        let Some(bytes) = memory::refused(self.stream.cu_stream().cast()) else {
            return error.into();
        };
        let message = match self.memory() {
            Ok((free, total)) => {
                format!("the GPU has no {bytes} bytes left: {free} of its {total} bytes are free")
            }
            Err(_) => format!("the GPU has no {bytes} bytes left"),
        };
        Error::new(ErrorKind::OutOfMemory, message)
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Device, error.to_string())
}

/// Where the numbers of a contiguous tensor lie in device memory.
fn address(tensor: &Tensor) -> Result<Address> {
    match tensor.dtype() {
        DType::F32 => address_of::<f32>(tensor),
        DType::BF16 => address_of::<bf16>(tensor),
        DType::F16 => address_of::<f16>(tensor),
        _ => address_of::<u32>(tensor),
    }
}

fn address_of<T: CudaDType + candle_core::WithDType>(tensor: &Tensor) -> Result<Address> {
    let (storage, layout): (_, &Layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::bug("a tensor is on another device than the backend"));
    };
    let slice = storage.as_cuda_slice::<T>()?;
    let (start, _ordered) = slice.device_ptr(slice.stream());
    Ok(start + (layout.start_offset() * size_of::<T>()) as u64)
}
