//! Sizes of what a checkpoint holds.

use anyhow::Result;
use tensor_io::Checkpoint;

/// Bytes of some tensors, decoded where the file has blocks; [`Checkpoint::total_bytes`] counts those of the file.
pub(super) fn decoded_bytes<'n>(
    checkpoint: &Checkpoint,
    names: impl Iterator<Item = &'n str>,
) -> Result<u64> {
    let mut bytes = 0;
    for name in names {
        bytes += checkpoint.info(name)?.bytes as u64;
    }
    Ok(bytes)
}
