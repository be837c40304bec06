//! Reading forward through bytes, every length checked against what remains before anything is allocated.

use super::GgufError;

/// A position in the bytes of a file.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Bytes left.
    pub(crate) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `count` bytes; `what` names them in the error.
    pub(crate) fn take(
        &mut self,
        count: u64,
        what: impl FnOnce() -> String,
    ) -> Result<&'a [u8], GgufError> {
        let taken = usize::try_from(count)
            .ok()
            .and_then(|count| self.bytes[self.at..].get(..count));
        let Some(taken) = taken else {
            return Err(GgufError::Ended {
                what: what(),
                offset: self.at as u64,
                needed: count,
                left: self.left() as u64,
            });
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(
        &mut self,
        what: impl FnOnce() -> String,
    ) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub(crate) fn u32(&mut self, what: impl FnOnce() -> String) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: impl FnOnce() -> String) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Length and bytes of a string.
    pub(crate) fn string(&mut self, what: impl Fn() -> String) -> Result<&'a [u8], GgufError> {
        let length = self.u64(&what)?;
        self.take(length, what)
    }
}
