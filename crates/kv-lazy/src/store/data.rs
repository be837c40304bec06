//! One side of some tokens on the CPU, in one of the types that a cache stores.

use super::Relocation;
use crate::attention::{Elements, read};
use crate::error::Result;
use crate::quantise::{Packed, Side};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use std::mem::size_of;

/// Keys or values `[n, d]`.
#[derive(Debug, Clone)]
pub(super) enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    Packed(Packed),
}

/// Runs `$body` with `$x` bound to the vector of a float type, or `$packed` with `$p` bound to quantised tokens.
macro_rules! each {
    ($data:expr, $x:ident => $body:expr, $p:ident => $packed:expr) => {
        match $data {
            Data::F32($x) => $body,
            Data::F16($x) => $body,
            Data::BF16($x) => $body,
            Data::Packed($p) => $packed,
        }
    };
}

impl Data {
    /// Room for tokens of `side`; quantised if `packed` and the side is.
    pub(super) fn new(side: Side, packed: bool) -> Self {
        match side {
            Side::Packed(format) if packed => Self::Packed(Packed::new(format)),
            side => match side.dtype() {
                DType::F32 => Self::F32(Vec::new()),
                DType::BF16 => Self::BF16(Vec::new()),
                _ => Self::F16(Vec::new()),
            },
        }
    }

    pub(super) fn view(&self) -> Elements<'_> {
        match self {
            Self::F32(x) => Elements::F32(x),
            Self::F16(x) => Elements::F16(x),
            Self::BF16(x) => Elements::BF16(x),
            Self::Packed(packed) => Elements::Packed(packed.view()),
        }
    }

    /// Appends tokens, which are quantised where this is packed. Floats must be of this type.
    pub(super) fn extend(&mut self, tokens: Elements<'_>) {
        match (self, tokens) {
            (Self::F32(to), Elements::F32(from)) => to.extend_from_slice(from),
            (Self::F16(to), Elements::F16(from)) => to.extend_from_slice(from),
            (Self::BF16(to), Elements::BF16(from)) => to.extend_from_slice(from),
            (Self::Packed(to), from) => {
                let mut wide = Vec::new();
                from.widen_into(&mut wide);
                let fits = to.push(&wide);
                debug_assert!(fits, "the range was checked when the tokens were appended");
            }
            (to, from) => unreachable!("{from:?} appended to {to:?}"),
        }
    }

    /// Replaces a token by another.
    pub(super) fn overwrite(&mut self, slot: usize, token: Elements<'_>, d: usize) {
        let at = slot * d..(slot + 1) * d;
        match (self, token) {
            (Self::F32(to), Elements::F32(from)) => to[at].copy_from_slice(from),
            (Self::F16(to), Elements::F16(from)) => to[at].copy_from_slice(from),
            (Self::BF16(to), Elements::BF16(from)) => to[at].copy_from_slice(from),
            (to, from) => unreachable!("{from:?} over {to:?}"),
        }
    }

    /// Moves and drops tokens.
    pub(super) fn apply(&mut self, moves: &Relocation, d: usize) {
        each!(self, x => moves.apply(x, d), packed => packed.apply(moves));
    }

    /// Drops the first `tokens`, which are not quantised.
    pub(super) fn drop_first(&mut self, tokens: usize, d: usize) {
        each!(self, x => { x.drain(..tokens * d); }, packed => unreachable!("{packed:?} is not divided"));
    }

    /// Tokens that there is room for.
    pub(super) fn capacity(&self, d: usize) -> usize {
        each!(self, x => x.capacity() / d, packed => packed.capacity())
    }

    /// Makes room for `tokens` more.
    pub(super) fn reserve(&mut self, tokens: usize, d: usize) {
        each!(self, x => x.reserve_exact(tokens * d), packed => packed.reserve(tokens));
    }

    /// Gives back room beyond `tokens`.
    pub(super) fn shrink_to(&mut self, tokens: usize, d: usize) {
        each!(self, x => x.shrink_to(tokens.saturating_mul(d)), packed => packed.shrink_to(tokens));
    }

    /// Bytes occupied, filled or not.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::F32(x) => x.capacity() * size_of::<f32>(),
            Self::F16(x) => x.capacity() * size_of::<f16>(),
            Self::BF16(x) => x.capacity() * size_of::<bf16>(),
            Self::Packed(packed) => packed.bytes(),
        }
    }
}

/// Calls `f` with the elements of a CPU tensor in the type in which `side` keeps tokens that are not quantised.
pub(super) fn read_as<R>(
    side: Side,
    tensor: &Tensor,
    f: impl FnOnce(Elements<'_>) -> R,
) -> Result<R> {
    match side.dtype() {
        DType::F32 => read::<f32, _>(tensor, |x| f(Elements::F32(x))),
        DType::BF16 => read::<bf16, _>(tensor, |x| f(Elements::BF16(x))),
        _ => read::<f16, _>(tensor, |x| f(Elements::F16(x))),
    }
}

/// Whether tokens can be stored: as floats everything can, as integers what is finite and stays within f16 when it is rotated.
pub(super) fn fits(side: Side, tokens: Elements<'_>) -> bool {
    let (Side::Packed(format), Elements::F16(tokens)) = (side, tokens) else {
        return true;
    };
    // A rotation of b elements gives at most √b times the largest.
    let most = f32::from(f16::MAX) / (format.rotation as f32).sqrt();
    let magnitude = |x: &f16| x.to_bits() & 0x7fff;
    // NaN and infinity have larger bits than every number.
    let within = |most: f16| tokens.iter().all(|x| magnitude(x) <= most.to_bits());
    if within(f16::from_f32(most)) {
        return true;
    }
    // Rows near the end of f16's range mostly fit as well: what counts are their own scales.
    let mut wide = Vec::new();
    Elements::F16(tokens).widen_into(&mut wide);
    format.channel == 0 && within(f16::MAX) && Packed::new(format).push(&wide)
}
