//! M-SMoE: rarely used experts are merged into frequently used ones.

use super::{Choice, Choosing, Frequency, best};
use crate::Result;
use crate::experts::layer::Layer;
use crate::experts::merge::{Merging, around};
use serde::{Deserialize, Serialize};

/// The most used experts stay; each other is merged into the one whose router logits over the tokens are most similar to
/// its own, by cosine. Weights are averaged by the tokens that chose them; the router keeps the rows of those that stay, or all rows
/// where they are tied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MSmoe {
    /// Whether neurons are put in the same order before they are averaged.
    pub align: bool,
    /// Whether the router keeps the rows of all experts, those of a cluster sharing the merged one.
    #[serde(default)]
    pub tied: bool,
}

impl Default for MSmoe {
    fn default() -> Self {
        Self {
            align: true,
            tied: false,
        }
    }
}

impl Choosing for MSmoe {
    fn ties(&self) -> bool {
        self.tied
    }

    fn choose(&self, layer: &Layer<'_>, keep: usize) -> Result<Choice> {
        let mut centres = best(&Frequency.scores(layer)?, keep);
        centres.sort_unstable();
        let experts = layer.experts();
        // Inner products of the logits of all pairs.
        let mut products = vec![0.0; experts * experts];
        for routing in layer.routings() {
            for logits in routing.logits.chunks(experts) {
                for (a, row) in products.chunks_mut(experts).enumerate() {
                    let x = f64::from(logits[a]);
                    row.iter_mut()
                        .zip(logits)
                        .for_each(|(sum, &y)| *sum += x * f64::from(y));
                }
            }
        }
        let cosine = |a: usize, b: usize| {
            let norm = (products[a * experts + a] * products[b * experts + b]).sqrt();
            let product = products[a * experts + b];
            if norm > 0.0 { product / norm } else { 0.0 }
        };
        let mut clusters: Vec<Vec<usize>> = centres.iter().map(|&centre| vec![centre]).collect();
        for expert in (0..experts).filter(|expert| !centres.contains(expert)) {
            // The first of the most similar.
            let mut most = (f64::NEG_INFINITY, 0);
            for (at, &centre) in centres.iter().enumerate() {
                let similar = cosine(expert, centre);
                if similar > most.0 {
                    most = (similar, at);
                }
            }
            if let Some(cluster) = clusters.get_mut(most.1) {
                cluster.push(expert);
            }
        }
        let how = Merging {
            align: self.align,
            tied: self.tied,
        };
        Ok(around(layer, &centres, &clusters, how))
    }
}
