//! Key norms (Devoto et al., arXiv 2406.11430): tokens with a large key norm are evicted; a baseline.
//!
//! Needs nothing but keys, keeps no state.

pub use super::periodic::Settings;

use super::periodic::Periodic;
use super::{Budget, Clock, Needs, Phase, Policy, Rows, Rule, Score};
use crate::error::Result;
use pulp::{Arch, Simd, WithSimd};

pub(super) fn build(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    Ok(Box::new(KeyNorm(settings.within(budget))))
}

/// Keeps the tokens with the smallest key norms.
#[derive(Debug, Clone, Copy)]
pub struct KeyNorm(pub Periodic);

/// ‖k‖ of each key of `d` elements, with the machine's widest vectors.
pub(super) fn norms(keys: &[f32], d: usize) -> Vec<f64> {
    struct Norms<'a>(&'a [f32], usize);

    impl WithSimd for Norms<'_> {
        type Output = Vec<f64>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> Vec<f64> {
            let Self(keys, d) = self;
            let mut norms = vec![0.0; keys.len() / d];
            for (norm, key) in norms.iter_mut().zip(keys.chunks_exact(d)) {
                *norm = squared(key).sqrt();
            }
            norms
        }
    }

    Arch::new().dispatch(Norms(keys, d))
}

/// ‖x‖², in lanes that the compiler makes vectors of.
#[inline(always)]
pub(super) fn squared(row: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (chunks, tail) = row.as_chunks::<8>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    let tail: f64 = tail.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    lanes.iter().sum::<f64>() + tail
}

impl Policy for KeyNorm {
    fn name(&self) -> &'static str {
        "knorm"
    }
    fn needs(&self) -> Needs {
        Needs::keys()
    }
    fn rule(&self, _: Phase) -> Rule {
        self.0.rule()
    }
    fn score(&mut self, head: usize, rows: &dyn Rows, _: &Clock, out: &mut [Score]) -> Result<()> {
        let keys = rows.keys(head, 0)?;
        for (score, norm) in out.iter_mut().zip(norms(&keys, rows.head_dim())) {
            score.value = -norm as f32;
        }
        Ok(())
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn scores_equal_golden_values() {
        let norms = norms(&golden::rotated_keys(), golden::D);
        let got: Vec<f32> = norms.iter().take(6).map(|norm| -norm as f32).collect();
        let want = [
            -6.628_005_61,
            -7.125_723_94,
            -8.876_971_92,
            -7.730_290_01,
            -10.338_901_3,
            -7.574_859_36,
        ];
        golden::close(&got, &want, 1e-6);
    }
}
