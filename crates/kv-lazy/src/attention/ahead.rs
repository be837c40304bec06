//! How kernels walk over a chunk: blocks of its tokens, some query heads at once, the next block asked for in time.

use super::machine::prefetch;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Tokens of a block of the narrowest elements.
pub(super) const MOST: usize = 32;

/// Query heads taken together when so many are left: fours, twos and ones.
#[inline(always)]
pub(super) fn heads_at_once(left: usize) -> usize {
    match left {
        4.. => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

/// What the next block will read, asked for piece by piece while this one is computed: all at once would fill the machine's queue of
/// outstanding lines and stop it.
pub(super) struct Ahead<'a> {
    /// Lines that are still to be asked for.
    lines: std::slice::Iter<'a, [u8; LINE]>,
    /// Work that a line stands for, and what was done since the last one was asked for; in bytes under one head.
    line: usize,
    done: usize,
}

impl<'a> Ahead<'a> {
    /// The first `block` bytes of `data`, to be asked for during the work of `heads` heads on as many bytes.
    #[inline(always)]
    pub(super) fn new(data: &'a [u8], block: usize, heads: usize) -> Self {
        Self {
            lines: data[..data.len().min(block)].as_chunks().0.iter(),
            line: LINE * heads,
            done: 0,
        }
    }

    /// Asks for as large a share of the next block as `heads` times `bytes` are of all heads' work on this one.
    #[inline(always)]
    pub(super) fn fetch(&mut self, heads: usize, bytes: usize) {
        self.done += heads * bytes;
        while self.done >= self.line {
            self.done -= self.line;
            if let Some(line) = self.lines.next() {
                prefetch(&line[0]);
            }
        }
    }
}
