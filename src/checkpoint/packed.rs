//! [`PackedCache`]: packed weights, kept in a file from one load of a model to the next.
//!
//! A file has what one layout makes of one model: parts that start on cache lines, a table of them with checksums,
//! and where the table starts. It is written under another name and renamed when it is whole, so any number of
//! processes may write it at once. One that is damaged, or was made from other files, is made anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::mmap::{self, Mapped};
use crate::error::{Result, ResultExt};
use crate::weights::{Bytes, PackedWeights};

/// The last bytes of a file that is whole. Before them: where the table starts, and its checksum.
const END: &[u8; 8] = b"astraipk";
const TAIL_BYTES: usize = 8 + 4 + END.len();
const ALIGNMENT: usize = 64;
/// Bytes that have a checksum of their own.
const PIECE: usize = 1 << 20;
/// Age from which on an unfinished file has no writer any more.
const ABANDONED: Duration = Duration::from_hours(1);

/// What a file was made from, and what it holds.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Table {
    identity: String,
    parts: BTreeMap<String, Part>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Part {
    start: usize,
    len: usize,
    /// Of each [`PIECE`].
    checksums: Vec<u32>,
}

/// Packed weights of one model in one layout: what is there, or what is being written.
pub struct PackedCache {
    found: Option<(Mapped, Table)>,
    writing: Option<Writing>,
}

impl PackedCache {
    /// Looks in `folder`, which is made if need be, for what `layout` makes of `model`; begins to write it where it
    /// is not there.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Io`] or `NotFound`, which names the path that cannot be read or written.
    pub fn open(folder: &Path, model: &Path, layout: &str) -> Result<Self> {
        fs::create_dir_all(folder).context(|| folder.display())?;
        let model = model.canonicalize().context(|| model.display())?;
        let identity = format!("{layout}\n{}", identity(&model)?);
        let place = crc32fast::hash(format!("{layout}\n{}", model.display()).as_bytes());
        let name = model.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let path = folder.join(format!("{name}-{place:08x}.packed"));
        let found = read(&path, &identity);
        let writing = if found.is_none() { Some(Writing::new(path, identity)?) } else { None };
        Ok(Self { found, writing })
    }

    /// Whether the weights were there.
    #[must_use]
    pub fn is_found(&self) -> bool {
        self.found.is_some()
    }

    /// Says that the model has been loaded: what was written counts from now on.
    pub fn finish(&mut self) {
        if let Some(writing) = self.writing.take() {
            // Without it the next load packs again.
            let _ = writing.finish();
        }
    }
}

impl PackedWeights for PackedCache {
    fn find(&self, name: &str, len: usize) -> Option<Bytes> {
        let (map, table) = self.found.as_ref()?;
        let part = table.parts.get(name).filter(|part| part.len == len)?;
        Bytes::new(map.clone(), part.start..part.start + part.len).ok()
    }

    fn keep(&mut self, name: &str, bytes: &[u8]) {
        if let Some(writing) = &mut self.writing
            && writing.add(name, bytes).is_err()
        {
            self.writing = None;
        }
    }
}

impl std::fmt::Debug for PackedCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedCache(found: {})", self.is_found())
    }
}

/// Names, sizes and times of the files of a model.
fn identity(model: &Path) -> Result<String> {
    let mut files = vec![model.to_path_buf()];
    if model.is_dir() {
        let entries = fs::read_dir(model).context(|| model.display())?;
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>();
        files = paths.context(|| model.display())?;
        files.retain(|file| {
            file.extension()
                .is_some_and(|kind| ["gguf", "safetensors", "json"].iter().any(|&k| kind == k))
        });
        files.sort();
    }
    let mut identity = String::new();
    for file in files {
        let kind = fs::metadata(&file).context(|| file.display())?;
        let changed = kind.modified().context(|| file.display())?;
        let changed = changed.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        #[cfg(unix)]
        let number = std::os::unix::fs::MetadataExt::ino(&kind);
        #[cfg(not(unix))]
        let number = 0;
        let (path, len) = (file.display(), kind.len());
        let _ = writeln!(identity, "{path} {len} {} {number}", changed.as_nanos());
    }
    Ok(identity)
}

