//! Structured pruning of Hugging Face decoders: FLAP.
