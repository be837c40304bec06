//! Decoders that run from GGUF files.

#[path = "../common/mod.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod common;

#[path = "../common/allocator.rs"]
mod allocator;
#[path = "../common/random_gguf.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod random_gguf;

mod adapter;
mod agree;
mod golden;
mod hostile;
mod made;
mod memory;
mod refuse;
mod tokenizer;
