//! [`EngineHandle`]: an [`Engine`] on a thread of its own, commands in and events out.
//!
//! The thread owns all mutable state of the engine. It sleeps on the command channel when there is
//! nothing to do, and between two steps takes whatever commands have come.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::stats::Stats;
use super::{Engine, Event, Finish, FinishReason, Request, RequestId, SequenceId, panic_error};
use crate::config::EngineConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::scheduler::check_prompt;
use crate::sequence::SampleMetrics;
use crate::step::Forward;

/// How often a wait for the model is interrupted to ask whether to go on.
const INTERRUPT_POLL: Duration = Duration::from_millis(100);

/// A running engine. Every method may be called from any thread; dropping it closes the engine.
#[derive(Debug)]
pub struct EngineHandle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    config: EngineConfig,
    /// A forked child has this object but not the thread, and locks may be held for ever.
    process: u32,
}

#[derive(Debug)]
enum Command {
    Submit { id: RequestId, request: Box<Request>, arrival: f64 },
    Abort { request: RequestId, sample: Option<u32> },
    ClearPrefixCache { done: Sender<()> },
    Close,
}

#[derive(Debug)]
struct Shared {
    start: Instant,
    outbox: Mutex<Outbox>,
    filled: Condvar,
    /// As of the last time that the loop came around.
    stats: Mutex<Stats>,
    /// The engine's, in milliseconds.
    heartbeat: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Outbox {
    events: VecDeque<Event>,
    next_id: RequestId,
    /// Why nothing will come any more. Commands are sent under the lock of this, so none is sent
    /// to a thread that has stopped reading.
    closed: Option<Error>,
}

impl EngineHandle {
    /// Starts the thread, and on it makes the model with `load`; returns when that is done.
    ///
    /// Meanwhile this thread calls `meanwhile`, then asks `interrupted` ten times a second; an error
    /// of either ends the wait, and the engine as soon as `load` returns.
    pub fn start<F: Forward, E: From<Error>>(
        load: impl FnOnce() -> Result<(F, EngineConfig)> + Send + 'static,
        meanwhile: impl FnOnce() -> std::result::Result<(), E>,
        mut interrupted: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<Self, E> {
        let (commands, inbox) = mpsc::channel();
        let (loaded, load_result) = mpsc::channel();
        let shared = Arc::new(Shared {
            start: Instant::now(),
            outbox: Mutex::default(),
            filled: Condvar::new(),
            stats: Mutex::default(),
            heartbeat: Arc::default(),
        });
        let its_shared = shared.clone();
        let thread = std::thread::Builder::new()
            .name("astrai-engine".into())
            .spawn(move || its_shared.load_and_run(load, &loaded, &inbox))
            .map_err(Error::from)?;
        meanwhile()?;
        let config = loop {
            match load_result.recv_timeout(INTERRUPT_POLL) {
                Ok(config) => break config,
                Err(RecvTimeoutError::Timeout) => interrupted()?,
                Err(RecvTimeoutError::Disconnected) => {
                    break Err(Error::bug("the engine thread has died"));
                }
            }
        };
        match config {
            Ok(config) => {
                let (thread, process) = (Mutex::new(Some(thread)), std::process::id());
                Ok(Self { commands, shared, thread, config, process })
            }
            Err(error) => {
                let _ = thread.join();
                Err(error.into())
            }
        }
    }

    /// Queues a request and returns its id at once; an error when it can never run or the engine is closed.
    pub fn submit(&self, request: Request) -> Result<RequestId> {
        check_prompt(&request.prompt, &self.config)?;
        let arrival = self.shared.now();
        let mut outbox = self.shared.open()?;
        let id = outbox.next_id;
        outbox.next_id += 1;
        self.send(Command::Submit { id, request: Box::new(request), arrival });
        Ok(id)
    }

    /// Ends one sample of a request, or all. What is unknown or over already is left alone.
    pub fn abort(&self, request: RequestId, sample: Option<u32>) {
        if let Ok(_open) = self.shared.open() {
            self.send(Command::Abort { request, sample });
        }
    }

    /// Forgets every cached prefix; returns when that has happened, at most one step later.
    pub fn clear_prefix_cache(&self) -> Result<()> {
        let (done, wait) = mpsc::channel();
        {
            let _open = self.shared.open()?;
            self.send(Command::ClearPrefixCache { done });
        }
        wait.recv().or_else(|_| self.shared.open().map(drop))
    }

    /// The events since the last call. Waits for the first one, at most for `timeout`; an error
    /// when there are none and will be none, since the engine is closed.
    pub fn poll(&self, timeout: Duration) -> Result<Vec<Event>> {
        let outbox = lock(&self.shared.outbox);
        let nothing = |outbox: &mut Outbox| outbox.events.is_empty() && outbox.closed.is_none();
        let (mut outbox, _) = self
            .shared
            .filled
            .wait_timeout_while(outbox, timeout, nothing)
            .unwrap_or_else(PoisonError::into_inner);
        match &outbox.closed {
            Some(reason) if outbox.events.is_empty() => Err(reason.clone()),
            _ => Ok(outbox.events.drain(..).collect()),
        }
    }

    /// Gauges and counters as of the end of the last step; never waits for one.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let heartbeat_s = self.shared.heartbeat.load(Relaxed) as f64 / 1e3;
        Stats { uptime_s: self.shared.now(), heartbeat_s, ..*lock(&self.shared.stats) }
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Why the engine takes no requests any more, if it does not.
    #[must_use]
    pub fn closed(&self) -> Option<Error> {
        lock(&self.shared.outbox).closed.clone()
    }

    /// Ends all requests with [`ErrorKind::Shutdown`] and waits for the thread. Closing again does
    /// nothing, nor does closing in a forked child.
    pub fn close(&self) {
        if std::process::id() != self.process {
            return;
        }
        if let Ok(_open) = self.shared.open() {
            self.send(Command::Close);
        }
        // Held while joining, so that a second caller waits too.
        if let Some(thread) = lock(&self.thread).take() {
            // A panic has been reported through the outbox.
            let _ = thread.join();
        }
    }

    /// Callers hold the lock of an open outbox: the thread is there to receive.
    fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }
}

impl Drop for EngineHandle {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// The life of the thread. Nobody may be left to hear of the loaded model.
    fn load_and_run<F: Forward>(
        &self,
        load: impl FnOnce() -> Result<(F, EngineConfig)>,
        loaded: &Sender<Result<EngineConfig>>,
        inbox: &Receiver<Command>,
    ) {
        let made = catch_unwind(AssertUnwindSafe(|| {
            load().and_then(|(forward, config)| Engine::new(forward, config))
        }));
        match made.unwrap_or_else(|panic| Err(panic_error(panic.as_ref()))) {
            Ok(mut engine) => {
                // One clock for the times of submission and of everything after.
                engine.start = self.start;
                engine.heartbeat = self.heartbeat.clone();
                self.publish(&engine);
                if loaded.send(Ok(engine.config().clone())).is_ok() {
                    self.run(engine, inbox);
                }
            }
            Err(error) => {
                let _ = loaded.send(Err(error));
            }
        }
    }

