//! Checkpoints whose tensors are not in files of safetensors or PyTorch, but decoded from something else when asked for.

use std::any::Any;
use std::borrow::Cow;
use std::ops::Range;

use crate::error::Result;

/// Where a [`Checkpoint`](crate::Checkpoint) takes its tensors from, if not from files in the layout of Hugging Face: a
/// GGUF file under the names of Hugging Face, quantised weights under the names of the dense ones.
///
/// Names, dtypes and shapes are fixed when the checkpoint is made ([`Checkpoint::from_source`]); all methods are called
/// with those names only.
///
/// [`Checkpoint::from_source`]: crate::Checkpoint::from_source
pub trait TensorSource: Any + Send + Sync {
    /// The tensor in its declared dtype and shape: little endian, row-major.
    ///
    /// # Errors
    /// What decoding reports, naming file and tensor.
    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>>;

    /// As [`TensorSource::bytes`], for rows that exist, all dimensions but the last counted as such.
    ///
    /// # Errors
    /// What decoding reports.
    fn rows(&self, name: &str, rows: &[usize]) -> Result<Vec<u8>>;

    /// As [`TensorSource::bytes`], for neighbouring rows that exist, all dimensions but the last counted as rows: one matrix of
    /// several. Whoever can decode them without the others does.
    ///
    /// # Errors
    /// What decoding reports.
    fn row_range(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let rows: Vec<usize> = rows.collect();
        Ok(Cow::Owned(self.rows(name, &rows)?))
    }

    /// The tensor as it is stored, for hashes.
    ///
    /// # Errors
    /// What reading reports.
    fn stored(&self, name: &str) -> Result<Cow<'_, [u8]>>;

    /// Size of all tensors as stored, in bytes.
    fn total_bytes(&self) -> u64;

    /// Lets go of the memory behind the tensor.
    fn release(&self, name: &str);

    /// As [`TensorSource::release`], for neighbouring rows, all dimensions but the last counted as such. Where rows cannot be
    /// let go of by themselves they stay until their tensor is released.
    fn release_rows(&self, _name: &str, _rows: Range<usize>) {}

    /// Tokenizer and generation files by name, for a folder in the layout of Hugging Face.
    ///
    /// # Errors
    /// Why there are none, where a folder without them would be useless.
    fn files(&self) -> Result<Vec<(String, Vec<u8>)>>;

    /// The source as it is, for callers that know its type.
    fn as_any(&self) -> &dyn Any;
}
