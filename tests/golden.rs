//! Whole models against reference logits (transformers 5.23, AstrAI 1.3.3 / 1.3.13, fp32).

mod golden_support;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use astrai_rs::backend::Backend;
use astrai_rs::checkpoint::{self, Checkpoint};
use astrai_rs::config::DType;
use astrai_rs::runner::{CapacityRequest, Runner};
use astrai_rs::weights::{Bytes, Source, StoredTensor, Weights};

goldens!(|name| {
    golden_support::check(name, Backend::cpu(Some(2), DType::Float32).expect("cpu"));
});

/// A file that is remembered to be given back.
struct File(Vec<u8>, Mutex<Vec<Range<usize>>>);

impl AsRef<[u8]> for File {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Source for File {
    fn release(&self, range: &Range<usize>) {
        self.1.lock().expect("no panic").push(range.clone());
    }
}

#[test]
fn a_loaded_model_gives_its_file_back() {
    let Checkpoint { spec, weights } =
        checkpoint::load(&golden_support::fixture("llama")).expect("loads");
    let all = weights.iter().flat_map(|(_, tensor)| tensor.data.as_slice().to_vec()).collect();
    let file = Arc::new(File(all, Mutex::default()));
    let (mut moved, mut end) = (Weights::default(), 0);
    for (name, tensor) in weights.iter() {
        let start = end;
        end += tensor.data.as_slice().len();
        let data = Bytes::new(file.clone(), start..end).expect("inside");
        let tensor = StoredTensor::new(name, tensor.shape.clone(), tensor.encoding, data);
        moved.insert(name, tensor.expect("its size")).expect("new");
    }
    let checkpoint = Checkpoint { spec, weights: moved };
    let request = CapacityRequest { kv_cache_tokens: Some(64), ..Default::default() };
    let backend = Backend::cpu(Some(1), DType::Float32).expect("cpu");
    let _loaded = Runner::load(checkpoint, backend, &request).expect("packs");
    // Nothing that is packed, or looked up to pack it, comes back behind the whole.
    assert_eq!(file.1.lock().expect("no panic").last(), Some(&(0..end)));
}
