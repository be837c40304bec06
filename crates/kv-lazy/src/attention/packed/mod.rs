//! The kernel for quantised keys and values: codes are widened in registers, a word of 4 or 8 of them in each lane.
//!
//! A code c of b bits becomes the float 1 + c/2^b by putting it into the top of the mantissa of 1, which takes a shift, a mask and an or. With
//! x̂ = s·c + offset = 2^b·s·f + (offset − 2^b·s), scores need one factor per group and the sum of the query over each group, and the mix of values
//! one more number per group. Shifting a vector of words by k codes gives the elements at stride 4 or 8 from k on, so queries are brought into
//! that order once per chunk, and outputs back.
//!
//! What follows from scales is computed once for a block of tokens and all heads. One factor serves one, two or four vectors; where groups are no such number of whole
//! vectors each lane has its own, which is slower. Tokens that are no whole vectors are copied and filled up.

mod factors;
mod lines;
mod mix;
mod scores;

use super::ahead::MOST;
use crate::quantise::{Format, PackedView};
use pulp::{Arch, Simd, WithSimd};

pub(super) use mix::PackedMix;
pub(super) use scores::PackedScores;

/// Numbers per lane that the kernels need for themselves with heads of `d`: two arranged rows and a number per group.
pub(super) fn scratch(d: usize) -> usize {
    2 * arranged(d) + d / 8
}

/// Elements of an arranged row: whole vectors of words on every machine.
fn arranged(d: usize) -> usize {
    d.next_multiple_of(128)
}

/// Runs `kernel` with the widest vectors that tokens fill, eight words at least where the machine has them. Not by the number of heads: sums must not depend on how
/// many queries are asked at once.
fn dispatch(format: Format, kernel: impl WithSimd<Output = ()>) {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = pulp::x86::V4::try_new() {
            return match format.words() >= 16 {
                true => pulp::Simd::vectorize(simd, kernel),
                false => pulp::Simd::vectorize(simd, Narrow(kernel)),
            };
        }
        if let Some(simd) = pulp::x86::V3::try_new() {
            return pulp::Simd::vectorize(simd, kernel);
        }
    }
    let _ = format;
    Arch::new().dispatch(kernel);
}

/// A kernel with vectors of eight words on a machine with wider ones, whose other registers and instructions it still uses.
#[cfg(target_arch = "x86_64")]
struct Narrow<K>(K);

#[cfg(target_arch = "x86_64")]
impl<K: WithSimd> WithSimd for Narrow<K> {
    type Output = K::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> K::Output {
        let any: &dyn std::any::Any = &simd;
        match any.downcast_ref::<pulp::x86::V4>() {
            Some(simd) => self.0.with_simd::<pulp::x86::V3>(**simd),
            None => self.0.with_simd(simd),
        }
    }
}

/// 1 + c/2^b for the `k`-th code of each word, `N` codes a word.
#[inline(always)]
fn code<S: Simd, const N: usize>(simd: S, words: S::u32s, k: usize) -> S::f32s {
    const ONE: u32 = 0x3f80_0000;
    let bits = 32 / N as u32;
    let (at, top) = (bits * k as u32, 23 - bits);
    let moved = if at <= top {
        simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(top - at))
    } else {
        simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(at - top))
    };
    let mask = simd.splat_u32s(((1 << bits) - 1) << top);
    let mantissa = simd.and_u32s(moved, mask);
    simd.transmute_f32s_u32s(simd.or_u32s(mantissa, simd.splat_u32s(ONE)))
}

/// The `h`-th of `heads` rows in the order in which codes come out: vector ((b·N) + k)·heads + h holds the elements (b·L + l)·N + k in its L lanes.
#[inline(always)]
fn arrange<S: Simd, const N: usize>(row: &[f32], (h, heads): (usize, usize), to: &mut [f32]) {
    for (b, word) in row.chunks(N * S::F32_LANES).enumerate() {
        let to = &mut to[b * N * heads * S::F32_LANES..(b + 1) * N * heads * S::F32_LANES];
        for (l, codes) in word.as_chunks::<N>().0.iter().enumerate() {
            for (k, &x) in codes.iter().enumerate() {
                to[(k * heads + h) * S::F32_LANES + l] = x;
            }
        }
    }
}

/// The reverse of [`arrange`] for one row.
#[inline(always)]
fn bring_back<S: Simd, const N: usize>(from: &[f32], row: &mut [f32]) {
    for (b, from) in from.chunks_exact(N * S::F32_LANES).enumerate() {
        for (k, from) in from.chunks_exact(S::F32_LANES).enumerate() {
            for (l, &x) in from.iter().enumerate() {
                if let Some(to) = row.get_mut((b * S::F32_LANES + l) * N + k) {
                    *to = x;
                }
            }
        }
    }
}

/// What is computed from quantised tokens.
pub(super) trait Kernel {
    fn format(&self) -> Format;

    /// With `N` codes a word.
    fn run<S: Simd, const N: usize>(self, simd: S);
}

