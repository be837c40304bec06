//! A vector laid out for the kernels: floats with zeros behind them, and 8-bit codes in pairs.

/// Groups of four components. Indices of 16 bits then never leave the vector, so that kernels need no bounds checks.
pub(super) const QUADS: usize = 1 << 14;
/// Components that a matrix can read: the last groups are always zero, for padding.
pub(super) const MAX_COLS: usize = 4 * (QUADS - 4);
/// Largest magnitude of a code.
pub(super) const CODES: f32 = 127.0;

/// A vector that block matrices are multiplied by.
#[derive(Debug, Clone)]
pub struct BlockInput {
    pub(super) floats: Box<[[f32; 4]; QUADS]>,
    /// Codes, two in each integer; filled by [`quantise`](Self::quantise).
    pub(super) pairs: Box<[[i32; 2]; QUADS]>,
    pub(super) codes: Box<[[i16; 4]; QUADS]>,
    /// What a code of 1 stands for.
    pub(super) step: f32,
    /// Components that were set.
    pub(super) len: usize,
    /// Groups that may hold something.
    quads: usize,
    coded: usize,
}

impl Default for BlockInput {
    fn default() -> Self {
        Self {
            floats: zeros(),
            pairs: zeros(),
            codes: zeros(),
            step: 0.0,
            len: 0,
            quads: 0,
            coded: 0,
        }
    }
}

fn zeros<T: Copy + Default, const N: usize>() -> Box<[[T; N]; QUADS]> {
    let all = vec![[T::default(); N]; QUADS].into_boxed_slice();
    all.try_into().ok().expect("QUADS groups")
}

impl BlockInput {
    /// A vector without components.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes over the components.
    ///
    /// # Panics
    /// There are more than 65,520.
    pub fn set(&mut self, x: &[f32]) {
        assert!(x.len() <= MAX_COLS, "{} components", x.len());
        let floats = self.floats.as_flattened_mut();
        floats[..x.len()].copy_from_slice(x);
        let end = 4 * self.quads;
        if end > x.len() {
            floats[x.len()..end].fill(0.0);
        }
        self.quads = x.len().div_ceil(4);
        self.len = x.len();
    }

    /// Rounds the components to codes, `largest` being the largest magnitude that they can have (`None`: that they do have).
    pub fn quantise(&mut self, largest: Option<f32>) {
        let floats = &self.floats.as_flattened()[..4 * self.quads];
        let largest = largest.unwrap_or_else(|| floats.iter().fold(0.0, |m, v| v.abs().max(m)));
        let scale = if largest > 0.0 { CODES / largest } else { 0.0 };
        self.step = largest / CODES;
        let end = self.quads.max(self.coded);
        let codes = self.codes.iter_mut().zip(self.pairs.iter_mut());
        for (x, (codes, pairs)) in self.floats[..end].iter().zip(codes) {
            *codes = x.map(|v| nearest((v * scale).clamp(-CODES, CODES)) as i16);
            *pairs = [pair(codes[0], codes[1]), pair(codes[2], codes[3])];
        }
        self.coded = self.quads;
    }
}

/// The nearest integer of a small number, without a call.
#[inline(always)]
fn nearest(v: f32) -> f32 {
    // 1.5 * 2^23: sums with it are integers.
    const ROUND: f32 = 12_582_912.0;
    (v + ROUND) - ROUND
}

/// Two codes in one integer.
#[inline(always)]
pub(super) fn pair(first: i16, second: i16) -> i32 {
    i32::from(first as u16) | i32::from(second) << 16
}
