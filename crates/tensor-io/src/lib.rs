//! Checkpoints on disk and tensors in memory: safetensors folders, config.json, tokenizer files.