/// Runs a kernel by the machine's best vectors.
pub(super) fn run(kernel: impl Kernel) {
    let format = kernel.format();
    match format.bits {
        4 => dispatch(format, Bits::<_, 8>(kernel)),
        _ => dispatch(format, Bits::<_, 4>(kernel)),
    }
}

/// A kernel for `N` codes a word.
struct Bits<K, const N: usize>(K);

impl<K: Kernel, const N: usize> WithSimd for Bits<K, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.0.run::<S, N>(simd);
    }
}

/// A block of tokens.
struct Block<'a, S: Simd> {
    codes: &'a [S::u32s],
    /// Vectors of a token.
    vectors: usize,
    /// Bytes of a token in memory.
    bytes: usize,
    d: usize,
}

impl<'a, S: Simd> Block<'a, S> {
    /// The tokens `from..from + count` of a view, filled up in `padded` where they are no whole vectors.
    #[inline(always)]
    fn new(view: PackedView<'a>, from: usize, count: usize, padded: &'a mut Padded) -> Self {
        let words = view.format.words();
        let codes = &view.words[from * words..(from + count) * words];
        Self {
            codes: S::as_simd_u32s(padded.fill(codes)).0,
            vectors: words.div_ceil(S::F32_LANES),
            bytes: words * 4,
            d: view.format.head_dim,
        }
    }

    fn count(&self) -> usize {
        self.codes.len() / self.vectors
    }
}

/// Words of the tokens of a block, filled up with zeros to whole vectors.
struct Padded {
    /// Empty where the words of a token are whole vectors.
    rows: Vec<u32>,
    words: usize,
    padded: usize,
}

impl Padded {
    /// For tokens of `words` words filled up to `padded`.
    fn new(words: usize, padded: usize) -> Self {
        let rows = if words < padded { MOST * padded } else { 0 };
        Self {
            rows: vec![0; rows],
            words,
            padded,
        }
    }

    #[inline(always)]
    fn fill<'a>(&'a mut self, codes: &'a [u32]) -> &'a [u32] {
        if self.rows.is_empty() {
            return codes;
        }
        let tokens = codes.chunks_exact(self.words);
        let count = tokens.len();
        for (to, token) in self.rows.chunks_exact_mut(self.padded).zip(tokens) {
            to[..self.words].copy_from_slice(token);
        }
        &self.rows[..count * self.padded]
    }
}

