//! The crate's one error type: a kind for programs, a context chain for people.

use std::fmt;

/// What a caller may do about an error. Each kind maps to one Python class and one HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller gave a value that is not allowed (`ValueError`, 400).
    InvalidArgument,
    /// A checkpoint is missing something, has too much or is corrupt (`CheckpointError`).
    Checkpoint,
    /// A valid input that this version does not implement (`NotImplementedError`, 400).
    Unsupported,
    /// Memory was asked for that is not there (`MemoryError`, 503).
    OutOfMemory,
    /// The compute device failed (`RuntimeError`, 500).
    Device,
    /// A file that does not exist (`FileNotFoundError`).
    NotFound,
    /// Another file-system failure (`OSError`).
    Io,
    /// The engine is closed or closing (`EngineClosed`, 503).
    Shutdown,
    /// Our own mistake: a broken invariant or a panic (`RuntimeError`, 500).
    Bug,
}

impl ErrorKind {
    /// The name that crosses to Python.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "InvalidArgument",
            Self::Checkpoint => "Checkpoint",
            Self::Unsupported => "Unsupported",
            Self::OutOfMemory => "OutOfMemory",
            Self::Device => "Device",
            Self::NotFound => "NotFound",
            Self::Io => "Io",
            Self::Shutdown => "Shutdown",
            Self::Bug => "Bug",
        }
    }
}

/// An error with a kind and a message that names what was wrong, what was given and what is allowed.
///
/// `Display` prints the context chain, outermost first: `model.safetensors: tensor "x": bad shape`.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// [`ErrorKind::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// [`ErrorKind::Checkpoint`].
    pub fn checkpoint(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Checkpoint, message)
    }

    /// [`ErrorKind::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// [`ErrorKind::Bug`].
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Bug, message)
    }

    /// The same error with `context` in front of its message.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// What the caller may do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        let kind = match error.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::OutOfMemory => ErrorKind::OutOfMemory,
            _ => ErrorKind::Io,
        };
        Self::new(kind, error.to_string())
    }
}

/// candle fails only where our own shapes are wrong or the device does.
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match error {
            candle_core::Error::WithBacktrace { inner, .. } => Self::from(*inner),
            error => Self::new(ErrorKind::Device, error.to_string()),
        }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        Self::wrap(error)
    }
}

/// Adds context to the error of a `Result`.
pub trait ResultExt<T> {
    /// Puts `context()` in front of the error's message.
    fn context<C: fmt::Display>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for std::result::Result<T, E> {
    fn context<C: fmt::Display>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| error.into().context(context()))
    }
}
