//! No bytes make a model of a GGUF file panic, or take memory for what the file only counts.

#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use causal_lm::candle_core::{DType, Device};
use causal_lm::{Decoder, Execution, Result, gguf};
use libfuzzer_sys::fuzz_target;
use tensor_io::gguf::Gguf;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, with the most that this thread held.
struct Counting;

fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        PEAK.with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; only its size is counted, in cells that need no allocation
// of their own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Names of a tensor in memory are many times its entry in a file.
const FACTOR: usize = 64;
const SMALL: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let copy = input.to_vec();
    let before = HELD.get();
    PEAK.set(before);
    if let Err(error) = open(copy) {
        assert!(!error.to_string().contains('\n'));
    }
    let peak = (PEAK.get() - before) as usize;
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
