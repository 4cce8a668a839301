//! [`ErrorKind`] → Python exception class.

use pyo3::exceptions::{
    PyFileNotFoundError, PyMemoryError, PyNotImplementedError, PyOSError, PyRuntimeError,
    PyValueError,
};
use pyo3::{PyErr, create_exception};

use crate::error::{Error, ErrorKind};

create_exception!(
    astrai_rs._core,
    CheckpointError,
    PyValueError,
    "A model file is incomplete, damaged or holds too much."
);
create_exception!(
    astrai_rs._core,
    EngineClosed,
    PyRuntimeError,
    "The engine was closed before or while the call ran."
);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error.kind() {
            ErrorKind::InvalidArgument => PyValueError::new_err(message),
            ErrorKind::Checkpoint => CheckpointError::new_err(message),
            ErrorKind::Unsupported => PyNotImplementedError::new_err(message),
            ErrorKind::OutOfMemory => PyMemoryError::new_err(message),
            ErrorKind::NotFound => PyFileNotFoundError::new_err(message),
            ErrorKind::Io => PyOSError::new_err(message),
            ErrorKind::Shutdown => EngineClosed::new_err(message),
            ErrorKind::Device | ErrorKind::Bug => PyRuntimeError::new_err(message),
        }
    }
}
