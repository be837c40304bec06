//! Read-only files in memory: the only unsafe code of the crate.
//!
//! A mapped page counts toward the resident memory of the process from the first time it is read until it is released.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

/// The bytes of a file, read from disk when they are looked at.
#[derive(Debug)]
pub(crate) struct MappedFile(Mmap);

impl MappedFile {
    /// Maps a file. An empty file maps to no bytes.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is read-only and only ever handed out as shared bytes, for which every bit pattern is
        // valid. What remains is the hazard of every mapping: a process that changes the file in place while it is
        // mapped changes these bytes, and one that truncates it makes reading them fault. Checkpoints are replaced by
        // renaming, never in place, by this crate and by the other tools of the ecosystem; the crate's documentation
        // passes the condition on to the user.
        let map = unsafe { Mmap::map(file) }?;
        Ok(Self(map))
    }

    /// Lets go of the memory that holds `range`; it is read from the file again when it is next looked at.
    #[cfg(unix)]
    pub(crate) fn release(&self, range: Range<usize>) {
        // SAFETY: DontNeed drops pages. In a private writable mapping that would lose what was written to them, hence
        // "unchecked"; this mapping is of a file and read-only, so the pages come back with the same bytes on the next
        // access and slices that are still borrowed stay valid.
        let advised = unsafe {
            self.0.unchecked_advise_range(
                memmap2::UncheckedAdvice::DontNeed,
                range.start,
                range.len(),
            )
        };
        // The advice saves memory and nothing depends on it.
        drop(advised);
    }

    /// No such advice on this system: the pages stay until the system wants them.
    #[cfg(not(unix))]
    pub(crate) fn release(&self, _range: Range<usize>) {}
}

/// Part of shared bytes, which it keeps alive: of a mapped file, or of memory.
pub(crate) struct SharedPart<T> {
    pub(crate) whole: Arc<T>,
    pub(crate) range: Range<usize>,
}

impl<T: Deref<Target = [u8]>> AsRef<[u8]> for SharedPart<T> {
    fn as_ref(&self) -> &[u8] {
        &self.whole[self.range.clone()]
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