/// A whole file of this identity.
fn read(path: &Path, identity: &str) -> Option<(Mapped, Table)> {
    let map = mmap::map(path).ok()?;
    let bytes = (*map).as_ref();
    let (rest, tail) = bytes.split_at_checked(bytes.len().checked_sub(TAIL_BYTES)?)?;
    let (start, tail) = tail.split_first_chunk()?;
    let (checksum, end) = tail.split_first_chunk()?;
    let table = rest.get(usize::try_from(u64::from_le_bytes(*start)).ok()?..)?;
    if end != END || crc32fast::hash(table) != u32::from_le_bytes(*checksum) {
        return None;
    }
    let table: Table = serde_json::from_slice(table).ok()?;
    (table.identity == identity && is_intact(bytes, &table)).then_some((map, table))
}

/// Whether the bytes of all parts are those that were written.
fn is_intact(bytes: &[u8], table: &Table) -> bool {
    let mut pieces = Vec::new();
    for part in table.parts.values() {
        let Some(end) = part.start.checked_add(part.len) else { return false };
        let Some(bytes) = bytes.get(part.start..end) else { return false };
        if part.checksums.len() != bytes.chunks(PIECE).len() {
            return false;
        }
        pieces.extend(bytes.chunks(PIECE).zip(&part.checksums));
    }
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let are_right = |pieces: &[(&[u8], &u32)]| {
        pieces.iter().all(|(piece, checksum)| crc32fast::hash(piece) == **checksum)
    };
    std::thread::scope(|scope| {
        let shares = pieces.chunks(pieces.len().div_ceil(threads).max(1));
        let checks: Vec<_> = shares.map(|share| scope.spawn(move || are_right(share))).collect();
        checks.into_iter().all(|check| check.join().unwrap_or(false))
    })
}

/// A file that is not whole yet; it goes when this does.
struct Writing {
    path: PathBuf,
    unfinished: PathBuf,
    file: File,
    len: usize,
    table: Table,
}

impl Writing {
    fn new(path: PathBuf, identity: String) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remove_abandoned(&path);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let unfinished = path.with_extension(format!("{}-{count}.part", std::process::id()));
        let file = File::create(&unfinished).context(|| unfinished.display())?;
        Ok(Self { path, unfinished, file, len: 0, table: Table { identity, ..Table::default() } })
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        let end = (self.len + bytes.len()).next_multiple_of(ALIGNMENT);
        self.file.write_all(&[0; ALIGNMENT][..end - self.len - bytes.len()])?;
        let checksums = bytes.chunks(PIECE).map(crc32fast::hash).collect();
        let part = Part { start: self.len, len: bytes.len(), checksums };
        self.table.parts.insert(name.to_owned(), part);
        self.len = end;
        Ok(())
    }

    fn finish(mut self) -> std::io::Result<()> {
        let table = serde_json::to_vec(&self.table)?;
        self.file.write_all(&table)?;
        self.file.write_all(&(self.len as u64).to_le_bytes())?;
        self.file.write_all(&crc32fast::hash(&table).to_le_bytes())?;
        self.file.write_all(END)?;
        fs::rename(&self.unfinished, &self.path)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        // One that is whole has another name.
        let _ = fs::remove_file(&self.unfinished);
    }
}

/// Removes what processes that were killed have left of `path`.
fn remove_abandoned(path: &Path) {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let is_abandoned = |file: &Path| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let changed = fs::metadata(file).and_then(|kind| kind.modified());
        let age = changed.ok().and_then(|changed| changed.elapsed().ok());
        name.starts_with(&stem)
            && file.extension().is_some_and(|kind| kind == "part")
            && age.is_some_and(|age| age > ABANDONED)
    };
    let files = path.parent().and_then(|folder| fs::read_dir(folder).ok());
    for file in files.into_iter().flatten().flatten().map(|file| file.path()) {
        if is_abandoned(&file) {
            let _ = fs::remove_file(file);
        }
    }
}
