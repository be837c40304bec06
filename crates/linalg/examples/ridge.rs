//! Ridge regression: the weights w that minimise ‖Xᵀ w − y‖² + λ ‖w‖², and the same bits for any number of threads.
//!
//! ```sh
//! cargo run --release -p linalg --example ridge
//! ```

use linalg::faer::Mat;
use linalg::{Cholesky, Entries, add_product, dot, product};

const FEATURES: usize = 300;
const SAMPLES: usize = 1000;
const RIDGE: f64 = 0.1;

fn fit(x: &Mat<f64>, y: &Mat<f64>) -> linalg::Result<Mat<f64>> {
    // X Xᵀ + λ I: the lower triangle is enough for the factorisation.
    let mut gram = Mat::zeros(FEATURES, FEATURES);
    add_product(
        gram.as_mut(),
        x.as_ref(),
        x.transpose(),
        1.0,
        Entries::Lower,
    );
    (0..FEATURES).for_each(|i| gram[(i, i)] += RIDGE);
    let right = product(x.as_ref(), y.as_ref());
    Ok(Cholesky::new(gram)?.solve(right))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let x = Mat::from_fn(FEATURES, SAMPLES, |i, t| {
        ((i * i + 7 * t * i + 3 * t) % 101) as f64 / 50.0 - 1.0
    });
    let truth = Mat::from_fn(FEATURES, 1, |i, _| (i % 5) as f64 - 2.0);
    let y = product(x.transpose(), truth.as_ref());

    let mut results = Vec::new();
    for threads in [1, 2, 4] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()?;
        results.push(pool.install(|| fit(&x, &y))?);
    }
    let error = product(x.transpose(), results[0].as_ref()) - &y;
    println!(
        "mean squared error {:.3e}",
        dot(error.as_ref(), error.as_ref()) / SAMPLES as f64
    );
    println!(
        "the same for 1, 2 and 4 threads: {}",
        results.iter().all(|w| *w == results[0])
    );
    Ok(())
}
