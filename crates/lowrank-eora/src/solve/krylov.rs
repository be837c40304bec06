//! Leading eigenvectors of G = D H Dᵀ by a block Krylov subspace.
//!
//! A vector q = D z of the output space is kept as z in the input space, where G q is H S z with
//! S = DᵀD and products qᵀq' are zᵀS z'. One step costs 4n²b operations for b vectors instead of
//! (4mn + 2n²)b, and S, whose trace with H is the total energy, has to be formed anyway to know
//! the loss. Where G itself is known (or cheap), the same iteration runs with z = q and S = I.
//!
//! After each step the Rayleigh quotients of the whole subspace give the loss; the iteration stops
//! when what is still to be gained, extrapolated from the last gains, is a small share of it.

use super::eigenvectors;
use super::{Leading, Options, Route, Spectrum, Weighting};
use crate::Result;
use faer::{Mat, MatRef};
use linalg::{Eigen, Entries, Qr, add_product, add_product_f32, dot, mirror_lower, product};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Vectors of a block beyond half of the rank.
const OVERSAMPLING: usize = 16;
/// Steps after which a full factorisation is the better way.
const MAX_STEPS: usize = 12;
/// Squared lengths below these shares are rounding: of the longest direction of the same block,
/// and of the known part that was taken off the block.
const NOISE: f64 = 1e-13;
const NOISE_OF_KNOWN: f64 = 1e-24;

/// Block width for a rank. Half of the rank is enough, as the subspace is that of all steps.
fn block(rank: usize) -> usize {
    rank.div_ceil(2) + OVERSAMPLING
}

/// Whether G is what the iteration runs on.
fn on_outputs((m, n): (usize, usize), weighting: &Weighting<'_>) -> bool {
    matches!(weighting, Weighting::Output(_)) || n > 2 * m
}

/// Operations that are not worth saving.
const CHEAP: f64 = 2e9;

/// Whether the exact route on the smaller side is cheap, or costs at most twice as much as this
/// one.
pub(super) fn exact_is_better(
    shape: (usize, usize),
    rank: usize,
    weighting: &Weighting<'_>,
) -> bool {
    let (m, n, b) = (shape.0 as f64, shape.1 as f64, block(rank) as f64);
    let eigen = |k: f64| 16.0 * k * k * k;
    // Four steps on a side of length k: two or one products with a square matrix, and the basis.
    let steps = |k: f64, products: f64| 4.0 * (2.0 * products * k * k * b + 16.0 * k * b * b);
    let form_g = match weighting {
        Weighting::Output(_) => 0.0,
        _ => 2.0 * m * n * n + m * m * n,
    };
    let (exact, krylov) = if on_outputs(shape, weighting) {
        (eigen(m) + form_g, steps(m, 1.0) + form_g)
    } else {
        let exact = if m <= n {
            eigen(m) + form_g
        } else {
            4.0 * m * n * n + 3.0 * n * n * n + eigen(n)
        };
        (exact, m * n * n / 2.0 + steps(n, 2.0) + 4.0 * m * n * b)
    };
    exact <= CHEAP || exact <= 2.0 * krylov
}

/// The problem: eigenvectors of H S in the inner product of S.
struct Pencil<'a> {
    /// S; `None` is the identity.
    s: Option<Mat<f64>>,
    h: Weighting<'a>,
    size: usize,
}

impl Pencil<'_> {
    fn times_s(&self, z: &Mat<f64>) -> Mat<f64> {
        match &self.s {
            None => z.clone(),
            Some(s) => product(s.as_ref(), z.as_ref()),
        }
    }

    /// H y.
    fn times_h(&self, y: &Mat<f64>) -> Mat<f64> {
        match self.h {
            Weighting::Identity => y.clone(),
            Weighting::Diagonal(h) => Mat::from_fn(y.nrows(), y.ncols(), |i, j| h[i] * y[(i, j)]),
            Weighting::Gram(h) | Weighting::Output(h) => product(h, y.as_ref()),
            Weighting::Factor(t) => product(t, product(t.transpose(), y.as_ref()).as_ref()),
        }
    }

    /// tr(H S).
    fn trace(&self) -> f64 {
        let diagonal = |a: MatRef<'_, f64>| (0..self.size).map(|i| a[(i, i)]).sum::<f64>();
        match (&self.s, self.h) {
            (None, Weighting::Gram(h) | Weighting::Output(h)) => diagonal(h),
            (None, Weighting::Diagonal(h)) => h.iter().sum(),
            (None, Weighting::Identity) => self.size as f64,
            (None, Weighting::Factor(t)) => t.squared_norm_l2(),
            (Some(s), Weighting::Identity) => diagonal(s.as_ref()),
            (Some(s), Weighting::Diagonal(h)) => (0..self.size).map(|i| h[i] * s[(i, i)]).sum(),
            (Some(s), Weighting::Gram(h) | Weighting::Output(h)) => dot(s.as_ref(), h),
            (Some(s), Weighting::Factor(t)) => dot(product(s.as_ref(), t).as_ref(), t),
        }
    }
}

