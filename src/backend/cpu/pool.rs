//! [`Pool`]: the caller and its persistent workers run the chunks of one op.
//!
//! Each thread has a share of consecutive chunks, so that it reads on where it is; whoever is done takes the last chunk
//! of another's share.
//!
//! Workers spin for some tens of microseconds after an op, because the next one usually follows at
//! once, then park. A worker that wakes too late is not waited for: the caller closes the job when no
//! chunk is left, and only waits for the workers that joined.
#![allow(unsafe_code)] // The job borrows from the caller's stack, and workers outlive that borrow.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::memory::{CACHE_LINE, prefetch};

/// Rounds that a worker waits for the next job before it parks; about 40 µs, and what it prefetches.
const SPINS: u32 = 2000;

/// Most bytes that a waiting worker prefetches of the next weights, less than most second-level caches, and most of all.
const PREFETCH_BYTES: usize = 256 << 10;
const PREFETCH_BYTES_OF_ALL: usize = 512 << 10;

/// Low half of the gate: how many workers are inside the job.
const INSIDE: u64 = 0x3fff_ffff;
/// Set while workers may join the job.
const OPEN: u64 = 1 << 30;
/// Set once, when the pool goes.
const SHUTDOWN: u64 = 1 << 31;
/// Unit of the upper half of the gate, which counts the jobs.
const EPOCH: u64 = 1 << 32;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// A caller plus `threads - 1` workers.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs. Whoever finds it taken (another thread, or a task that calls an op)
    /// runs its chunks alone.
    submit: Mutex<()>,
}

struct Shared {
    /// Epoch, open and shutdown flags, and the number of workers inside.
    gate: AtomicU64,
    /// One for each thread; the caller's is the first.
    shares: Vec<Share>,
    task: UnsafeCell<Option<*const Task<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    parked: Vec<AtomicBool>,
    spins: u32,
    /// What is read after the job.
    next: Place,
}

/// Chunks that a thread has left: the first in the low half, the end in the upper one.
#[derive(Default)]
#[repr(align(128))] // two cache lines, which some machines load together
struct Share(AtomicU64);

impl Share {
    fn set(&self, chunks: Range<usize>) {
        self.0.store(chunks.start as u64 | (chunks.end as u64) << 32, Ordering::Relaxed);
    }

    /// Takes the first chunk, or the last, if any is left.
    fn take(&self, first: bool) -> Option<usize> {
        let (low, high) = (|share: u64| share & u64::from(u32::MAX), |share: u64| share >> 32);
        let taken = |share| if first { share + 1 } else { share - (1 << 32) };
        let left = |share| (low(share) < high(share)).then(|| taken(share));
        let share = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).ok()?;
        let chunk = if first { low(share) } else { high(share) - 1 };
        Some(chunk as usize)
    }
}

/// Where the panels lie that are read next, a hint: nothing need be there.
#[derive(Default)]
pub(super) struct Place {
    start: AtomicPtr<u8>,
    panels: AtomicUsize,
    /// Bytes of a panel.
    stride: AtomicUsize,
}

impl Place {
    /// Start, null if it is not known, panels, and bytes of each.
    pub(super) fn get(&self) -> (*const u8, usize, usize) {
        let start = self.start.load(Ordering::Relaxed);
        (start, self.panels.load(Ordering::Relaxed), self.stride.load(Ordering::Relaxed))
    }

    pub(super) fn set(&self, (start, panels, stride): (*const u8, usize, usize)) {
        self.start.store(start.cast_mut(), Ordering::Relaxed);
        self.panels.store(panels, Ordering::Relaxed);
        self.stride.store(stride, Ordering::Relaxed);
    }
}

