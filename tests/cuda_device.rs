//! An emulated GPU that is not there, has little memory, or cannot run the model.

#![cfg(feature = "cuda-emulator")]

mod golden_support;

use std::process::Command;

use astrai_rs::backend::{Backend, Heads, LayerKv, StepSizes};
use astrai_rs::checkpoint;
use astrai_rs::config::{DType, DeviceChoice, KvCacheDType};
use astrai_rs::error::{Error, ErrorKind};
use astrai_rs::runner::{CapacityRequest, Runner};
use astrai_rs::spec::ModelSpec;
use astrai_rs::weights::Encoding;
use golden_support::fixture;

/// Whether this is a process of its own for the test `name`, with a variable set that the emulated GPU looks
/// at; else makes one.
fn is_apart(name: &str, variable: &str, value: &str) -> bool {
    if std::env::var_os(variable).is_some() {
        return true;
    }
    let program = std::env::current_exe().expect("a path");
    let output = Command::new(program).args(["--exact", name]).env(variable, value).output();
    let output = output.expect("runs");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
    false
}

fn spec() -> ModelSpec {
    checkpoint::load(&fixture("llama")).expect("loads").spec
}

#[test]
fn a_gpu_has_no_int8_cache() {
    let open = |device| {
        Backend::open(device, Some(1), DType::Auto, KvCacheDType::Int8, &spec())
            .map(|backend| backend.device_name())
    };
    assert_eq!(open(DeviceChoice::Auto).expect("opens"), "cpu");
    let error = open(DeviceChoice::Cuda).expect_err("is refused");
    assert!(error.to_string().contains("kv_cache_dtype \"int8\" on a GPU"), "{error}");
}

fn open(device: DeviceChoice, dtype: DType, spec: &ModelSpec) -> Result<&'static str, Error> {
    Backend::open(device, Some(1), dtype, KvCacheDType::Auto, spec)
        .map(|backend| backend.device_name())
}

#[test]
fn auto_is_the_gpu_where_there_is_one() {
    assert_eq!(open(DeviceChoice::Auto, DType::Auto, &spec()).expect("opens"), "cuda");
}

#[test]
fn without_a_driver_auto_is_the_cpu() {
    if !is_apart("without_a_driver_auto_is_the_cpu", "ASTRAI_NO_EMULATED_GPU", "1") {
        return;
    }
    let error = open(DeviceChoice::Cuda, DType::Auto, &spec()).expect_err("no driver");
    assert_eq!(error.kind(), ErrorKind::Device);
    assert!(error.to_string().starts_with("no NVIDIA driver"), "{error}");
    assert_eq!(open(DeviceChoice::Auto, DType::Auto, &spec()).expect("opens"), "cpu");
}

#[test]
fn models_that_a_gpu_cannot_run_are_for_the_cpu() {
    let (mut wide, mut odd) = (spec(), spec());
    wide.attention.head_dim = 320;
    odd.hidden_size = 100;
    let odd_message = "a multiple of 8 inputs, but in float32; given: a hidden size of 100";
    for (spec, dtype, expect) in [
        (&wide, DType::Auto, "heads are at most 256 wide; given: 320"),
        (&wide, DType::Float32, "heads are at most 256 wide; given: 320"),
        (&odd, DType::Float16, odd_message),
    ] {
        let gpu = Backend::cuda(0, dtype).expect("a GPU");
        let error = gpu.supports(spec).expect_err(expect);
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(expect), "{error}");
        assert_eq!(open(DeviceChoice::Auto, dtype, spec).expect("opens"), "cpu");
    }
    assert_eq!(open(DeviceChoice::Auto, DType::Float32, &odd).expect("opens"), "cuda");
}

/// All of the cache that a share of the memory has room for, in one layer.
fn cache(backend: &Backend, utilization: f64) -> Result<LayerKv, Error> {
    let heads = Heads { num_heads: 8, num_kv_heads: 1, head_dim: 64 };
    let bytes_per_token = backend.kv_bytes_per_token(heads);
    let steps = StepSizes {
        sequences: (4, 1000),
        activations: 1 << 20,
        bytes_per_token,
        heads,
        vocab_size: 1000,
    };
    let weights = std::iter::once((Encoding::BF16, 4 << 20));
    let budget = backend.cache_budget(utilization, weights, steps)?;
    backend.layer_kv(budget.usual / (16 * bytes_per_token), heads)
}

#[test]
fn engines_share_the_memory_of_a_gpu() {
    if !is_apart("engines_share_the_memory_of_a_gpu", "ASTRAI_EMULATED_MEMORY", "536870912") {
        return;
    }
    let gpu = || Backend::cuda(0, DType::BFloat16).expect("a GPU");
    let first = cache(&gpu(), 0.4).expect("fits");
    let second = cache(&gpu(), 0.4).expect("fits");
    assert_eq!(first.pages.dims(), second.pages.dims());
    let _other =
        gpu().layer_kv(300 << 20 >> 12, Heads { num_heads: 1, num_kv_heads: 1, head_dim: 64 });
    let error = cache(&gpu(), 0.9).expect_err("full");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    let message = error.to_string();
    let named = "of 536870912 are free, gpu_memory_utilization is 0.9";
    assert!(message.starts_with("the model needs ") && message.contains(named), "{message}");
    drop(first);
    drop(second);
    assert!(cache(&gpu(), 0.9).is_ok());
}

#[test]
fn a_model_that_does_not_fit_is_an_error_with_numbers() {
    let checkpoint = checkpoint::load(&fixture("llama")).expect("loads");
    let request = CapacityRequest {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        gpu_memory_utilization: Some(1e-3),
        ..CapacityRequest::default()
    };
    let gpu = Backend::cuda(0, DType::BFloat16).expect("a GPU");
    let error = Runner::load(checkpoint, gpu, &request).expect_err("8 MiB");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert!(error.to_string().contains("8589934 may be used"), "{error}");
}
