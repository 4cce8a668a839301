//! [`MaskWorker`]: masks of the next step are computed while the forward pass runs.

use std::sync::mpsc::{self, Receiver, Sender};

use super::GrammarState;
use crate::error::{Error, Result};

/// Grammar states with the places that they go back to.
type States = Vec<(usize, GrammarState)>;

/// A thread that prepares grammar states. It starts with the first one and ends with its owner.
#[derive(Debug, Default)]
pub(crate) struct MaskWorker {
    channels: Option<(Sender<States>, Receiver<States>)>,
}

impl MaskWorker {
    /// Hands over the states of a step; [`Self::finish`] gives them back.
    pub(crate) fn begin(&mut self, states: States) -> Result<()> {
        let (jobs, _) = match &mut self.channels {
            Some(channels) => channels,
            none => none.insert(start()?),
        };
        jobs.send(states).map_err(|_| died())
    }

    /// The states of the last [`Self::begin`], prepared.
    pub(crate) fn finish(&mut self) -> Result<States> {
        let (_, done) = self.channels.as_ref().ok_or_else(died)?;
        done.recv().map_err(|_| died())
    }
}

fn start() -> Result<(Sender<States>, Receiver<States>)> {
    let (jobs, inbox) = mpsc::channel::<States>();
    let (outbox, done) = mpsc::channel();
    std::thread::Builder::new().name("astrai-grammar".into()).spawn(move || {
        for mut states in inbox {
            for (_, state) in &mut states {
                state.prepare();
            }
            if outbox.send(states).is_err() {
                return;
            }
        }
    })?;
    Ok((jobs, done))
}

fn died() -> Error {
    Error::bug("the grammar thread has died")
}
