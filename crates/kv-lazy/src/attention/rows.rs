//! What attention reads: per (sequence, KV head) a row of keys and values as they are stored.

use super::element::Element;
use half::{bf16, f16};
use std::borrow::Cow;

/// Keys or values `[n, d]` as stored.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// Runs `$body` with `$x` bound to the slice of either type.
macro_rules! each {
    ($elements:expr, $x:ident => $body:expr) => {
        match $elements {
            Elements::F32($x) => $body,
            Elements::F16($x) => $body,
            Elements::BF16($x) => $body,
        }
    };
}

impl<'a> Elements<'a> {
    /// Tokens, of `d` elements each.
    pub(crate) fn tokens(self, d: usize) -> usize {
        each!(self, x => x.len() / d)
    }

    /// The tokens `from..to`.
    pub(crate) fn slice(self, from: usize, to: usize, d: usize) -> Self {
        each!(self, x => Element::elements(&x[from * d..to * d]))
    }

    /// The memory that is read first.
    pub(crate) fn bytes(self) -> &'a [u8] {
        each!(self, x => Element::bytes(x))
    }

    /// All tokens as f32; `scratch` is used where they are not stored so.
    pub(crate) fn widened<'b>(self, scratch: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        each!(self, x => match Element::widened(x) {
            Cow::Borrowed(x) => x,
            Cow::Owned(x) => {
                *scratch = x;
                scratch
            }
        })
    }

    /// Whether vectors of it come apart into even and odd elements on some machine.
    pub(crate) fn interleaved(self) -> bool {
        match self {
            Elements::F32(_) => f32::INTERLEAVED,
            Elements::F16(_) => f16::INTERLEAVED,
            Elements::BF16(_) => bf16::INTERLEAVED,
        }
    }
}

/// What one KV head of one sequence holds, and the logical position of each token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowView<'a> {
    pub(crate) keys: Elements<'a>,
    pub(crate) values: Elements<'a>,
    pub(crate) ids: &'a [u32],
}

impl<'a> RowView<'a> {
    /// Tokens held.
    pub(crate) fn len(&self, d: usize) -> usize {
        self.keys.tokens(d)
    }

    /// The first `len` tokens.
    pub(crate) fn prefix(&self, len: usize, d: usize) -> Self {
        Self {
            keys: self.keys.slice(0, len, d),
            values: self.values.slice(0, len, d),
            ids: &self.ids[..len.min(self.ids.len())],
        }
    }
}
