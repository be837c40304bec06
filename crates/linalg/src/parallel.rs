//! How work is divided: by the shape of a matrix, never by the number of threads.

use faer::Par;
use faer::dyn_stack::{MemBuffer, MemStack, StackReq};

/// Pieces of every factorisation: with more, threads wait for memory; a few more pieces than threads cost little.
const PIECES: usize = 8;

/// Below this size the work of one column is too little to be divided.
const SEQUENTIAL: usize = 128;

/// faer's parallelism for a factorisation of this size. faer's own default divides by the number of threads, and adds up
/// what the threads found, so that rounding would depend on it.
pub(crate) fn pieces(size: usize) -> Par {
    if size < SEQUENTIAL {
        Par::Seq
    } else {
        Par::rayon(PIECES)
    }
}

pub(crate) fn with_memory<T>(needed: StackReq, run: impl FnOnce(&mut MemStack) -> T) -> T {
    run(MemStack::new(&mut MemBuffer::new(needed)))
}
