//! Hugging Face decoder models, run block by block, with taps on linear inputs.