/// What is read after the tokens up to `to` of a view, in bytes.
#[inline(always)]
fn after<'a>(view: PackedView<'a>, to: usize, next: &'a [u8]) -> &'a [u8] {
    match &view.words[to * view.format.words()..] {
        [] => next,
        words => pulp::bytemuck::cast_slice(words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{self, D};
    use crate::quantise::Packed;

    /// 4 bits in groups of `group`.
    fn format(group: usize) -> Format {
        Format {
            head_dim: group.max(D),
            bits: 4,
            symmetric: false,
            group,
            rotation: 1,
            channel: 0,
        }
    }

    #[test]
    fn a_score_by_bits_of_the_mantissa_equals_the_golden_value() {
        let mut packed = Packed::new(format(32));
        assert!(packed.push(&golden::keys(0)));
        let (mut scores, mut room) = ([0.0], vec![0.0; scratch(D)]);
        let query = &golden::queries()[..D];
        run(PackedScores {
            queries: query,
            keys: packed.view(),
            next: &[],
            stride: 1,
            scores: &mut scores,
            scratch: &mut room,
        });
        // Of the terms 16·s·q·f with f below 2, each of which is rounded, -0.96 is left.
        let terms = query.chunks_exact(32).zip(packed.view().scales);
        let terms: f64 = terms
            .map(|(q, s)| 32.0 * s.to_f64() * q.iter().map(|q| f64::from(q.abs())).sum::<f64>())
            .sum();
        let error = (f64::from(scores[0]) + 0.959_265_684).abs();
        assert!(
            error < terms * f64::from(f32::EPSILON) / 2.0,
            "{error} {terms}"
        );
        assert!(error < 5e-5, "a ten-thousandth of the quantisation's own");
    }

    struct Bit(u32, u32);

    impl WithSimd for Bit {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            let bits =
                |x: S::f32s| -> u32 { pulp::bytemuck::cast_slice(std::slice::from_ref(&x))[0] };
            let word = |word: u32| simd.splat_u32s(word);
            // Code 9 in the second of eight places, code 200 in the third of four.
            assert_eq!(bits(code::<S, 8>(simd, word(9 << 4), 1)), self.0);
            assert_eq!(bits(code::<S, 4>(simd, word(200 << 16), 2)), self.1);
        }
    }

    #[test]
    fn codes_have_the_golden_bits() {
        for group in [32, 64, 128] {
            dispatch(format(group), Bit(0x3fc8_0000, 0x3fe4_0000));
        }
    }

    /// Scores and sums by vectors of one sort.
    fn attended<S: Simd>(
        simd: Option<S>,
        (queries, weights): (&[f32], &[f32]),
        view: PackedView<'_>,
    ) -> [Vec<f32>; 2] {
        fn by<S: Simd>(simd: Option<S>, kernel: impl Kernel) {
            match (simd, kernel.format().bits) {
                (Some(simd), 4) => simd.vectorize(Bits::<_, 8>(kernel)),
                (Some(simd), _) => simd.vectorize(Bits::<_, 4>(kernel)),
                (None, _) => run(kernel),
            }
        }
        let (d, tokens) = (view.format.head_dim, view.tokens());
        let heads = queries.len() / d;
        let (mut scores, mut out) = (vec![0.0; heads * tokens], vec![0.0; heads * d]);
        let mut scratch = vec![0.0; heads * scratch(d)];
        let of_scores = PackedScores {
            queries,
            keys: view,
            next: &[],
            stride: tokens,
            scores: &mut scores,
            scratch: &mut scratch,
        };
        by(simd, of_scores);
        if view.format.channel == 0 {
            let of_mix = PackedMix {
                weights,
                stride: tokens,
                values: view,
                next: &[],
                out: &mut out,
                scratch: &mut scratch,
            };
            by(simd, of_mix);
        }
        [scores, out]
    }

    fn near(got: &[f32], want: &[f64], largest: f64, of: &str) {
        for (got, want) in got.iter().zip(want) {
            let error = (f64::from(*got) - want).abs();
            assert!(error < 2e-6 * largest, "{of}: {got} {want}");
        }
    }

    #[test]
    fn vectors_of_every_width_give_what_widened_rows_do() {
        // Groups that fill one, two and four vectors of 1, 4, 8 and 16 words, of 8 alone, and none; more tokens than a block.
        for (d, group, bits, channel) in [
            (64, 64, 8, 0),
            (128, 64, 8, 0),
            (64, 64, 4, 0),
            (128, 64, 4, 0),
            (256, 64, 8, 0),
            (256, 64, 4, 0),
            (256, 128, 8, 0),
            (256, 128, 4, 0),
            (96, 48, 8, 0),
            (96, 48, 4, 0),
            (40, 8, 4, 0),
            (64, 64, 4, 32),
            (128, 64, 8, 32),
            (80, 40, 4, 32),
        ] {
            let format = Format {
                head_dim: d,
                bits,
                symmetric: bits == 8 && channel == 0,
                group,
                rotation: 1,
                channel,
            };
            let tokens = if channel > 0 { 96 } else { 75 };
            let mut packed = Packed::new(format);
            assert!(packed.push(&golden::uniform("rows", tokens * d)));
            let view = packed.view();
            let mut rows = Vec::new();
            view.widen_into(&mut rows);
            // Blocks of four, two and one.
            let heads = 7;
            let queries = golden::uniform("queries", heads * d);
            let weights = golden::uniform("weights", heads * tokens);
            let product = |x: &f32, y: &f32| f64::from(*x) * f64::from(*y);
            let (mut scores, mut out) = (Vec::new(), Vec::new());
            for h in 0..heads {
                let (query, weights) = (&queries[h * d..][..d], &weights[h * tokens..][..tokens]);
                let score = |row: &[f32]| query.iter().zip(row).map(|(q, x)| product(q, x)).sum();
                scores.extend(rows.chunks_exact(d).map(score).collect::<Vec<f64>>());
                out.extend((0..d).map(|i| {
                    let column = rows.iter().skip(i).step_by(d);
                    weights
                        .iter()
                        .zip(column)
                        .map(|(w, x)| product(w, x))
                        .sum::<f64>()
                }));
            }
            let given = (&queries[..], &weights[..]);
            let of = |name: &str| format!("{name}, {format:?}");
            let check = |[s, o]: [Vec<f32>; 2], name: &str| {
                near(&s, &scores, d as f64, &of(name));
                if channel == 0 {
                    near(&o, &out, tokens as f64, &of(name));
                }
            };
            let together = attended::<pulp::Scalar>(None, given, view);
            // To the bit as if asked one by one.
            for h in 0..heads {
                let (query, weights) = (&queries[h * d..][..d], &weights[h * tokens..][..tokens]);
                let [s, o] = attended::<pulp::Scalar>(None, (query, weights), view);
                assert_eq!(s, together[0][h * tokens..][..tokens], "{}", of("alone"));
                assert_eq!(o, together[1][h * d..][..d], "{}", of("alone"));
            }
            check(together, "the machine's");
            check(attended(Some(pulp::Scalar), given, view), "1");
            check(attended(Some(pulp::Scalar128b), given, view), "4");
            check(attended(Some(pulp::Scalar256b), given, view), "8");
            check(attended(Some(pulp::Scalar512b), given, view), "16");
            #[cfg(target_arch = "x86_64")]
            check(attended(pulp::x86::V3::try_new(), given, view), "AVX2");
        }
    }
}
