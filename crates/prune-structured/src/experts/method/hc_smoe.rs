//! HC-SMoE: experts with similar mean outputs are merged.

use super::{Choice, Choosing};
use crate::Result;
use crate::experts::cluster::{Linkage, clusters};
use crate::experts::layer::Layer;
use crate::experts::merge::{Merging, by_count};
use crate::experts::method::stun::row_distances;
use serde::{Deserialize, Serialize};

/// Clusters of average linkage on the means of experts' outputs over all tokens, as many as experts are to stay. Weights
/// are averaged by the tokens that chose them; the router keeps the row of the most used, or all rows where they are tied. Every
/// expert runs on every token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HcSmoe {
    /// Cosine distances, as REAP's paper describes it, in place of the Euclidean ones of the published implementation.
    pub cosine: bool,
    /// Whether neurons are put in the same order before they are averaged.
    pub align: bool,
    /// Whether the router keeps the rows of all experts, those of a cluster sharing the merged one.
    #[serde(default)]
    pub tied: bool,
}

impl Default for HcSmoe {
    fn default() -> Self {
        Self {
            cosine: false,
            align: true,
            tied: false,
        }
    }
}

impl Choosing for HcSmoe {
    fn ties(&self) -> bool {
        self.tied
    }

    fn choose(&self, layer: &Layer<'_>, keep: usize) -> Result<Choice> {
        let means = layer.means_over_all()?;
        let distances = match self.cosine {
            true => cosine_distances(&means),
            false => row_distances(&means),
        };
        let clusters = clusters(&distances, keep, Linkage::Average);
        let how = Merging {
            align: self.align,
            tied: self.tied,
        };
        Ok(by_count(layer, &clusters, how))
    }
}

/// 1 − cosine; 1 for vectors of zeros.
pub(crate) fn cosine_distances(vectors: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let norms: Vec<f64> = vectors.iter().map(|v| dot(v, v).sqrt()).collect();
    let distance = |a: usize, b: usize| match norms[a] * norms[b] {
        0.0 => 1.0,
        norm => 1.0 - dot(&vectors[a], &vectors[b]) / norm,
    };
    let all = 0..vectors.len();
    all.clone()
        .map(|a| all.clone().map(|b| distance(a, b)).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similar_outputs_are_united_first() {
        let vectors = [
            [1.0, 0.0, 0.0],
            [0.8, 0.6, 0.0],
            [0.0, 1.0, 0.0],
            [0.0, 0.6, 0.8],
        ];
        let vectors: Vec<Vec<f64>> = vectors.iter().map(|v| v.to_vec()).collect();
        let distances = cosine_distances(&vectors);
        assert!((distances[0][1] - 0.2).abs() < 1e-12);
        assert!((distances[2][3] - 0.4).abs() < 1e-12);
        let cut = |keep| clusters(&distances, keep, Linkage::Average);
        assert_eq!(cut(3), [vec![0, 1], vec![2], vec![3]]);
        assert_eq!(cut(2), [vec![0, 1], vec![2, 3]]);
    }
}
