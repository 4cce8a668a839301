//! [`PackedCache`]: packed weights, kept in a file from one load of a model to the next.
//!
//! A file has what one layout makes of one model: parts that start on cache lines, a table of them with checksums,
//! and where the table starts. It is written under another name and renamed when it is whole, so any number of
//! processes may write it at once. One that is damaged, or was made from other files, is made anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
#[cfg(unix)]
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

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
/// How files are named that are whole, and those that are not.
const OURS: [&str; 2] = ["packed", "packed-part"];
/// Of a model's name in that of its file.
const MOST_CHARACTERS: usize = 60;

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

/// Which files a model has, as they are now.
#[derive(Debug, PartialEq, Eq)]
pub struct ModelFiles {
    /// As it was given, and without links.
    given: PathBuf,
    model: PathBuf,
    /// Names, sizes, times and numbers.
    identity: String,
}

impl ModelFiles {
    /// Looks at the files of a model, before they are mapped.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Io`] or `NotFound`, which names the path.
    pub fn of(given: &Path) -> Result<Self> {
        let model = given.canonicalize().context(|| given.display())?;
        let identity = identity(&model)?;
        Ok(Self { given: given.to_path_buf(), model, identity })
    }
}

/// Packed weights of one model in one layout: what is there, or what is being written, or neither.
pub struct PackedCache {
    path: PathBuf,
    found: Option<(Mapped, Table)>,
    writing: Option<Writing>,
}

impl PackedCache {
    /// Looks in `folder`, which is made if need be, for what `layout` makes of a model that has been mapped since
    /// its `files` were looked at, and checks it with `threads` threads. Begins to write it where it is not there and
    /// can be written. Nothing is found or kept of files that have changed meanwhile.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Io`] where there can be no such folder.
    pub fn open(folder: &Path, files: &ModelFiles, layout: &str, threads: usize) -> Result<Self> {
        fs::create_dir_all(folder).context(|| folder.display())?;
        let model = &files.model;
        let identity = format!("{layout}\n{}", files.identity);
        let place = crc32fast::hash(format!("{layout}\n{}", model.display()).as_bytes());
        let name = model.file_name().unwrap_or_default().to_string_lossy();
        let name: String = name.chars().take(MOST_CHARACTERS).collect();
        let path = folder.join(format!("{name}-{place:08x}.{}", OURS[0]));
        if ModelFiles::of(&files.given)? != *files {
            return Ok(Self { path, found: None, writing: None });
        }
        remove_abandoned(folder);
        let found = read(&path, &identity, threads);
        let writing = if found.is_none() { Writing::new(&path, identity).ok() } else { None };
        Ok(Self { path, found, writing })
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
            let _ = writing.finish(&self.path);
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
        if self.found.is_some() {
            // The file lacks this part: the next load makes it anew.
            let _ = fs::remove_file(&self.path);
        }
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

fn identity(model: &Path) -> Result<String> {
    let mut files = vec![model.to_path_buf()];
    if model.is_dir() {
        let entries = fs::read_dir(model).context(|| model.display())?;
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>();
        files = paths.context(|| model.display())?;
        files.retain(|file| !OURS.iter().any(|&ours| file.extension().is_some_and(|e| e == ours)));
        files.sort();
    }
    let mut identity = String::new();
    for file in files {
        // Neither a folder nor a link to nothing is one of the model's files.
        let Some(kind) = fs::metadata(&file).ok().filter(fs::Metadata::is_file) else { continue };
        let _ = write!(identity, "{}", file.display());
        let changed = kind.modified().context(|| file.display())?;
        let changed = changed.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let _ = write!(identity, " {} {}", kind.len(), changed.as_nanos());
        // A time that nobody can set.
        #[cfg(unix)]
        let _ = write!(identity, " {} {} {}", kind.ino(), kind.ctime(), kind.ctime_nsec());
        identity.push('\n');
    }
    Ok(identity)
}

/// A whole file of this identity.
fn read(path: &Path, identity: &str, threads: usize) -> Option<(Mapped, Table)> {
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
    (table.identity == identity && is_intact(bytes, &table, threads)).then_some((map, table))
}

/// Whether the bytes of all parts are those that were written.
fn is_intact(bytes: &[u8], table: &Table, threads: usize) -> bool {
    let mut pieces = Vec::new();
    for part in table.parts.values() {
        let Some(end) = part.start.checked_add(part.len) else { return false };
        let Some(bytes) = bytes.get(part.start..end) else { return false };
        if part.checksums.len() != bytes.chunks(PIECE).len() {
            return false;
        }
        pieces.extend(bytes.chunks(PIECE).zip(&part.checksums));
    }
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
    unfinished: PathBuf,
    file: File,
    len: usize,
    table: Table,
}

impl Writing {
    fn new(path: &Path, identity: String) -> std::io::Result<Self> {
        // Names must differ from those of other machines and containers.
        let number = RandomState::new().hash_one(std::process::id());
        let unfinished = path.with_extension(format!("{number:016x}.{}", OURS[1]));
        let file = loop {
            let file = File::create_new(&unfinished)?;
            // As long as it is being written; a file system without locks keeps what is abandoned.
            let _ = file.lock();
            // Another process may have found it before it was locked.
            if unfinished.exists() {
                break file;
            }
        };
        Ok(Self { unfinished, file, len: 0, table: Table { identity, ..Table::default() } })
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        if self.table.parts.contains_key(name) {
            return Err(std::io::ErrorKind::AlreadyExists.into());
        }
        self.file.write_all(bytes)?;
        let end = (self.len + bytes.len()).next_multiple_of(ALIGNMENT);
        self.file.write_all(&[0; ALIGNMENT][..end - self.len - bytes.len()])?;
        let checksums = bytes.chunks(PIECE).map(crc32fast::hash).collect();
        let part = Part { start: self.len, len: bytes.len(), checksums };
        self.table.parts.insert(name.to_owned(), part);
        self.len = end;
        Ok(())
    }

    fn finish(mut self, path: &Path) -> std::io::Result<()> {
        let table = serde_json::to_vec(&self.table)?;
        self.file.write_all(&table)?;
        self.file.write_all(&(self.len as u64).to_le_bytes())?;
        self.file.write_all(&crc32fast::hash(&table).to_le_bytes())?;
        self.file.write_all(END)?;
        fs::rename(&self.unfinished, path)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        // One that is whole has another name now.
        let _ = fs::remove_file(&self.unfinished);
    }
}

/// Removes what processes that ended before they had finished have left.
fn remove_abandoned(folder: &Path) {
    for file in fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.path()) {
        if file.extension().is_none_or(|kind| kind != OURS[1]) {
            continue;
        }
        // Locked until it is gone, so that who has just made it sees that.
        if let Ok(open) = mmap::open(&file)
            && open.try_lock().is_ok()
        {
            let _ = fs::remove_file(&file);
        }
    }
}
