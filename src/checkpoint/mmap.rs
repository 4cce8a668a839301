//! The crate's one memory map.

use std::fs::{self, File};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::weights::Source;

/// A whole file, mapped read-only and shared by the tensors that lie in it.
pub(super) type Mapped = Arc<dyn Source>;

struct FileMap(Mmap);

impl AsRef<[u8]> for FileMap {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Source for FileMap {
    #[cfg(unix)]
    fn release(&self, range: &Range<usize>) {
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: nothing writes to the map, so a page that goes comes back from the file as it was.
        #[expect(unsafe_code, reason = "memmap2 cannot know that the map is of a file")]
        let advised = unsafe { self.0.unchecked_advise_range(advice, range.start, range.len()) };
        // A system that refuses only keeps the memory.
        drop(advised);
    }
}

/// A regular file. It is looked at first: opening a pipe waits for a writer.
pub(super) fn open(path: &Path) -> Result<File> {
    let found = |error| super::io_error(path, error);
    if !fs::metadata(path).map_err(found)?.is_file() {
        return Err(Error::new(ErrorKind::Io, format!("{}: not a regular file", path.display())));
    }
    File::open(path).map_err(found)
}

/// Maps `path`. **The file must not be changed or truncated while the map lives**, as long as a model: its weights
/// would change under the engine, text that was checked would be no more, and reading beyond a new end kills the
/// process (`SIGBUS`).
/// Replacing a file by renaming another over it is fine.
pub(super) fn map(path: &Path) -> Result<Mapped> {
    let file = open(path)?;
    // SAFETY: the map is read-only and private to this process; that nobody changes the file
    // meanwhile is the documented duty of whoever loads a model.
    #[expect(unsafe_code, reason = "weights are read where they lie; see this function's contract")]
    let map = unsafe { Mmap::map(&file) }.context(|| path.display())?;
    Ok(Arc::new(FileMap(map)))
}
