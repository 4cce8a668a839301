//! Nothing, but for the feature `cuda`: then what its one wheel for machines with and without CUDA needs.
//!
//! candle's `cuda` feature asks the linker for libcuda, libcublas, libcurand, libnvrtc and libcudart.
//! Empty archives of those names stand in for them (and the toolkit's static cudart for the last), so
//! that nothing of CUDA is needed when the library is loaded: `backend/cuda/driver.rs` defines what is
//! called, and finds the libraries at run time. Should candle offer `dynamic-loading`, this goes.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An `ar` archive without members.
const EMPTY_ARCHIVE: &[u8] = b"!<arch>\n";

/// The code that the fatbins hold: Ampere and Ada run the first, Hopper the second, and the driver
/// compiles the last for what comes after.
const TARGETS: [&str; 3] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_90,code=compute_90",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    if env::var("CARGO_CFG_TARGET_OS")? != "linux" {
        return Err("the feature `cuda` is for Linux".into());
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let toolkit = toolkit()?;
    stand_in_for_cuda(&out, &toolkit)?;
    compile_kernels(&out, &toolkit.join("bin/nvcc"))?;
    #[cfg(feature = "cuda-emulator")]
    compile_emulator();
    Ok(())
}

/// Makes a fatbin of each `kernels/*.cu`.
fn compile_kernels(out: &Path, nvcc: &Path) -> Result<(), Box<dyn Error>> {
    let folder = Path::new("src/backend/cuda/kernels");
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut running = Vec::new();
    for entry in fs::read_dir(folder)? {
        let source = entry?.path();
        if source.extension().is_some_and(|extension| extension == "cu") {
            let target = out.join(source.file_stem().ok_or("no name")?).with_extension("fatbin");
            let mut command = Command::new(nvcc);
            command.args(["-std=c++17", "-O3", "-fatbin", "--threads=2", "-o"]).arg(target);
            command.args(TARGETS.map(|target| format!("-gencode={target}"))).arg(&source);
            running.push((source, command.spawn()?));
        }
    }
    for (source, mut compiler) in running {
        if !compiler.wait()?.success() {
            return Err(format!("nvcc failed on {}", source.display()).into());
        }
    }
    Ok(())
}

/// The device, the driver and the kernels, for the host.
#[cfg(feature = "cuda-emulator")]
fn compile_emulator() {
    println!("cargo:rerun-if-changed=src/backend/cuda/emulator");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        // Numbers are read as bytes and bytes as numbers, and products are rounded as they are written.
        .flags(["-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas"])
        .flag("-U_FORTIFY_SOURCE")
        // A GPU reads and writes numbers only at multiples of their size. What is elsewhere traps.
        .flags(["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"])
        .file("src/backend/cuda/emulator/unit.cpp")
        .compile("emulator");
}

/// The folder of the CUDA toolkit.
fn toolkit() -> Result<PathBuf, Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let home = env::var_os("CUDA_HOME").map_or_else(|| "/usr/local/cuda".into(), PathBuf::from);
    if home.join("bin/nvcc").is_file() {
        return Ok(home);
    }
    let given = home.display();
    Err(format!("CUDA_HOME must name a CUDA 13.0 toolkit with bin/nvcc; given: {given}. `make wheel-cuda` sets one up")
        .into())
}

fn stand_in_for_cuda(out: &Path, toolkit: &Path) -> Result<(), Box<dyn Error>> {
    for name in ["cuda", "cublas", "cublasLt", "curand", "nvrtc"] {
        fs::write(out.join(format!("lib{name}.a")), EMPTY_ARCHIVE)?;
    }
    let folders = ["lib", "lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"];
    let found = folders.iter().map(|folder| toolkit.join(folder).join("libcudart_static.a"));
    let cudart = found.into_iter().find(|path| path.is_file());
    let cudart = cudart.ok_or_else(|| format!("no libcudart_static.a in {}", toolkit.display()))?;
    fs::copy(cudart, out.join("libcudart.a"))?;
    println!("cargo:rustc-link-search=native={}", out.display());
    // Nobody's CUDA functions come before ours, whoever has loaded what into the process.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic");
    Ok(())
}
