//! Products of small matrices, softmax and lengths by the vectors of the attention kernels, for policies that compute with keys, values and queries of their own.

use super::chunk::maximum;
use super::dense::{Mix, Scores};
use super::element::Element;
use super::exp::exp_in_place;
use super::scores::softcap_in_place;
use pulp::{Arch, Simd, WithSimd};

/// `[m, n]`: the products of `queries` `[m, d]` with `keys` `[n, d]`.
pub(crate) fn products(queries: &[f32], keys: &[f32], d: usize) -> Vec<f32> {
    let n = keys.len() / d;
    let mut scores = vec![0.0; queries.len() / d * n];
    if !scores.is_empty() {
        f32::dispatch(Scores {
            queries,
            keys,
            head_dim: d,
            next: &[],
            stride: n,
            scores: &mut scores,
            scratch: &mut [],
        });
    }
    scores
}

/// `[m, d]`: the sums of `values` `[n, d]` in each row's proportions `[m, n]`.
pub(crate) fn mixes(weights: &[f32], values: &[f32], d: usize) -> Vec<f32> {
    let n = values.len() / d;
    let mut out = vec![0.0; weights.len().checked_div(n).unwrap_or(0) * d];
    if !out.is_empty() {
        f32::dispatch(Mix {
            weights,
            stride: n,
            values,
            head_dim: d,
            next: &[],
            out: &mut out,
            scratch: &mut [],
        });
    }
    out
}

/// Softmax in place; −∞ weighs nothing. A row of nothing but −∞ becomes zero.
pub(crate) fn softmax(row: &mut [f32]) {
    Arch::new().dispatch(Softmax(row));
}

struct Softmax<'a>(&'a mut [f32]);

impl WithSimd for Softmax<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let row = self.0;
        let max = maximum(simd, row);
        if max == f32::NEG_INFINITY {
            row.fill(0.0);
            return;
        }
        let inverse = 1.0 / exp_in_place(simd, row, max);
        for x in row {
            *x *= inverse;
        }
    }
}

/// Replaces every x by `cap · tanh(x / cap)`.
pub(crate) fn cap(scores: &mut [f32], cap: f32) {
    Arch::new().dispatch(Cap(scores, cap));
}

struct Cap<'a>(&'a mut [f32], f32);

impl WithSimd for Cap<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        softcap_in_place(simd, self.0, self.1);
    }
}

/// ‖x‖² of each of `rows` `[n, d]`.
pub(crate) fn squares(rows: &[f32], d: usize) -> Vec<f32> {
    let mut squares = vec![0.0; rows.len() / d];
    Arch::new().dispatch(Squares {
        rows,
        d,
        squares: &mut squares,
    });
    squares
}

struct Squares<'a> {
    rows: &'a [f32],
    d: usize,
    squares: &'a mut [f32],
}

impl WithSimd for Squares<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (row, square) in self.rows.chunks_exact(self.d).zip(self.squares) {
            let (vectors, tail) = S::as_simd_f32s(row);
            let mut sums = [simd.splat_f32s(0.0); 4];
            for (i, &x) in vectors.iter().enumerate() {
                sums[i % 4] = simd.mul_add_f32s(x, x, sums[i % 4]);
            }
            let sum = simd.add_f32s(
                simd.add_f32s(sums[0], sums[1]),
                simd.add_f32s(sums[2], sums[3]),
            );
            let mut total = simd.reduce_sum_f32s(sum);
            for x in tail {
                total += x * x;
            }
            *square = total;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    /// Compares numbers whose terms may cancel.
    fn near(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        let largest = want.iter().fold(1.0, |most: f64, x| most.max(x.abs()));
        for (&got, &want) in got.iter().zip(want) {
            assert!(
                (f64::from(got) - want).abs() < 1e-6 * largest,
                "{got} {want}"
            );
        }
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        let products = a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y));
        products.sum()
    }

    #[test]
    fn products_mixes_and_squares_are_those_of_loops() {
        for (m, n, d) in [
            (1, 1, 8),
            (3, 50, 20),
            (6, 33, 64),
            (7, 100, 40),
            (0, 5, 8),
            (2, 0, 8),
        ] {
            let queries = golden::uniform("q", m * d);
            let rows = golden::uniform("k", n * d);
            let mut want = Vec::new();
            for query in queries.chunks_exact(d) {
                want.extend(rows.chunks_exact(d).map(|row| dot(query, row)));
            }
            let weights = products(&queries, &rows, d);
            near(&weights, &want);
            let mut want = Vec::new();
            for weights in weights.chunks_exact(n.max(1)) {
                for i in 0..d {
                    let column: Vec<f32> = rows.iter().skip(i).step_by(d).copied().collect();
                    want.push(dot(weights, &column));
                }
            }
            near(&mixes(&weights, &rows, d), &want);
            let want: Vec<f64> = rows.chunks_exact(d).map(|row| dot(row, row)).collect();
            near(&squares(&rows, d), &want);
        }
    }

    #[test]
    fn a_softmax_sums_to_one_and_what_is_masked_weighs_nothing() {
        let mut row = golden::uniform("logits", 37);
        row[5] = f32::NEG_INFINITY;
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        let want: Vec<f64> = row.iter().map(|&x| f64::from(x).exp() / sum).collect();
        softmax(&mut row);
        golden::close(&row, &want, 1e-6);
        assert_eq!(row[5], 0.0);
        let mut nothing = [f32::NEG_INFINITY; 9];
        softmax(&mut nothing);
        assert_eq!(nothing, [0.0; 9]);
    }
}