// SAFETY: `task` is written only by the holder of `submit` while the gate is closed and no worker is
// inside, and read only by workers inside; the gate's acquire and release order the two. The task
// is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is only followed while the caller of `run` keeps the task alive.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Self::run`] included.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            shares: (0..threads).map(|_| Share::default()).collect(),
            task: UnsafeCell::new(None),
            panic: Mutex::new(None),
            parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            spins: if threads > cpus { 0 } else { SPINS },
            next: Place::default(),
        });
        let mut pool = Self { shared, workers: Vec::new(), submit: Mutex::new(()) };
        for index in 0..threads.saturating_sub(1) {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("astrai-kernel-{index}"));
            pool.workers.push(builder.spawn(move || shared.work(index))?);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` once for each `i` below `chunks`, in any order and on any thread, and returns
    /// when all calls have. A panic of a task is raised here again.
    pub(super) fn run(&self, chunks: usize, task: &Task<'_>) {
        // A share counts in 32 bits.
        let shared = chunks > 1 && u32::try_from(chunks).is_ok() && !self.workers.is_empty();
        let guard = if shared { self.submit.try_lock().ok() } else { None };
        if guard.is_none() {
            return (0..chunks).for_each(task);
        }
        // SAFETY: only the lifetime changes. `finish` below returns once no worker is inside and
        // none can join, so no worker follows the pointer after `task`'s lifetime.
        let task: *const Task<'static> =
            unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        self.start(chunks, task);
        let own = self.shared.drain(0, task);
        self.finish();
        let theirs = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(guard);
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
    }

    /// A hint: after the job that comes, the weights at `next` are read by shares. Waiting workers prefetch the start
    /// of theirs, so that the memory is not idle while ops are too small for several threads.
    pub(super) fn prefetch_next(&self, next: &Place) {
        self.shared.next.set(next.get());
    }

    fn start(&self, chunks: usize, task: *const Task<'static>) {
        let shared = &*self.shared;
        // SAFETY: the caller holds `submit`, and the last `finish` left the gate closed and empty.
        unsafe { *shared.task.get() = Some(task) };
        let start = |thread| share_start(chunks, thread, shared.shares.len());
        for (thread, share) in shared.shares.iter().enumerate() {
            share.set(start(thread)..start(thread + 1));
        }
        // SeqCst, as is the worker's store of `parked`: one of the two sees the other.
        shared.gate.fetch_add(EPOCH | OPEN, Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&self.workers) {
            if parked.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    /// Closes the job and waits for the workers inside.
    fn finish(&self) {
        let gate = &self.shared.gate;
        let mut inside = gate.fetch_and(!OPEN, Ordering::AcqRel) & INSIDE;
        let mut rounds = 0u32;
        while inside != 0 {
            rounds += 1;
            if rounds < self.shared.spins {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
            inside = gate.load(Ordering::Acquire) & INSIDE;
        }
    }
}

impl Shared {
    /// Takes chunks until none is left, those of `thread` first; a panic ends the job for everyone.
    fn drain(&self, thread: usize, task: *const Task<'static>) -> Result<(), Box<dyn Any + Send>> {
        // SAFETY: the caller of `run` keeps the task alive until every worker inside has left.
        let task = unsafe { &*task };
        let (before, from) = self.shares.split_at(thread);
        catch_unwind(AssertUnwindSafe(|| {
            while let Some(chunk) = from[0].take(true) {
                task(chunk);
            }
            for share in from[1..].iter().chain(before) {
                while let Some(chunk) = share.take(false) {
                    task(chunk);
                }
            }
        }))
        .inspect_err(|_| self.shares.iter().for_each(|share| share.set(0..0)))
    }

    fn work(&self, index: usize) {
        let part = PREFETCH_BYTES.min(PREFETCH_BYTES_OF_ALL / self.parked.len());
        let mut prefetcher = Prefetcher { next: std::ptr::null(), at: 0, left: 0, part };
        let mut seen = 0;
        loop {
            let gate = self.await_job(index, seen, &mut prefetcher);
            if gate & SHUTDOWN != 0 {
                return;
            }
            let joined =
                self.gate.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed);
            if joined.is_err() {
                continue;
            }
            seen = gate / EPOCH;
            // SAFETY: this worker is inside, so the task stays as `start` wrote it.
            let task = unsafe {
                (*self.task.get()).expect("`start` writes the task, then opens the gate")
            };
            if let Err(payload) = self.drain(index + 1, task) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
            self.gate.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for an open job other than `seen`, or for the shutdown; returns the gate.
    fn await_job(&self, index: usize, seen: u64, prefetcher: &mut Prefetcher) -> u64 {
        let news = |order| {
            let gate = self.gate.load(order);
            let open = gate & OPEN != 0 && gate / EPOCH != seen;
            (open || gate & SHUTDOWN != 0).then_some(gate)
        };
        loop {
            for _ in 0..self.spins {
                if let Some(gate) = news(Ordering::Acquire) {
                    return gate;
                }
                prefetcher.advance(&self.next, (index + 1, self.shares.len()));
                std::hint::spin_loop();
            }
            self.parked[index].store(true, Ordering::SeqCst);
            if let Some(gate) = news(Ordering::SeqCst) {
                self.parked[index].store(false, Ordering::SeqCst);
                return gate;
            }
            std::thread::park();
            if self.spins == 0
                && let Some(gate) = news(Ordering::Acquire)
            {
                return gate;
            }
        }
    }
}

/// Where the share of a thread starts. The first threads have one chunk more than the others.
fn share_start(chunks: usize, thread: usize, threads: usize) -> usize {
    chunks / threads * thread + thread.min(chunks % threads)
}

/// How far a waiting worker has come with the start of its share of the next weights.
struct Prefetcher {
    /// Where those weights start.
    next: *const u8,
    /// Bytes from there to what is asked for next, and how many are left to ask for, at most `part`.
    at: usize,
    left: usize,
    part: usize,
}

impl Prefetcher {
    /// Asks for some more cache lines.
    fn advance(&mut self, next: &Place, (thread, threads): (usize, usize)) {
        let (start, panels, stride) = next.get();
        if start != self.next {
            let share = [thread, thread + 1].map(|thread| share_start(panels, thread, threads));
            let left = self.part.min((share[1] - share[0]) * stride);
            *self = Self { next: start, at: share[0] * stride, left, ..*self };
        }
        for _ in 0..16.min(self.left / CACHE_LINE) {
            prefetch(start.wrapping_add(self.at));
            self.at += CACHE_LINE;
            self.left -= CACHE_LINE;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.gate.fetch_or(SHUTDOWN, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks, so it ends in order.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).expect("threads start");
            for chunks in [0, 1, 2, 3, 100] {
                for _ in 0..50 {
                    let counts: Vec<_> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(chunks, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn shares_are_even_and_whole() {
        for (chunks, threads) in [(0, 3), (2, 4), (18, 8), (30, 7), (96, 2), (5, 1)] {
            let starts: Vec<_> = (0..=threads).map(|t| share_start(chunks, t, threads)).collect();
            assert_eq!((starts[0], starts[threads]), (0, chunks));
            let sizes: Vec<_> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
            assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
            assert!(sizes[0] - sizes[threads - 1] <= 1, "{sizes:?}");
        }
    }

    #[test]
    fn whoever_is_done_takes_over_from_others() {
        let pool = Pool::new(3).expect("threads start");
        for slow in 0..30 {
            let done = AtomicUsize::new(0);
            pool.run(30, &|i| {
                let begin = std::time::Instant::now();
                while i == slow && done.load(Ordering::Relaxed) < 29 {
                    assert!(begin.elapsed().as_secs() < 60, "nobody took the others");
                    std::thread::yield_now();
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3).expect("threads start");
        for bad in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(20, &|i| assert!(i != bad, "chunk {i} fails"));
            }));
            let payload = result.expect_err("the panic of a chunk");
            let message = payload.downcast_ref::<String>().expect("a formatted message");
            assert_eq!(message, &format!("chunk {bad} fails"));
            let sum = AtomicUsize::new(0);
            pool.run(10, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn nested_and_concurrent_runs_finish() {
        let pool = Pool::new(3).expect("threads start");
        let sum = AtomicUsize::new(0);
        let add = |i: usize| {
            sum.fetch_add(i, Ordering::Relaxed);
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| pool.run(50, &|_| pool.run(3, &add)));
            }
        });
        assert_eq!(sum.into_inner(), 4 * 50 * 3);
    }

    #[test]
    fn nothing_need_be_where_weights_are_said_to_be() {
        let pool = Pool::new(3).expect("threads start");
        for address in [usize::MAX - 100, 0, 1 << 40] {
            let place = Place::default();
            place.set((std::ptr::without_provenance(address), 100, 1 << 14));
            pool.prefetch_next(&place);
            std::thread::sleep(std::time::Duration::from_micros(20));
            let sum = AtomicUsize::new(0);
            pool.run(64, &|_| {
                sum.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 64);
        }
    }

    #[test]
    fn a_parked_worker_wakes_or_is_not_needed() {
        let pool = Pool::new(2).expect("threads start");
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let sum = AtomicUsize::new(0);
            pool.run(64, &|_| {
                sum.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 64);
        }
    }
}
