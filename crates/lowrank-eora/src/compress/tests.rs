//! Compressors against a naive second implementation, and what must hold for any weight and inputs.

mod agreement;
mod inputs;
mod pruning;
mod sweeps;

use faer::Mat;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Compressed, Compressor, Inputs};

fn random(seed: u64, rows: usize, cols: usize) -> Mat<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Mat::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0))
}

/// Inputs that depend on each other and have very different sizes.
fn correlated(seed: u64, n: usize, tokens: usize) -> Mat<f64> {
    let mix = Mat::<f64>::identity(n, n) + 0.3 * random(seed, n, n);
    let mut x = mix * random(seed + 1, n, tokens);
    for j in 0..n {
        for t in 0..tokens {
            x[(j, t)] *= 0.6f64.powi((j % 7) as i32);
        }
    }
    x
}

fn gram(x: &Mat<f64>) -> Mat<f64> {
    x * x.transpose()
}

fn run(name: &str, w: &Mat<f64>, h: &Mat<f64>) -> Compressed {
    let compressor: Compressor = name.parse().expect("a name");
    compressor
        .compress(w.as_ref(), Some(Inputs::Gram(h.as_ref())))
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn distance(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    (a - b).norm_max()
}
