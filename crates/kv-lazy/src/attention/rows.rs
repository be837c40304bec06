//! What attention reads: per (sequence, KV head) a row of keys and values as they are stored.

use super::element::Element;
use crate::quantise::PackedView;
use half::{bf16, f16};

/// Keys or values `[n, d]` as stored.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    Packed(PackedView<'a>),
}

/// Runs `$body` with `$x` bound to the slice of a float type, or `$packed` with `$view` bound to quantised tokens.
macro_rules! each {
    ($elements:expr, $x:ident => $body:expr, $view:ident => $packed:expr) => {
        match $elements {
            Elements::F32($x) => $body,
            Elements::F16($x) => $body,
            Elements::BF16($x) => $body,
            Elements::Packed($view) => $packed,
        }
    };
}

impl<'a> Elements<'a> {
    /// No tokens.
    pub(crate) const NONE: Self = Self::F32(&[]);

    /// Tokens, of `d` elements each.
    pub(crate) fn tokens(self, d: usize) -> usize {
        each!(self, x => x.len() / d, view => view.tokens())
    }

    /// The tokens `from..to`.
    pub(crate) fn slice(self, from: usize, to: usize, d: usize) -> Self {
        each!(self, x => Element::elements(&x[from * d..to * d]), view => Self::Packed(view.slice(from, to)))
    }

    /// The memory that is read first.
    pub(crate) fn bytes(self) -> &'a [u8] {
        each!(self, x => Element::bytes(x), view => pulp::bytemuck::cast_slice(view.words))
    }

    /// Appends all tokens as f32.
    pub(crate) fn widen_into(self, out: &mut Vec<f32>) {
        each!(self, x => Element::widen_into(x, out), view => view.widen_into(out))
    }

    /// Whether vectors of it come apart into even and odd elements on some machine.
    pub(super) fn interleaved(self) -> bool {
        match self {
            Elements::F32(_) => f32::INTERLEAVED,
            Elements::F16(_) => f16::INTERLEAVED,
            Elements::BF16(_) => bf16::INTERLEAVED,
            Elements::Packed(_) => false,
        }
    }
}

/// Consecutive tokens that are stored alike.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) keys: Elements<'a>,
    pub(crate) values: Elements<'a>,
    /// Tokens.
    pub(crate) len: usize,
}

impl Part<'_> {
    /// No tokens.
    pub(crate) const NONE: Self = Self {
        keys: Elements::NONE,
        values: Elements::NONE,
        len: 0,
    };
}

/// One side of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    Keys,
    Values,
}

/// What one KV head of one sequence holds, and the logical position of each token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowView<'a> {
    /// In the order of slots.
    pub(crate) parts: [Part<'a>; 3],
    pub(crate) ids: &'a [u32],
}

impl<'a> RowView<'a> {
    /// A row that is stored in one piece.
    pub(crate) fn single(
        keys: Elements<'a>,
        values: Elements<'a>,
        ids: &'a [u32],
        d: usize,
    ) -> Self {
        let whole = Part {
            keys,
            values,
            len: keys.tokens(d),
        };
        Self {
            parts: [whole, Part::NONE, Part::NONE],
            ids,
        }
    }

    /// Tokens held.
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(|part| part.len).sum()
    }

    /// The first `len` tokens.
    pub(crate) fn prefix(&self, len: usize, d: usize) -> Self {
        let mut left = len;
        let parts = self.parts.map(|part| {
            let len = part.len.min(left);
            left -= len;
            Part {
                keys: part.keys.slice(0, len, d),
                values: part.values.slice(0, len, d),
                len,
            }
        });
        Self {
            parts,
            ids: &self.ids[..len.min(self.ids.len())],
        }
    }

    /// Pieces of at most `size` tokens that are stored alike.
    pub(crate) fn chunks(&self, size: usize) -> usize {
        self.parts.iter().map(|part| part.len.div_ceil(size)).sum()
    }

    /// The `index`-th of these pieces and the slot of its first token.
    pub(crate) fn chunk(&self, mut index: usize, size: usize, d: usize) -> (usize, Part<'a>) {
        let mut first = 0;
        for part in &self.parts {
            let chunks = part.len.div_ceil(size);
            if index < chunks {
                let from = index * size;
                let to = (from + size).min(part.len);
                let piece = Part {
                    keys: part.keys.slice(from, to, d),
                    values: part.values.slice(from, to, d),
                    len: to - from,
                };
                return (first + from, piece);
            }
            index -= chunks;
            first += part.len;
        }
        (first, Part::NONE)
    }

    /// Keys or values of the slots `from..to` as f32; `scratch` is used where they are not stored so, or not in one piece.
    pub(crate) fn widened<'b>(
        &self,
        which: Which,
        from: usize,
        to: usize,
        d: usize,
        scratch: &'b mut Vec<f32>,
    ) -> &'b [f32]
    where
        'a: 'b,
    {
        scratch.clear();
        let mut first = 0;
        for part in &self.parts {
            let (start, end) = (from.max(first), to.min(first + part.len));
            if start < end {
                let side = match which {
                    Which::Keys => part.keys,
                    Which::Values => part.values,
                };
                let piece = side.slice(start - first, end - first, d);
                if let (Elements::F32(whole), true) = (piece, (start, end) == (from, to)) {
                    return whole;
                }
                piece.widen_into(scratch);
            }
            first += part.len;
        }
        scratch
    }
}