/// A growing S-orthonormal basis Z, with Y = S Z, W = H Y and T = Yᵀ W.
struct Subspace {
    z: Mat<f64>,
    y: Mat<f64>,
    w: Mat<f64>,
    t: Mat<f64>,
}

impl Subspace {
    fn new(size: usize) -> Self {
        Self {
            z: Mat::zeros(size, 0),
            y: Mat::zeros(size, 0),
            w: Mat::zeros(size, 0),
            t: Mat::zeros(0, 0),
        }
    }

    fn len(&self) -> usize {
        self.z.ncols()
    }

    /// Adds the part of `z` that is new; returns the number of new directions.
    fn extend(&mut self, pencil: &Pencil<'_>, mut z: Mat<f64>) -> Result<usize> {
        let mut known = 0.0f64;
        if self.len() > 0 {
            // The longest known part of a column, in the norm of S.
            let along = product(self.y.transpose(), z.as_ref());
            known =
                (along.col_iter()).fold(known, |best, column| best.max(column.squared_norm_l2()));
            subtract(&mut z, &self.z, &along);
        }
        let mut y = pencil.times_s(&z);
        // Twice: the second pass removes what rounding left of the first.
        for _ in 0..2 {
            if self.len() > 0 {
                let along = product(self.y.transpose(), z.as_ref());
                subtract(&mut z, &self.z, &along);
                subtract(&mut y, &self.y, &along);
            }
            let moments = product(z.transpose(), y.as_ref());
            let Eigen {
                values: squares,
                vectors: rotation,
            } = eigenvectors(moments.as_ref(), "eigenvectors of a Krylov block")?;
            let longest = squares.first().copied().unwrap_or(0.0);
            let shortest = (longest * NOISE)
                .max(known * NOISE_OF_KNOWN)
                .max(f64::MIN_POSITIVE);
            let kept = squares.iter().take_while(|&&s| s > shortest).count();
            let scaled = Mat::from_fn(rotation.nrows(), kept, |i, j| {
                rotation[(i, j)] / squares[j].sqrt()
            });
            z = product(z.as_ref(), scaled.as_ref());
            y = product(y.as_ref(), scaled.as_ref());
            known = 0.0;
        }
        let grown = z.ncols();
        let w = pencil.times_h(&y);
        self.z = beside(&self.z, &z);
        self.y = beside(&self.y, &y);
        self.w = beside(&self.w, &w);
        let (old, all) = (self.t.nrows(), self.z.ncols());
        let new = product(self.y.transpose(), w.as_ref());
        self.t = Mat::from_fn(all, all, |i, j| match (i < old, j < old) {
            (true, true) => self.t[(i, j)],
            (_, false) => new[(i, j - old)],
            (false, true) => new[(j, i - old)],
        });
        Ok(grown)
    }

    /// W of the last block: where the next one starts.
    fn last(&self, width: usize) -> Mat<f64> {
        self.w.subcols(self.len() - width, width).to_owned()
    }
}

fn subtract(from: &mut Mat<f64>, basis: &Mat<f64>, along: &Mat<f64>) {
    add_product(
        from.as_mut(),
        basis.as_ref(),
        along.as_ref(),
        -1.0,
        Entries::All,
    );
}

fn beside(left: &Mat<f64>, right: &Mat<f64>) -> Mat<f64> {
    let mut both = Mat::zeros(right.nrows(), left.ncols() + right.ncols());
    both.as_mut().subcols_mut(0, left.ncols()).copy_from(left);
    both.as_mut()
        .subcols_mut(left.ncols(), right.ncols())
        .copy_from(right);
    both
}

