//! How much of a network's connectivity pruning keeps, as numbers.
//!
//! *Functional connectivity* is the matrix of correlations between the states of neurons over steps of examples; its
//! similarity before and after is Pearson's r over the pairs of neurons. *Reach* is the reachability order of the strong
//! connections; what is kept of it is the share of its ordered pairs that can still be reached. Neither predicts accuracy:
//! they are reported beside it.

use crate::{
    calibration::Moments,
    error::Result,
    influence::Influence,
    order::{Cut, Poset, thresholds},
};

/// Pearson's r of two lists of numbers; `None` where one of them does not vary.
pub fn pearson(pairs: &[(f64, f64)]) -> Option<f64> {
    let n = pairs.len() as f64;
    let (a, b) = pairs
        .iter()
        .fold((0.0, 0.0), |s, p| (s.0 + p.0 / n, s.1 + p.1 / n));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for p in pairs {
        let (x, y) = (p.0 - a, p.1 - b);
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    (aa > 0.0 && bb > 0.0).then(|| ab / (aa * bb).sqrt())
}

/// States of the same neurons in two networks.
#[derive(Debug, Clone)]
pub struct SameNeurons<'a> {
    /// Moments of a layer's states before pruning.
    pub before: &'a Moments,
    /// And after.
    pub after: &'a Moments,
    /// Numbers of the neurons to compare, before and after.
    pub neurons: Vec<(usize, usize)>,
}

/// Similarity of the functional connectivity of two networks: Pearson's r over all pairs of neurons of the same layer.
/// `None` where there are no two pairs, or the correlations do not vary.
pub fn functional_similarity(layers: &[SameNeurons<'_>]) -> Option<f64> {
    let mut pairs = Vec::new();
    for layer in layers {
        let (before, after) = (layer.before.correlations(), layer.after.correlations());
        let (n, m) = (layer.before.dim(), layer.after.dim());
        for (k, a) in layer.neurons.iter().enumerate() {
            let others = layer.neurons[..k].iter();
            pairs.extend(others.map(|b| (before[a.0 * n + b.0], after[a.1 * m + b.1])));
        }
    }
    pearson(&pairs)
}

/// The share of the ordered pairs of neurons (source, target) of the order before pruning that are still in the order after it.
/// Both are cut at the threshold that gives the network before pruning a mean out-degree of `degree`.
///
/// # Errors
/// A degree of 0 or less.
pub fn reach_kept(before: &Influence, after: &Influence, degree: f64) -> Result<f64> {
    let threshold = thresholds(before, &[Cut::Degree(degree)])?[0];
    let order = |influence: &Influence| Poset::of_digraph(&influence.digraph(threshold));
    let (old, new) = (order(before), order(after));
    let reaches = |order: &Poset, j: usize, i: usize| {
        let of = &order.classes().of;
        order.up().get(of[j], of[i])
    };
    let n = before.len().min(after.len());
    let (mut pairs, mut kept) = (0usize, 0usize);
    for j in 0..n {
        for i in (0..n).filter(|&i| i != j && reaches(&old, j, i)) {
            pairs += 1;
            kept += usize::from(reaches(&new, j, i));
        }
    }
    Ok(if pairs == 0 {
        1.0
    } else {
        kept as f64 / pairs as f64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reach_counts_the_pairs_that_can_still_be_reached() {
        // A chain 0 → 1 → 2 → 3 has six pairs; without the middle edge two are left; a detour keeps all.
        let chain = |edges: &[(usize, usize)]| {
            let mut a = vec![0.0; 16];
            edges.iter().for_each(|&(j, i)| a[j * 4 + i] = 1.0);
            Influence::from_dense(4, &a).unwrap()
        };
        let whole = chain(&[(0, 1), (1, 2), (2, 3)]);
        let kept = |edges: &[(usize, usize)]| reach_kept(&whole, &chain(edges), 0.75).unwrap();
        assert_eq!(kept(&[(0, 1), (1, 2), (2, 3)]), 1.0);
        assert_eq!(kept(&[(0, 1), (2, 3)]), 2.0 / 6.0);
        assert_eq!(kept(&[(0, 1), (1, 3), (3, 2), (2, 3)]), 1.0);
        assert!(reach_kept(&whole, &whole, 0.0).is_err());
    }

    #[test]
    fn pearson_agrees_with_its_definition() {
        let pairs = [(1.0, 2.0), (2.0, 1.0), (4.0, 5.0)];
        // Deviations (-4/3, -2/3), (-1/3, -5/3), (5/3, 7/3).
        let expected = (8.0 + 5.0 + 35.0) / ((16.0 + 1.0 + 25.0f64) * (4.0 + 25.0 + 49.0)).sqrt();
        assert!((pearson(&pairs).unwrap() - expected).abs() < 1e-12);
        assert_eq!(pearson(&[(1.0, 2.0), (1.0, 3.0)]), None);
        assert_eq!(pearson(&[]), None);
    }
}
