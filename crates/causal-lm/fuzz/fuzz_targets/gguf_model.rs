//! No bytes make a model of a GGUF file panic, or take memory for what the file only counts.

#![no_main]

#[path = "../../tests/common/allocator.rs"]
mod allocator;

use causal_lm::candle_core::{DType, Device};
use causal_lm::{Decoder, Execution, Result, gguf};
use libfuzzer_sys::fuzz_target;
use tensor_io::gguf::Gguf;

/// Names of a tensor in memory are many times its entry in a file.
const FACTOR: usize = 64;
const SMALL: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let copy = input.to_vec();
    let (peak, opened, _) = allocator::measured(|| open(copy));
    if let Err(error) = opened {
        assert!(!error.to_string().contains('\n'));
    }
    assert!(peak <= FACTOR * input.len() + SMALL, "{peak} bytes for a file of {}", input.len());
});

/// Opens the model and loads its first block and its head, packed.
fn open(bytes: Vec<u8>) -> Result<()> {
    let checkpoint = gguf::from_file(Gguf::from_bytes("fuzz.gguf", bytes)?)?;
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?.packed(Execution::default());
    decoder.block(0)?;
    decoder.embed(&[&[0, 1]])?;
    decoder.head().map(drop)
}
