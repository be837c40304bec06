//! NAEE: the best subset by trying all.

use super::{Choice, Choosing};
use crate::experts::layer::{Batch, Layer};
use crate::experts::routing::{gates, order};
use crate::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// The subset of experts with which the layer's output changes least. Every expert runs on every token and every subset is
/// tried: for layers of few experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Naee;

/// Subsets that are tried at most.
const MOST_SUBSETS: usize = 20_000;

impl Choosing for Naee {
    fn choose(&self, layer: &Layer<'_>, keep: usize) -> Result<Choice> {
        let all: Vec<usize> = (0..layer.experts()).collect();
        let subsets = subsets(all.len(), keep, MOST_SUBSETS).ok_or(Error::Unsupported {
            method: "naee",
            model_type: layer.decoder.config().model_type,
            reason: "there are more than 20,000 subsets of its experts",
        })?;
        let mut errors = vec![0.0; subsets.len()];
        layer.for_each_batch(
            all.len(),
            |_| all.clone(),
            |batch| {
                let of_batch = errors_of(batch, &subsets);
                errors
                    .iter_mut()
                    .zip(of_batch)
                    .for_each(|(sum, x)| *sum += x);
                Ok(())
            },
        )?;
        let order = (0..subsets.len()).min_by(|&a, &b| errors[a].total_cmp(&errors[b]));
        // There is at least the empty subset.
        Ok(subsets[order.unwrap_or_default()].clone().into())
    }
}

/// All subsets of `keep` of `count` numbers in lexicographic order, unless there are more than `most`.
pub(crate) fn subsets(count: usize, keep: usize, most: usize) -> Option<Vec<Vec<usize>>> {
    if keep > count {
        return None;
    }
    let mut subset: Vec<usize> = (0..keep).collect();
    let mut all = vec![];
    loop {
        if all.len() == most {
            return None;
        }
        all.push(subset.clone());
        let Some(at) = (0..keep).rev().find(|&at| subset[at] < count - keep + at) else {
            return Some(all);
        };
        subset[at] += 1;
        for next in at + 1..keep {
            subset[next] = subset[next - 1] + 1;
        }
    }
}

/// For each subset the squared change of the layer's output, summed over tokens.
pub(crate) fn errors_of(batch: Batch<'_>, subsets: &[Vec<usize>]) -> Vec<f64> {
    let (tokens, experts) = (batch.outputs.tokens, batch.outputs.experts);
    // Inner products of the experts' outputs, token by token.
    let products: Vec<Vec<f64>> = (0..tokens)
        .into_par_iter()
        .map(|token| {
            let mut products = vec![0.0; experts * experts];
            for a in 0..experts {
                for b in a..experts {
                    let pairs = batch.outputs.row(token, a).iter();
                    let pairs = pairs.zip(batch.outputs.row(token, b));
                    let dot = pairs.map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
                    products[a * experts + b] = dot;
                    products[b * experts + a] = dot;
                }
            }
            products
        })
        .collect();
    let orders: Vec<Vec<usize>> = (0..tokens)
        .map(|token| order(batch.logits(token)))
        .collect();
    let error = |subset: &Vec<usize>| -> f64 {
        let of_token = |token: usize| {
            let among = orders[token].iter().copied();
            let among: Vec<usize> = among.filter(|expert| subset.contains(expert)).collect();
            let mut change = vec![0.0; experts];
            for (expert, gate) in gates(batch.rule, batch.logits(token), &among) {
                change[expert] += gate;
            }
            for (expert, gate) in batch.gates(token) {
                change[expert] -= gate;
            }
            let products = &products[token];
            let of_expert = |a: usize| -> f64 {
                let row = &products[a * experts..][..experts];
                change[a] * row.iter().zip(&change).map(|(p, c)| p * c).sum::<f64>()
            };
            (0..experts).map(of_expert).sum::<f64>()
        };
        (0..tokens).map(of_token).sum::<f64>().max(0.0)
    };
    subsets.par_iter().map(error).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsets_come_in_order_and_not_without_end() {
        let all = subsets(4, 2, 10).unwrap();
        assert_eq!(all.len(), 6);
        assert_eq!((&all[0][..], &all[5][..]), (&[0, 1][..], &[2, 3][..]));
        assert_eq!(subsets(4, 2, 5), None);
        assert_eq!(subsets(3, 3, 5), Some(vec![vec![0, 1, 2]]));
    }
}
