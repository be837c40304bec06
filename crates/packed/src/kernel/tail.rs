//! What is added to the product of a tile before it is written: a product of low rank, and a bias.

use crate::machine::{Kernel, Machine};
use crate::output::Claim;
use crate::tile::TILE_ROWS;

/// How factors of low rank are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Float {
    F32,
    F16,
    BF16,
}

impl Float {
    /// Bytes of a value.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// 16 values.
    #[inline(always)]
    pub(crate) fn load<M: Machine>(self, m: M, bytes: &[u8]) -> M::F {
        match self {
            Self::F32 => m.load_f_bytes(bytes.first_chunk().expect("16 values")),
            Self::F16 => m.load_f16(bytes.first_chunk().expect("16 values")),
            Self::BF16 => m.load_bf16(bytes.first_chunk().expect("16 values")),
        }
    }
}

/// B of y += B (A x), 16 rows interleaved: value k of all rows of a tile, for one k after the other.
#[derive(Clone, Debug)]
pub(crate) struct SideTiles {
    float: Float,
    rank: usize,
    bytes: Vec<u8>,
}

impl SideTiles {
    /// From B `[rows, rank]`, row-major in the bytes of `float`.
    pub(crate) fn new(float: Float, rank: usize, b: &[u8]) -> Self {
        let width = float.bytes();
        let rows = b.len() / (rank * width).max(1);
        let mut bytes = vec![0; rows.next_multiple_of(TILE_ROWS) * rank * width];
        for (row, values) in b.chunks_exact((rank * width).max(1)).enumerate() {
            let (tile, lane) = (row / TILE_ROWS, row % TILE_ROWS);
            for (k, value) in values.chunks_exact(width).enumerate() {
                let at = ((tile * rank + k) * TILE_ROWS + lane) * width;
                bytes[at..at + width].copy_from_slice(value);
            }
        }
        Self { float, rank, bytes }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// A value of B.
    pub(crate) fn value(&self, row: usize, k: usize) -> f32 {
        let (tile, lane) = (row / TILE_ROWS, row % TILE_ROWS);
        let width = self.float.bytes();
        let at = ((tile * self.rank + k) * TILE_ROWS + lane) * width;
        let bytes = &self.bytes[at..at + width];
        match (self.float, bytes) {
            (Float::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
            (Float::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
            (_, bytes) => f32::from_le_bytes(*bytes.first_chunk().expect("four bytes")),
        }
    }

    fn tile(&self, tile: usize) -> impl Iterator<Item = &[u8]> {
        let step = TILE_ROWS * self.float.bytes();
        self.bytes[tile * self.rank * step..][..self.rank * step].chunks_exact(step)
    }
}

/// What is added to a product.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tail<'a> {
    /// B, and A x for all tokens, `[tokens, rank]`, with the scale.
    pub(crate) side: Option<(&'a SideTiles, &'a [f32])>,
    /// One value for each row, filled up to whole tiles.
    pub(crate) bias: Option<&'a [f32]>,
}

/// Adds a tail to the rows and tokens of a claim, whose products are written: first the product of low rank, summed by
/// itself in ascending order, then the bias.
pub(crate) struct AddTail<'a, 'c> {
    pub(crate) tail: Tail<'a>,
    pub(crate) claim: &'a mut Claim<'c>,
}

impl Kernel for AddTail<'_, '_> {
    type Output = ();
    const BYTES: bool = false;

    #[inline(always)]
    fn run<M: Machine>(mut self, m: M) {
        let tokens = self.claim.tokens();
        for tile in self.claim.tiles() {
            let mut token = 0;
            while token < tokens {
                if tokens - token >= 4 {
                    self.some::<M, 4>(m, tile, token);
                    token += 4;
                } else {
                    self.some::<M, 1>(m, tile, token);
                    token += 1;
                }
            }
        }
    }
}

impl AddTail<'_, '_> {
    #[inline(always)]
    fn some<M: Machine, const T: usize>(&mut self, m: M, tile: usize, token: usize) {
        let mut acc = [m.splat_f(0.0); T];
        for (t, acc) in acc.iter_mut().enumerate() {
            *acc = load_part(m, self.claim.part(tile, token + t));
        }
        if let Some((b, ax)) = self.tail.side {
            let ax = &ax[token * b.rank..][..T * b.rank];
            let mut sums = [m.splat_f(0.0); T];
            for (k, b_k) in b.tile(tile).enumerate() {
                let b_k = b.float.load(m, b_k);
                for (t, sum) in sums.iter_mut().enumerate() {
                    *sum = m.fma(b_k, m.splat_f(ax[t * b.rank + k]), *sum);
                }
            }
            for (acc, sum) in acc.iter_mut().zip(sums) {
                *acc = m.add_f(*acc, sum);
            }
        }
        if let Some(bias) = self.tail.bias {
            let bias = bias[tile * TILE_ROWS..].first_chunk().expect("whole tiles");
            let bias = m.load_f(bias);
            for acc in &mut acc {
                *acc = m.add_f(*acc, bias);
            }
        }
        for (t, sum) in acc.into_iter().enumerate() {
            store(m, sum, self.claim.part(tile, token + t));
        }
    }
}

/// Sums of a tile that were written.
#[inline(always)]
pub(crate) fn load_part<M: Machine>(m: M, from: &[f32]) -> M::F {
    match from.first_chunk() {
        Some(from) => m.load_f(from),
        None => {
            let mut values = [0.0; TILE_ROWS];
            values[..from.len()].copy_from_slice(from);
            m.load_f(&values)
        }
    }
}

/// Writes sums of a tile, as many as it has rows.
#[inline(always)]
pub(crate) fn store<M: Machine>(m: M, sum: M::F, to: &mut [f32]) {
    match to.first_chunk_mut() {
        Some(to) => m.store_f(sum, to),
        None => {
            let mut values = [0.0; TILE_ROWS];
            m.store_f(sum, &mut values);
            to.copy_from_slice(&values[..to.len()]);
        }
    }
}