    /// Runs the engine until it is closed or fails, then closes the outbox, whatever happens.
    fn run<F: Forward>(&self, mut engine: Engine<F>, inbox: &Receiver<Command>) {
        let turns = catch_unwind(AssertUnwindSafe(|| while self.turn(&mut engine, inbox) {}));
        if let Err(panic) = turns {
            engine.fail(panic_error(panic.as_ref()));
        }
        let shutdown = Error::new(ErrorKind::Shutdown, "the engine is closed");
        let reason = engine.failure().cloned().unwrap_or(shutdown);
        engine.fail(reason.clone());
        self.publish(&engine);
        let mut outbox = lock(&self.outbox);
        outbox.events.extend(engine.take_events());
        for command in inbox.try_iter() {
            if let Command::Submit { id, request, arrival } = command {
                outbox.events.extend(refusals(id, &request, arrival, &reason));
            }
        }
        outbox.closed = Some(reason);
        self.filled.notify_all();
    }

    /// Takes the commands that have come, steps, delivers; false when that was the last turn.
    fn turn<F: Forward>(&self, engine: &mut Engine<F>, inbox: &Receiver<Command>) -> bool {
        if !engine.has_work() {
            // Nothing to compute: sleep until somebody wants something.
            let Ok(command) = inbox.recv() else { return false };
            if !apply(engine, command) {
                return false;
            }
        }
        for command in inbox.try_iter() {
            if !apply(engine, command) {
                return false;
            }
        }
        self.publish(engine);
        let events = engine.step();
        self.publish(engine);
        if !events.is_empty() {
            lock(&self.outbox).events.extend(events);
            self.filled.notify_all();
        }
        engine.failure().is_none()
    }

    fn publish<F: Forward>(&self, engine: &Engine<F>) {
        self.heartbeat.store(self.start.elapsed().as_millis() as u64, Relaxed);
        *lock(&self.stats) = engine.stats();
    }

    fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// The outbox of an engine that still takes commands.
    fn open(&self) -> Result<MutexGuard<'_, Outbox>> {
        let outbox = lock(&self.outbox);
        match &outbox.closed {
            Some(reason) => Err(reason.clone()),
            None => Ok(outbox),
        }
    }
}

/// Carries out a command; false for the last one.
fn apply<F: Forward>(engine: &mut Engine<F>, command: Command) -> bool {
    match command {
        Command::Submit { id, request, arrival } => engine.queue(id, *request, arrival),
        Command::Abort { request, sample } => engine.abort(request, sample),
        Command::ClearPrefixCache { done } => {
            engine.clear_prefix_cache();
            // Whoever asked may have stopped waiting.
            let _ = done.send(());
        }
        Command::Close => return false,
    }
    true
}

/// The last events of a request that came too late.
fn refusals(id: RequestId, request: &Request, arrival: f64, reason: &Error) -> Vec<Event> {
    let metrics = SampleMetrics { arrival_time: arrival, ..SampleMetrics::default() };
    let end = |sample| Event {
        finish: Some(Finish { reason: FinishReason::Error(reason.clone()), metrics }),
        ..Event::new(SequenceId { request: id, sample })
    };
    (0..request.params.num_samples()).map(end).collect()
}

/// Locks also what a panicking thread has held: every critical section leaves its data whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
