//! Whole models against reference logits (transformers 5.23, AstrAI 1.3.3 / 1.3.13, fp32).

mod golden_support;

use astrai_rs::backend::Backend;
use astrai_rs::config::DType;

goldens!(|name| {
    golden_support::check(name, Backend::cpu(Some(2), DType::Float32).expect("cpu"));
});
