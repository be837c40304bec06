//! KeyDiff (Park et al., arXiv 2504.15364): keys that point where most keys point are evicted.
//!
//! The score of a token is −cos(k, a), with a the mean of the unit keys of all resident tokens, as they are cached. Needs nothing but keys,
//! keeps no state: the mean is computed anew at each eviction, for 2·n·d multiply-adds per KV head. The authors protect nothing; here the first 4 and the newest 32 tokens stay
//! by default.

pub use super::periodic::Settings;

use super::knorm::norms;
use super::periodic::Periodic;
use super::{Budget, Clock, Needs, Phase, Policy, Rows, Rule, Score};
use crate::error::Result;
use pulp::{Arch, Simd, WithSimd};

pub(super) fn build(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    Ok(Box::new(KeyDiff(settings.within(budget))))
}

/// Keeps the keys that differ most from the mean direction.
#[derive(Debug, Clone, Copy)]
pub struct KeyDiff(pub Periodic);

/// −cos(k, a) of each key of `d` elements, with the machine's widest vectors.
fn scores(keys: &[f32], d: usize) -> Vec<f32> {
    Arch::new().dispatch(Scores {
        keys,
        d,
        norms: norms(keys, d),
    })
}

struct Scores<'a> {
    keys: &'a [f32],
    d: usize,
    norms: Vec<f64>,
}

impl WithSimd for Scores<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<f32> {
        let keys = || self.keys.chunks_exact(self.d).zip(&self.norms);
        let mut anchor = vec![0.0f64; self.d];
        for (key, norm) in keys() {
            let inverse = 1.0 / norm.max(f64::MIN_POSITIVE);
            for (sum, &x) in anchor.iter_mut().zip(key) {
                *sum += f64::from(x) * inverse;
            }
        }
        // The mean's length is no part of the cosine.
        let length = anchor.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut scores = vec![0.0; self.norms.len()];
        for (score, (key, norm)) in scores.iter_mut().zip(keys()) {
            let lengths = (norm * length).max(f64::MIN_POSITIVE);
            *score = -(product(key, &anchor) / lengths) as f32;
        }
        scores
    }
}

/// k · a, in lanes that the compiler makes vectors of.
#[inline(always)]
fn product(key: &[f32], anchor: &[f64]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (keys, key_tail) = key.as_chunks::<8>();
    let (anchors, anchor_tail) = anchor.as_chunks::<8>();
    for (key, anchor) in keys.iter().zip(anchors) {
        for (lane, (&x, a)) in lanes.iter_mut().zip(key.iter().zip(anchor)) {
            *lane += f64::from(x) * a;
        }
    }
    let tail = key_tail.iter().zip(anchor_tail);
    let tail: f64 = tail.map(|(&x, a)| f64::from(x) * a).sum();
    lanes.iter().sum::<f64>() + tail
}

impl Policy for KeyDiff {
    fn name(&self) -> &'static str {
        "keydiff"
    }
    fn needs(&self) -> Needs {
        Needs::keys()
    }
    fn rule(&self, _: Phase) -> Rule {
        self.0.rule()
    }
    fn score(&mut self, head: usize, rows: &dyn Rows, _: &Clock, out: &mut [Score]) -> Result<()> {
        let keys = rows.keys(head, 0)?;
        for (score, value) in out.iter_mut().zip(scores(&keys, rows.head_dim())) {
            score.value = value;
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
        let got = scores(&golden::rotated_keys(), golden::D);
        let want = [
            -0.484_622_265,
            -0.585_515_442,
            0.285_003_155,
            -0.261_312_882,
            -0.243_823_488,
            0.414_628_04,
        ];
        golden::close(&got[..6], &want, 1e-6);
    }

    #[test]
    fn zero_keys_have_finite_scores() {
        assert!(scores(&[0.0; 32], 8).iter().all(|x| x.is_finite()));
    }
}
