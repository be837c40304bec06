//! Dropping one expert after the other, each time the one that the output misses least.

use super::naee::errors_of;
use super::{Choice, Choosing};
use crate::Result;
use crate::experts::layer::Layer;
use serde::{Deserialize, Serialize};

/// Experts are dropped one by one, each time the one without which the layer's output is nearest to that of all experts,
/// tokens being routed among those that are left. All experts run on every token once for each that is dropped: the
/// subset that [`Naee`](super::Naee) would find, or nearly so, where there are too many to try.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GreedyDrop;

impl Choosing for GreedyDrop {
    fn choose(&self, layer: &Layer<'_>, keep: usize) -> Result<Choice> {
        let all: Vec<usize> = (0..layer.experts()).collect();
        let mut kept = all.clone();
        while kept.len() > keep {
            let without = |at: usize| -> Vec<usize> {
                let others = kept.iter().enumerate().filter(|(other, _)| *other != at);
                others.map(|(_, &expert)| expert).collect()
            };
            let subsets: Vec<Vec<usize>> = (0..kept.len()).map(without).collect();
            let mut errors = vec![0.0; subsets.len()];
            layer.for_each_batch(
                all.len(),
                |_| all.clone(),
                |batch| {
                    let of_batch = errors_of(batch, &subsets);
                    let sums = errors.iter_mut().zip(of_batch);
                    sums.for_each(|(sum, x)| *sum += x);
                    Ok(())
                },
            )?;
            // Of equal ones the higher number goes.
            let least = (0..errors.len()).rev();
            let least = least.min_by(|&a, &b| errors[a].total_cmp(&errors[b]));
            kept = subsets[least.unwrap_or_default()].clone();
        }
        Ok(kept.into())
    }
}
