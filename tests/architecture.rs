//! The import rules of the crate docs: which module may name which.

use std::fs;
use std::path::{Path, PathBuf};

/// Module (path under `src/`, a folder covers its files) → what it may import from this crate.
/// The longest matching prefix counts.
const RULES: &[(&str, &[&str])] = &[
    ("error.rs", &[]),
    ("spec.rs", &["error"]),
    ("config.rs", &["error"]),
    ("weights.rs", &["error"]),
    ("draw.rs", &[]),
    ("wide.rs", &[]),
    ("step.rs", &["error", "cache::block", "draw"]),
    ("sampler", &["error", "draw", "wide", "sampler"]),
    ("grammar", &["error", "grammar"]),
    (
        "sequence.rs",
        &["error", "config", "cache", "draw", "grammar", "sampler", "step", "sequence"],
    ),
    ("scheduler", &["error", "config", "cache", "sampler", "sequence", "step", "scheduler"]),
    ("cache/block.rs", &["config"]),
    ("cache/prefix.rs", &["config", "cache::block"]),
    ("cache/mod.rs", &["error", "config", "cache"]),
    ("cache/pool.rs", &["error", "config", "backend"]),
    (
        "engine",
        &[
            "error",
            "config",
            "cache",
            "draw",
            "engine",
            "grammar",
            "sampler",
            "scheduler",
            "sequence",
            "step",
        ],
    ),
    ("backend", &["error", "config", "spec", "weights", "wide", "cache::block", "draw", "backend"]),
    ("layers", &["error", "spec", "weights", "backend", "layers"]),
    ("decoder.rs", &["error", "spec", "weights", "backend", "layers", "cache::pool"]),
    ("checkpoint", &["error", "spec", "weights", "checkpoint"]),
    (
        "runner.rs",
        &[
            "error",
            "config",
            "draw",
            "spec",
            "step",
            "backend",
            "cache::pool",
            "decoder",
            "checkpoint",
        ],
    ),
    (
        "py",
        &[
            "error",
            "config",
            "engine",
            "grammar",
            "sampler",
            "sequence",
            "runner",
            "backend",
            "checkpoint",
            "py",
        ],
    ),
];

/// Policy: integers and numbers only.
const NO_CANDLE: &[&str] = &[
    "scheduler",
    "draw.rs",
    "step.rs",
    "sequence.rs",
    "sampler",
    "grammar",
    "config.rs",
    "engine",
    "cache/block.rs",
    "cache/prefix.rs",
    "cache/mod.rs",
    "spec.rs",
    "weights.rs",
];

fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("readable") {
            let path = entry.expect("readable").path();
            if path.is_dir() { walk(&path, files) } else { files.push(path) }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    files
        .into_iter()
        .filter(|path| path.extension().is_some_and(|ext| ext == "rs"))
        .map(|path| {
            let name =
                path.strip_prefix(&root).expect("under src").to_string_lossy().replace('\\', "/");
            (name, fs::read_to_string(&path).expect("readable"))
        })
        .collect()
}

fn code_lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim_start().starts_with("//"))
}

#[test]
fn modules_import_only_what_the_map_allows() {
    let mut faults = Vec::new();
    for (file, text) in sources() {
        if file == "lib.rs" {
            continue;
        }
        let rule = RULES
            .iter()
            .filter(|(prefix, _)| file.starts_with(prefix))
            .max_by_key(|(p, _)| p.len());
        let Some((_, allowed)) = rule else {
            faults.push(format!("src/{file} is in no rule of tests/architecture.rs"));
            continue;
        };
        let stem = file.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
        for line in code_lines(&text) {
            for (at, _) in line.match_indices("crate::") {
                let path = &line[at + "crate::".len()..];
                let ok = path.starts_with(&stem)
                    || allowed.iter().any(|module| {
                        path.strip_prefix(module)
                            .is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
                    });
                if !ok {
                    faults.push(format!("src/{file} may not import crate::{path}"));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn policy_never_touches_a_tensor() {
    for (file, text) in sources() {
        if NO_CANDLE.iter().any(|prefix| file.starts_with(prefix)) {
            assert!(
                !code_lines(&text).any(|line| line.contains("candle_core")),
                "src/{file} names candle"
            );
        }
    }
}

#[test]
fn only_the_binding_names_pyo3() {
    for (file, text) in sources() {
        if !file.starts_with("py") {
            assert!(!code_lines(&text).any(|line| line.contains("pyo3")), "src/{file} names pyo3");
        }
    }
}

#[test]
fn only_checkpoint_reads_files() {
    for (file, text) in sources() {
        // What the system tells of its limits is no file of a model.
        if !file.starts_with("checkpoint") && file != "backend/cpu/memory_limit.rs" {
            let reads = ["fs::", "std::fs", "{fs", "File::open", "Mmap::map(", "MmapOptions"];
            let found = code_lines(&text).find(|line| reads.iter().any(|name| line.contains(name)));
            assert!(found.is_none(), "src/{file} reads files: {found:?}");
        }
    }
}

#[test]
fn unsafe_lives_only_in_kernels_and_the_mmap() {
    for (file, text) in sources() {
        let kernels = ["backend/cpu", "backend/cuda", "checkpoint/mmap", "wide.rs"];
        if !kernels.iter().any(|kernel| file.starts_with(kernel)) {
            let keyword = |line: &&str| {
                line.split(|c: char| !c.is_alphanumeric() && c != '_')
                    .any(|word| word == "unsafe" || word == "unsafe_code")
            };
            let found = code_lines(&text).find(keyword);
            assert!(found.is_none(), "src/{file} is unsafe: {found:?}");
        }
    }
}

#[test]
fn no_file_outgrows_its_noun() {
    for (file, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= 520, "src/{file} has {lines} lines; split it");
    }
}
