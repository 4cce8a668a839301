//! The CUDA libraries, found at run time.
//!
//! candle and cudarc call CUDA's functions by name, as if they were linked. Here each name is a jump
//! through a slot, and [`load`] fills the slots: from the driver, with our own stream-ordered memory
//! ([`super::memory`]), and with stand-ins for cuBLAS and cuRAND, of which candle makes a handle and a
//! generator with every device and which nobody uses. So the extension loads on any machine, and only
//! the driver is needed to compute. Should candle offer dynamic loading, this file goes.

use std::ffi::{CStr, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys;

use super::memory;
use crate::error::{Error, ErrorKind, Result};

/// The driver of Linux, whatever its version.
const DRIVER: &CStr = c"libcuda.so.1";

/// As `cuDriverGetVersion` gives it.
const CUDA_VERSION: c_int = 13_000;

/// A function that somebody calls by name.
struct Slot {
    name: &'static CStr,
    target: &'static AtomicPtr<c_void>,
}

impl Slot {
    fn fill(&self, function: *mut c_void) {
        self.target.store(function, Ordering::Release);
    }
}

/// Defines the functions of a library as jumps, and the list of their slots.
macro_rules! jumps {
    ($list:ident in $slots:ident: $($name:ident)*) => {
        #[allow(non_upper_case_globals)]
        mod $slots {
            use super::{AtomicPtr, c_void, not_loaded};
            $(pub(super) static $name: AtomicPtr<c_void> =
                AtomicPtr::new(not_loaded as *mut c_void);)*
        }

        const $list: &[Slot] = &[$(Slot {
            name: match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("a name has no zero"),
            },
            target: &$slots::$name,
        }),*];

        $(
            // SAFETY: nobody else defines the name: the build script's empty archives stand in for the
            // libraries. The jump leaves registers and stack as the caller set them up.
            #[allow(non_snake_case, unreachable_pub)]
            #[unsafe(no_mangle)]
            #[unsafe(naked)]
            pub unsafe extern "C" fn $name() {
                #[cfg(target_arch = "x86_64")]
                core::arch::naked_asm!("jmp qword ptr [rip + {slot}]", slot = sym $slots::$name);
                #[cfg(target_arch = "aarch64")]
                core::arch::naked_asm!(
                    "adrp x16, {slot}",
                    "ldr x16, [x16, :lo12:{slot}]",
                    "br x16",
                    slot = sym $slots::$name
                );
            }
        )*
    };
}

jumps! { DRIVER_SLOTS in driver:
    cuInit cuDriverGetVersion cuDeviceGet cuDeviceGetCount cuDeviceGetName cuDeviceGetAttribute
    cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease_v2
    cuCtxGetCurrent cuCtxSetCurrent cuCtxSynchronize cuCtxDestroy_v2
    cuModuleLoad cuModuleLoadData cuModuleGetFunction cuModuleUnload
    cuFuncSetAttribute cuLaunchKernel cuLaunchKernelEx
    cuMemAlloc_v2 cuMemFree_v2 cuMemGetInfo_v2 cuMemHostAlloc cuMemFreeHost
    cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2 cuMemcpyPeerAsync cuMemsetD8Async
    cuStreamCreate cuStreamSynchronize cuStreamWaitEvent
    cuStreamIsCapturing cuStreamBeginCapture_v2 cuStreamEndCapture
    cuGraphInstantiateWithFlags cuGraphLaunch cuGraphUpload cuGraphDestroy cuGraphExecDestroy
    cuEventCreate cuEventRecord cuEventSynchronize cuEventQuery cuEventDestroy_v2
    cuGetErrorName cuGetErrorString
}

jumps! { MEMORY_SLOTS in memory_slots: cuMemAllocAsync cuMemFreeAsync cuStreamDestroy_v2 }

jumps! { CREATE_SLOTS in create: cublasCreate_v2 curandCreateGenerator }

jumps! { HANDLE_SLOTS in handle:
    cublasDestroy_v2 cublasSetStream_v2
    curandDestroyGenerator curandSetStream curandSetPseudoRandomGeneratorSeed
}

jumps! { UNUSED_SLOTS in unused: cublasGemmStridedBatchedEx cublasDgemmStridedBatched }

extern "C" fn not_loaded() {
    eprintln!("a CUDA function was called before the driver was loaded");
    std::process::abort();
}

/// Makes a handle that nobody looks into.
///
/// # Safety
/// `handle` must be valid for a write.
unsafe extern "C" fn make_handle(handle: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { handle.write(std::ptr::dangling_mut()) };
    0
}