/// The route; `None` when it did not converge or found fewer directions than ranks.
pub(super) fn by_krylov(
    d: MatRef<'_, f64>,
    weighting: &Weighting<'_>,
    rank: usize,
    options: &Options,
) -> Result<Option<Leading>> {
    let (m, n) = d.shape();
    let on_outputs = on_outputs((m, n), weighting);
    let formed;
    let pencil = if let Weighting::Output(g) = *weighting {
        Pencil {
            s: None,
            h: Weighting::Output(g),
            size: m,
        }
    } else if on_outputs {
        let mut g = weighting.output_gram(d);
        mirror_lower(g.as_mut());
        formed = g;
        Pencil {
            s: None,
            h: Weighting::Output(formed.as_ref()),
            size: m,
        }
    } else {
        Pencil {
            s: Some(row_products(d)),
            h: *weighting,
            size: n,
        }
    };
    let Some((z, spectrum)) = iterate(&pencil, rank, options)? else {
        return Ok(None);
    };
    let q = if on_outputs {
        z
    } else {
        product(d, z.as_ref())
    };
    // Orthonormal to rounding; triangular R keeps the order of the directions.
    Ok(Some(Leading {
        vectors: Qr::new(q).q(),
        spectrum,
        route: Route::Krylov,
    }))
}

/// S = DᵀD: f32 products, f64 sums.
///
/// Rounding D to f32 turns D X by a relative 1e-7 of each channel's part, far below the
/// tolerance of this route whatever the channels' scales.
fn row_products(d: MatRef<'_, f64>) -> Mat<f64> {
    const ROWS: usize = 512;
    let (m, n) = d.shape();
    let mut s = Mat::zeros(n, n);
    for start in (0..m).step_by(ROWS) {
        let rows = d.subrows(start, ROWS.min(m - start));
        let rows = Mat::<f32>::from_fn(n, rows.nrows(), |i, j| rows[(j, i)] as f32);
        add_product_f32(
            s.as_mut(),
            rows.as_ref(),
            rows.as_ref(),
            1.0,
            Entries::Lower,
        );
    }
    mirror_lower(s.as_mut());
    s
}

fn iterate(
    pencil: &Pencil<'_>,
    rank: usize,
    options: &Options,
) -> Result<Option<(Mat<f64>, Spectrum)>> {
    let width = block(rank).min(pencil.size);
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    // Sums of uniforms are as good as normals here.
    let mut random = |columns| {
        Mat::from_fn(pencil.size, columns, |_, _| {
            (0..4).map(|_| rng.random::<f64>() - 0.5).sum::<f64>()
        })
    };
    let total = pencil.trace();
    let mut next = pencil.times_h(&random(width));
    let mut subspace = Subspace::new(pencil.size);
    // What the first step captures is no gain: it says nothing of how gains fall.
    let mut gains = [f64::INFINITY; 2];
    let mut before = f64::NEG_INFINITY;
    for _ in 0..MAX_STEPS {
        let grown = subspace.extend(pencil, next)?;
        if subspace.len() >= rank {
            let Eigen { values, vectors } = eigenvectors(
                subspace.t.as_ref(),
                "Rayleigh quotients of a Krylov subspace",
            )?;
            let captured: f64 = values.iter().take(rank).sum();
            gains = [gains[1], captured - before];
            before = captured;
            let loss = (total - captured).max(0.0);
            let nothing = NOISE * total;
            let settled = (options.tolerance * loss).max(nothing);
            let done = subspace.len() == pencil.size || loss <= nothing;
            if done || (grown > 0 && remaining(gains) <= settled) {
                // Rayleigh quotients far behind the rank are too small to be reported.
                let reported = values[..values.len().min(rank + rank / 4)].to_vec();
                let rest = total - reported.iter().sum::<f64>();
                let leading = product(subspace.z.as_ref(), vectors.subcols(0, rank));
                return Ok(Some((leading, Spectrum::new(reported, rest))));
            }
        }
        if grown == 0 {
            // Invariant, and yet not all: an eigenvalue more often than a block is wide.
            return Ok(None);
        }
        // Where a few directions outshine the rest of a block, fresh ones take its place.
        next = beside(&subspace.last(grown), &random(width - grown));
    }
    Ok(None)
}

/// What later steps will gain if gains go on falling as from the last but one to the last; as
/// much as the last where there is only one.
fn remaining([before, last]: [f64; 2]) -> f64 {
    if !before.is_finite() {
        return last;
    }
    let ratio = (last / before).clamp(0.0, 0.99);
    last.max(0.0) * ratio / (1.0 - ratio)
}
