//! How much is in memory at once.

/// Bytes of hidden states; a longer text goes through the model in several groups.
pub(crate) const HIDDEN_BYTES: usize = 512 << 20;

/// Logits.
pub(crate) const LOGITS: usize = 32 << 20;
