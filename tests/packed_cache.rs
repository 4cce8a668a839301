//! Packed weights that are kept from one load to the next: the same bits, whatever has become of the file.

mod golden_support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use astrai_rs::backend::Backend;
use astrai_rs::checkpoint::{self, ModelFiles, PackedCache};
use astrai_rs::config::DType;
use astrai_rs::error::ErrorKind;
use astrai_rs::runner::{CapacityRequest, Runner};
use astrai_rs::weights::PackedWeights;
use golden_support::{Golden, fixture, logits};

/// A folder that goes with its test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("astrai-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("made");
        Self(path)
    }

    fn packed(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(&self.0).expect("readable");
        let mut files: Vec<_> = files.map(|file| file.expect("readable").path()).collect();
        files.sort();
        files
    }
}

impl Folder {
    /// Has a model in it; where its weights are.
    fn copy_of(&self, name: &str) -> PathBuf {
        for file in fs::read_dir(fixture(name)).expect("readable") {
            let file = file.expect("readable");
            fs::copy(file.path(), self.0.join(file.file_name())).expect("copied");
        }
        self.0.join("model.safetensors")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The bytes of a file of weights, the last number changed.
fn with_another_number(file: &Path) -> Vec<u8> {
    let mut bytes = fs::read(file).expect("readable");
    *bytes.last_mut().expect("weights") ^= 0x40;
    bytes
}

/// Whether the weights of `model` were there, and the bits of its logits.
fn load(folder: &Path, model: &Path, dtype: DType) -> (bool, Vec<u32>) {
    let backend = Backend::cpu(Some(2), dtype).expect("a CPU");
    let layout = backend.packed_layout().expect("of a CPU");
    let files = ModelFiles::of(model).expect("a model");
    let checkpoint = checkpoint::load(model).expect("loads");
    let cache = PackedCache::open(folder, &files, &layout, 2).expect("opens");
    let was_found = cache.is_found();
    let cache = Arc::new(Mutex::new(cache));
    backend.keep_packed(cache.clone());
    let request =
        CapacityRequest { kv_cache_tokens: Some(512), max_num_seqs: 16, ..Default::default() };
    let (mut runner, _) = Runner::load(checkpoint, backend, &request).expect("packs");
    cache.lock().expect("whole").finish();
    let logits = logits(&Golden::read("llama"), &mut runner);
    (was_found, logits.into_iter().map(f32::to_bits).collect())
}

#[test]
fn the_next_load_finds_the_same_weights() {
    let folder = Folder::new("packed-again");
    let load = |dtype| load(&folder.0, &fixture("llama"), dtype);
    let (was_found, want) = load(DType::Auto);
    assert!(!was_found);
    assert_eq!(load(DType::Auto), (true, want.clone()));
    // Another layout, beside it.
    let (was_found, exact) = load(DType::Float32);
    assert!(!was_found && exact != want);
    assert_eq!(load(DType::Float32), (true, exact));
    assert_eq!(load(DType::Auto), (true, want));
    assert_eq!(folder.packed().len(), 2);
}

#[test]
fn damaged_files_are_made_anew() {
    let folder = Folder::new("packed-damaged");
    let load = || load(&folder.0, &fixture("llama"), DType::Auto);
    let (_, want) = load();
    let [file] = folder.packed().try_into().expect("one file");
    let whole = fs::read(&file).expect("readable");
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let len = whole.len();
    let mut damaged = vec![Vec::new(), whole[..len - 1].to_vec(), whole[..len / 2].to_vec()];
    // Numbers, the table, where it starts, its checksum, the end.
    damaged.extend([5, len / 3, len - 100, len - 18, len - 10, len - 1].map(flipped));
    for (case, bytes) in damaged.into_iter().enumerate() {
        fs::write(&file, bytes).expect("written");
        assert_eq!(load(), (false, want.clone()), "case {case}");
        assert_eq!(load(), (true, want.clone()), "case {case}");
    }
    assert_eq!(fs::read(&file).expect("readable"), whole);
}

#[test]
fn a_changed_model_is_packed_again() {
    let (folder, model) = (Folder::new("packed-changed"), Folder::new("packed-model"));
    let weights = model.copy_of("llama");
    let load = || load(&folder.0, &model.0, DType::Auto);
    let (_, want) = load();
    assert!(load().0);
    // Renamed over the old one, as a download is; of the same size.
    fs::write(model.0.join("new"), with_another_number(&weights)).expect("written");
    fs::rename(model.0.join("new"), &weights).expect("renamed");
    let (was_found, other) = load();
    assert!(!was_found && other != want);
    assert_eq!(load(), (true, other));
    assert_eq!(folder.packed().len(), 1, "the old one is replaced");
}

#[test]
fn the_folder_may_be_the_models_own() {
    let model = Folder::new("packed-own");
    model.copy_of("llama");
    let (_, want) = load(&model.0, &model.0, DType::Auto);
    assert_eq!(load(&model.0, &model.0, DType::Auto), (true, want.clone()));
    let within = model.0.join("within");
    assert_eq!(load(&within, &model.0, DType::Auto), (false, want.clone()));
    assert_eq!(load(&within, &model.0, DType::Auto), (true, want));
}

#[test]
fn loads_at_once_do_not_meet() {
    let (folder, alone) = (Folder::new("packed-at-once"), Folder::new("packed-alone"));
    let (_, want) = load(&alone.0, &fixture("llama"), DType::Auto);
    std::thread::scope(|scope| {
        let load = || load(&folder.0, &fixture("llama"), DType::Auto);
        let loads: Vec<_> = (0..4).map(|_| scope.spawn(load)).collect();
        for load in loads {
            assert_eq!(load.join().expect("loads").1, want);
        }
    });
    let unfinished = |file: &PathBuf| file.extension().is_some_and(|kind| kind == "packed-part");
    assert_eq!(folder.packed().iter().filter(|file| unfinished(file)).count(), 0);
}

/// Other numbers in a file that has nothing else new but the time that nobody can set.
#[cfg(unix)]
#[test]
fn a_model_that_is_changed_in_secret_is_packed_again() {
    let (folder, model) = (Folder::new("packed-secret"), Folder::new("packed-secret-model"));
    let copy = model.copy_of("llama");
    let load = || load(&folder.0, &model.0, DType::Auto);
    let (_, want) = load();
    let changed = fs::metadata(&copy).and_then(|kind| kind.modified()).expect("known");
    fs::write(&copy, with_another_number(&copy)).expect("written");
    fs::File::options().write(true).open(&copy).and_then(|f| f.set_modified(changed)).expect("set");
    let (was_found, other) = load();
    assert!(!was_found && other != want);
}

/// What is mapped may be the old files or the new ones.
#[test]
fn nothing_is_kept_of_files_that_change_while_they_are_loaded() {
    let (folder, model) = (Folder::new("packed-raced"), Folder::new("packed-raced-model"));
    let copy = model.copy_of("llama");
    let files = ModelFiles::of(&model.0).expect("a model");
    fs::copy(&copy, model.0.join("new")).expect("copied");
    fs::rename(model.0.join("new"), &copy).expect("renamed");
    let mut cache = PackedCache::open(&folder.0, &files, "layout", 1).expect("opens");
    cache.keep("weight", &[1, 2, 3]);
    cache.finish();
    assert!(!cache.is_found() && folder.packed().is_empty());
}

/// The files behind a link stay as they are when it comes to lead elsewhere.
#[cfg(unix)]
#[test]
fn nothing_is_kept_of_a_link_that_changes_while_it_is_followed() {
    let (folder, models) = (Folder::new("packed-link"), Folder::new("packed-link-models"));
    let (link, new) = (models.0.join("link"), models.0.join("new"));
    let lead = |to: &Path, link: &Path| std::os::unix::fs::symlink(to, link).expect("made");
    lead(&fixture("llama").canonicalize().expect("there"), &link);
    let files = ModelFiles::of(&link).expect("a model");
    lead(&fixture("qwen3").canonicalize().expect("there"), &new);
    fs::rename(&new, &link).expect("renamed");
    let cache = PackedCache::open(&folder.0, &files, "layout", 1).expect("opens");
    assert!(!cache.is_found() && folder.packed().is_empty());
}

/// A load that fails, or is killed, leaves nothing for long.
#[test]
fn what_is_not_finished_goes() {
    let folder = Folder::new("packed-unfinished");
    let files = ModelFiles::of(&fixture("llama")).expect("a model");
    let open = || PackedCache::open(&folder.0, &files, "layout", 1).expect("opens");
    let (first, second) = (open(), open());
    assert_eq!(folder.packed().len(), 2);
    drop(second);
    // Of a process that was killed.
    let abandoned = folder.0.join("model.packed-part");
    // Another program's.
    let download = folder.0.join("model.gguf.part");
    for file in [&abandoned, &download] {
        fs::write(file, "much").expect("written");
    }
    let third = open();
    assert!(!abandoned.exists());
    assert_eq!(folder.packed().len(), 3, "of the first, the third and the other program");
    drop((first, third));
    assert_eq!(folder.packed(), [download]);
}

#[test]
fn processes_that_write_at_once_remove_nothing_of_each_other() {
    let folder = Folder::new("packed-many");
    let files = ModelFiles::of(&fixture("llama")).expect("a model");
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (folder, files) = (&folder.0, &files);
            scope.spawn(move || {
                for round in 0..300 {
                    let layout = format!("{thread} {round}");
                    let open = || PackedCache::open(folder, files, &layout, 1).expect("opens");
                    open().finish();
                    assert!(open().is_found(), "thread {thread}, round {round}");
                }
            });
        }
    });
}

