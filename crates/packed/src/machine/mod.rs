//! The operations that the kernels are written in, for each set of instructions.
//!
//! A kernel is written once, for vectors of 16 lanes, one for each row of a tile. Integer operations are exact and each
//! operation on floats rounds every lane alone, so all machines give the same bits.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod bf16;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;

use crate::tile::TILE_ROWS;

/// Lanes of all vectors.
const LANES: usize = TILE_ROWS;

/// A set of instructions. A value of the type is the proof that the processor has them.
pub(crate) trait Machine: Copy + Send + Sync {
    /// 16 integers of 32 bits, or 64 bytes.
    type I: Copy;
    /// 16 floats.
    type F: Copy;
    /// 16 sums of products of bytes, not finished.
    type D: Copy;
    /// The values of codes.
    type Table: Copy;

    /// Whether a product of 8-bit codes takes them less 128.
    const CENTRED_BYTES: bool;
    /// Whether registers hold two vectors and twelve tokens of products of floats, else one and six.
    const WIDE: bool;
    /// Whether registers hold the sums of two tokens.
    const TWO: bool;
    /// Whether registers hold the sums of eight tokens.
    const EIGHT: bool;
    /// Whether kernels are compiled to code without loops within a block.
    const STRAIGHT: bool;
    /// Rows of a dense matrix that are multiplied at once by one token.
    const DENSE_ROWS: usize;

    /// 64 bytes.
    fn load(self, bytes: &[u8; 64]) -> Self::I;
    /// A byte for each lane.
    fn load_u8(self, bytes: &[u8; LANES]) -> Self::I;
    /// A signed byte for each lane.
    fn load_i8(self, bytes: &[u8; LANES]) -> Self::I;
    /// The same in all lanes.
    fn splat(self, value: i32) -> Self::I;
    /// Lane by lane.
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    /// Lane by lane.
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Lanes shifted right, filled with zeros. `bits` must be a constant for speed.
    fn shift_right(self, a: Self::I, bits: u32) -> Self::I;
    /// Lanes shifted left.
    fn shift_left(self, a: Self::I, bits: u32) -> Self::I;
    /// Sum of lanes.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Product of lanes.
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Converts lanes of magnitude below 2^24, exactly.
    fn to_f(self, a: Self::I) -> Self::F;
    /// For each of 64 bytes below 16 the level of `IQ4_NL` plus 128.
    fn levels(self, codes: Self::I) -> Self::I;

    /// How many steps a partial sum holds without a flush, for codes of so many bits.
    fn steps(bits: u32) -> usize;
    /// A sum that starts at `start`.
    fn dot_begin(self, start: Self::I) -> Self::D;
    /// Adds to each lane the products of its four codes and the four signed bytes of `quad`. With
    /// [`Machine::CENTRED_BYTES`], 128 is first taken from codes of 8 bits.
    fn dot(self, sum: Self::D, codes: Self::I, quad: i32, bits: u32) -> Self::D;
    /// Makes room for further steps.
    fn dot_flush(self, sum: Self::D) -> Self::D;
    /// The finished sum, after a flush.
    fn dot_end(self, sum: Self::D) -> Self::I;

    /// The same in all lanes.
    fn splat_f(self, value: f32) -> Self::F;
    /// 16 floats.
    fn load_f(self, values: &[f32; LANES]) -> Self::F;
    /// 16 floats, little-endian.
    fn load_f_bytes(self, bytes: &[u8; 64]) -> Self::F;
    /// 16 halves.
    fn load_f16(self, bytes: &[u8; 32]) -> Self::F;
    /// Halves of 16 bits in the upper half of floats: the low ones of the lanes, then the high ones.
    fn bf16_pairs(self, pairs: Self::I) -> [Self::F; 2];
    /// 16 brain floats.
    fn load_bf16(self, bytes: &[u8; 32]) -> Self::F;
    /// Writes 16 floats.
    fn store_f(self, value: Self::F, to: &mut [f32; LANES]);
    /// Lane by lane.
    fn add_f(self, a: Self::F, b: Self::F) -> Self::F;
    /// Lane by lane.
    fn mul_f(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Lane j of vector i becomes lane i of vector j.
    #[inline(always)]
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        let mut square = [[0.0; LANES]; LANES];
        for (values, row) in square.iter_mut().zip(rows) {
            self.store_f(row, values);
        }
        std::array::from_fn(|j| self.load_f(&std::array::from_fn(|i| square[i][j])))
    }
    /// The sum of the lanes: lanes 8 apart, then 4, 2, 1.
    fn reduce(self, a: Self::F) -> f32;

    /// Values of codes of so many bits: the code less `zero`.
    fn table(self, bits: u32, zero: i32) -> Self::Table;
    /// The values of the codes that start at bit `shift` of each lane. `shift` and `bits` must be constants for speed.
    fn value(self, lanes: Self::I, shift: u32, bits: u32, table: Self::Table) -> Self::F;
}

/// Asks for the line of the cache at `at`, which need not be a valid address, where the compiler has an instruction for it.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every processor of this architecture has the instruction, and it never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Something to be compiled for each machine. Implementations of `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    /// Result.
    type Output;
    /// Whether it multiplies bytes.
    const BYTES: bool;
    /// Runs it.
    fn run<M: Machine>(self, machine: M) -> Self::Output;
}
