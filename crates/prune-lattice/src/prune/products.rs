//! Products of the matrices that rank neurons: on all threads where the crate is built with `train`, by plain loops where it is
//! not. Both are independent of the number of threads.

/// `Σ factor² wᵀ w` over matrices `w` `[rows, n]`: `n * n`, symmetric.
#[cfg(feature = "train")]
pub(super) fn gram(matrices: &[(&[f32], f64)], n: usize) -> Vec<f64> {
    use linalg::{
        Entries,
        faer::{Mat, MatMut},
    };
    let mut gram = vec![0.0; n * n];
    let mut out = MatMut::from_column_major_slice_mut(&mut gram, n, n);
    for (w, factor) in matrices {
        let w = Mat::from_fn(w.len() / n, n, |i, j| f64::from(w[i * n + j]));
        let square = factor * factor;
        linalg::add_product(
            out.as_mut(),
            w.transpose(),
            w.as_ref(),
            square,
            Entries::Lower,
        );
    }
    linalg::mirror_lower(out);
    gram
}

/// `a b` for `n * n` matrices, row-major.
#[cfg(feature = "train")]
pub(super) fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    use linalg::faer::MatRef;
    let view = |m| MatRef::from_row_major_slice(m, n, n);
    let found = linalg::product(view(a), view(b));
    (0..n * n).map(|e| found[(e / n, e % n)]).collect()
}

#[cfg(not(feature = "train"))]
pub(super) fn gram(matrices: &[(&[f32], f64)], n: usize) -> Vec<f64> {
    let mut gram = vec![0.0; n * n];
    for (w, factor) in matrices {
        for row in w.chunks_exact(n) {
            for (i, &a) in row.iter().enumerate() {
                let a = f64::from(a) * factor * factor;
                let to = gram[i * n..(i + 1) * n].iter_mut();
                to.zip(row).for_each(|(g, &b)| *g += a * f64::from(b));
            }
        }
    }
    gram
}

#[cfg(not(feature = "train"))]
pub(super) fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    for (to, row) in out.chunks_exact_mut(n).zip(a.chunks_exact(n)) {
        for (k, &v) in row.iter().enumerate() {
            let from = &b[k * n..(k + 1) * n];
            to.iter_mut().zip(from).for_each(|(t, f)| *t += v * f);
        }
    }
    out
}