/// Success, to what is done with such a handle.
extern "C" fn accept() -> c_int {
    0
}

/// `CUBLAS_STATUS_NOT_SUPPORTED`.
extern "C" fn refuse() -> c_int {
    15
}

/// Makes CUDA's functions callable. Does nothing when they are.
///
/// # Errors
/// [`ErrorKind::Device`] when there is no driver, or one that lacks a function.
pub(super) fn load() -> Result<()> {
    static LOADED: Mutex<bool> = Mutex::new(false);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if *loaded {
        return Ok(());
    }
    let library = Library::open(DRIVER)?;
    let functions: Vec<_> =
        DRIVER_SLOTS.iter().map(|slot| library.function(slot.name)).collect::<Result<_>>()?;
    let destroy_stream = library.function(MEMORY_SLOTS[2].name)?;
    for (slot, function) in DRIVER_SLOTS.iter().zip(functions) {
        slot.fill(function);
    }
    memory::DESTROY_STREAM.store(destroy_stream, Ordering::Release);
    MEMORY_SLOTS[0].fill(memory::alloc_async as *mut c_void);
    MEMORY_SLOTS[1].fill(memory::free_async as *mut c_void);
    MEMORY_SLOTS[2].fill(memory::destroy_stream as *mut c_void);
    for (slots, answer) in [
        (CREATE_SLOTS, make_handle as *mut c_void),
        (HANDLE_SLOTS, accept as *mut c_void),
        (UNUSED_SLOTS, refuse as *mut c_void),
    ] {
        for slot in slots {
            slot.fill(answer);
        }
    }
    check_version()?;
    *loaded = true;
    Ok(())
}

/// The kernels are of CUDA 13: older drivers cannot read them.
fn check_version() -> Result<()> {
    let mut version = 0;
    // SAFETY: the slot has been filled; the driver writes a number.
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    if status != sys::CUresult::CUDA_SUCCESS {
        return Err(unavailable(format!(
            "the NVIDIA driver does not tell its version: {status:?}"
        )));
    }
    if version < CUDA_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(unavailable(format!(
            "the NVIDIA driver is too old: it is for CUDA {major}.{minor}; needed: one for CUDA 13.0 or newer \
             (version 580)"
        )));
    }
    Ok(())
}

/// An open library. Never closed: its functions stay in the slots.
#[cfg(not(feature = "cuda-emulator"))]
struct Library {
    handle: *mut c_void,
}

#[cfg(not(feature = "cuda-emulator"))]
impl Library {
    fn open(name: &'static CStr) -> Result<Self> {
        // SAFETY: the driver's own start-up code runs here, as in every program that uses CUDA.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: after a failure `dlerror` gives a string that lives until the next call.
            let reason = unsafe { CStr::from_ptr(libc::dlerror()) };
            return Err(unavailable(format!(
                "no NVIDIA driver: {} was not found ({})",
                name.to_string_lossy(),
                reason.to_string_lossy()
            )));
        }
        Ok(Self { handle })
    }

    fn function(&self, name: &CStr) -> Result<*mut c_void> {
        // SAFETY: the handle is of an open library.
        let function = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        if function.is_null() {
            return Err(unavailable(format!(
                "the NVIDIA driver is too old: it has no {}; needed: one for CUDA 13.0 or newer (version 580)",
                name.to_string_lossy()
            )));
        }
        Ok(function)
    }
}

/// The emulated driver, in place of a real one.
#[cfg(feature = "cuda-emulator")]
struct Library;

#[cfg(feature = "cuda-emulator")]
impl Library {
    fn open(_name: &'static CStr) -> Result<Self> {
        if std::env::var_os("ASTRAI_NO_EMULATED_GPU").is_some() {
            return Err(unavailable("no NVIDIA driver: the emulated one is switched off".into()));
        }
        Ok(Self)
    }

    #[expect(clippy::unused_self, reason = "as for a library that was opened")]
    fn function(&self, name: &CStr) -> Result<*mut c_void> {
        unsafe extern "C" {
            fn emulated_driver(name: *const std::ffi::c_char) -> *mut c_void;
        }
        // SAFETY: looks the name up in a table.
        let function = unsafe { emulated_driver(name.as_ptr()) };
        if function.is_null() {
            return Err(Error::bug(format!(
                "the emulated driver has no {}",
                name.to_string_lossy()
            )));
        }
        Ok(function)
    }
}

fn unavailable(message: String) -> Error {
    Error::new(ErrorKind::Device, message)
}
