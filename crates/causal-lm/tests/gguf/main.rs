//! Decoders that run from GGUF files.

#[path = "../common/mod.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod common;

mod adapter;
mod agree;
mod golden;
mod made;
mod refuse;
mod tokenizer;
