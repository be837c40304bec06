//! GGUF files: what is read back, what is refused, and that nothing panics.

mod builder;
mod hostile;
mod read;
mod refuse;
mod split;
mod write;
