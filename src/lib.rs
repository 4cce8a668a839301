//! An LLM inference engine. Token ids in, token ids out; text lives in Python.
//!
//! # Layout
//!
//! ```text
//!         cli ─ engine.py ─ tokenizer/chat_template               text, asyncio (Python)
//! ═══════════════════════ py ════════════════════════════  ids, numbers, paths, errors
//!         engine::thread ─→ engine → scheduler → cache::{block,prefix}   integers only
//!                │             ├→ sampler, grammar
//!                │             └→ step (trait Forward)
//!                ├─→ runner ───────┘
//!                │      ├→ decoder → layers → backend → candle / SIMD
//!                │      └→ cache::pool
//!                └─→ checkpoint → spec, weights
//!         error · config · spec · weights · wide · cache::block      leaves
//! ```
//!
//! # Reading order: the life of a request
//!
//! 1. [`sequence`]: one sample's ids, counters and block table; [`sampler`]: its parameters.
//! 2. [`scheduler`]: waiting and running sequences → the work of the next step, over [`cache`].
//!    [`grammar`]: which tokens an output that must follow a schema may hold next.
//! 3. [`step`]: what policy hands to tensors, [`draw`] a part of it; [`engine`] runs schedule → forward → sample → commit,
//!    on the thread of [`engine::thread`].
//! 4. [`runner`] packs a step; [`decoder`] is the forward pass over [`layers`]; [`backend`] has the
//!    fused ops, their naive reference and the kernels for CPUs and (feature `cuda`) NVIDIA GPUs.
//! 5. [`checkpoint`] turns files into a [`spec::ModelSpec`] and [`weights::Weights`], and keeps what a CPU's kernels
//!    make of these for the next load.
//!
//! # Invariants
//!
//! `tests/architecture.rs` checks the import rules among them.
//!
//! 1. **The engine knows nothing about text.** Only ids, numbers, paths and errors cross to Python; for
//!    [`grammar`] also the bytes of each id, as a table.
//! 2. **Policy never touches a tensor.** `scheduler`, `step`, `sequence`, `sampler`, `grammar`,
//!    `config`, `cache::{block, prefix}` and `engine` import no candle; they are tested without a model.
//! 3. **There is one forward pass.** What varies between families is data in [`spec::ModelSpec`].
//! 4. **Names are canonical past the checkpoint.** No format flag survives loading.
//! 5. **Every op has a reference version**, [`backend::reference`], and it is the specification.
//! 6. **Only `py` names `PyO3`**; the crate builds, tests and benches without Python.
//! 7. **Only `checkpoint` reads and writes files** (but for the system's memory limit); **unsafe lives only in
//!    `backend`'s kernels, the one mmap and the dispatch of `wide`.**
//! 8. **The engine thread owns all mutable state**; others send commands and receive events.
//! 9. **Nothing is guessed silently.** What is missing, unknown, misshapen or unsupported is an error
//!    that names it, what was given and what is allowed.
//! 10. **Batch invariance.** The arithmetic of one row never depends on which rows share its batch, on
//!     the chunking of its prefill or on a prefix hit: every kernel has one order of reduction per
//!     output element. Tested bitwise.

pub mod backend;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod draw;
pub mod engine;
pub mod error;
pub mod grammar;
pub mod layers;
#[cfg(feature = "python")]
mod py;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod spec;
pub mod step;
pub mod weights;
mod wide;