/// Opening a pipe waits for who writes to it.
#[cfg(unix)]
#[test]
fn pipes_are_not_opened() {
    let (folder, model) = (Folder::new("packed-pipes"), Folder::new("packed-pipes-model"));
    let pipe = |path: PathBuf| {
        let made = std::process::Command::new("mkfifo").arg(&path).status().expect("runs");
        assert!(made.success());
        path
    };
    let weights = model.copy_of("llama");
    let left = pipe(folder.0.join("left.packed-part"));
    let (found, want) = load(&folder.0, &model.0, DType::Auto);
    assert!(!found && left.exists());
    let kept = folder.packed().into_iter().find(|file| *file != left).expect("kept");
    fs::remove_file(&kept).expect("removed");
    pipe(kept);
    assert_eq!(load(&folder.0, &model.0, DType::Auto).1, want);
    let (config, gguf) = (model.0.join("config.json"), folder.0.join("model.gguf"));
    for (file, given) in [(weights, &model.0), (config, &model.0), (gguf.clone(), &gguf)] {
        let _ = fs::remove_file(&file);
        pipe(file);
        let error = checkpoint::load(given).expect_err("a pipe").to_string();
        assert!(error.ends_with("not a regular file"), "{error}");
    }
}

#[test]
fn a_file_that_lacks_a_part_is_made_anew() {
    let folder = Folder::new("packed-lacking");
    let files = ModelFiles::of(&fixture("llama")).expect("a model");
    let open = || PackedCache::open(&folder.0, &files, "layout", 1).expect("opens");
    let mut cache = open();
    cache.keep("a", &[1; 100]);
    cache.finish();
    let mut cache = open();
    assert!(cache.is_found() && cache.find("a", 100).is_some() && cache.find("b", 50).is_none());
    cache.keep("b", &[2; 50]);
    cache.finish();
    let mut cache = open();
    assert!(!cache.is_found());
    cache.keep("a", &[1; 100]);
    cache.keep("b", &[2; 50]);
    cache.finish();
    let cache = open();
    let part = |name, len| cache.find(name, len).expect("kept").as_slice().to_vec();
    assert_eq!((part("a", 100), part("b", 50)), (vec![1; 100], vec![2; 50]));
}

#[test]
fn a_folder_that_cannot_be_is_named() {
    let folder = Folder::new("packed-no-folder");
    let file = folder.0.join("file");
    fs::write(&file, "").expect("written");
    let files = ModelFiles::of(&fixture("llama")).expect("a model");
    let error = PackedCache::open(&file, &files, "layout", 1).expect_err("a file");
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("no-folder"), "{error}");
}
