//! What the experts of a block read, kept while their weights are fitted to it.

use super::Routing;
use crate::Result;
use crate::tap::{Routed, Site, Tap, TapResult};
use candle_core::Tensor;

/// What the experts of a block read, and where it goes. As a tap it keeps those of the last block that it saw.
#[derive(Clone, Debug, Default)]
pub struct ExpertInputs {
    /// Input of router and experts, `[tokens, hidden]` for each batch.
    pub inputs: Vec<Tensor>,
    /// The experts of the tokens of each batch.
    pub routings: Vec<Routing>,
}

/// A token of a batch with its gate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertToken {
    /// The batch.
    pub batch: usize,
    /// The token within it.
    pub token: u32,
    /// What multiplies the expert's output for it.
    pub gate: f32,
}

impl ExpertInputs {
    /// The tokens of an expert, and of the others up to `most` that are likeliest for it, with gates of 1.
    pub fn tokens(&self, expert: usize, most: usize) -> (Vec<ExpertToken>, Vec<ExpertToken>) {
        let (mut own, mut others) = (Vec::new(), Vec::new());
        for (batch, routing) in self.routings.iter().enumerate() {
            for token in 0..routing.tokens() {
                let place = |gate: f32| ExpertToken {
                    batch,
                    token: token as u32,
                    gate,
                };
                match routing.gate(token, expert) {
                    Some(gate) => own.push(place(gate)),
                    None => others.push((probability(routing, token, expert), place(1.0))),
                }
            }
        }
        let place = |token: &ExpertToken| (token.batch, token.token);
        others.sort_by(|a, b| b.0.total_cmp(&a.0).then(place(&a.1).cmp(&place(&b.1))));
        others.truncate(most);
        let mut pool: Vec<ExpertToken> = others.into_iter().map(|(_, token)| token).collect();
        pool.sort_unstable_by_key(place);
        (own, pool)
    }

    /// What these tokens are, batch by batch; tokens of one batch follow each other.
    ///
    /// # Errors
    /// When there is no such token.
    pub fn rows(&self, tokens: &[ExpertToken]) -> Result<Vec<Tensor>> {
        let batches = tokens.chunk_by(|a, b| a.batch == b.batch);
        let of_batch = |tokens: &[ExpertToken]| -> Result<Tensor> {
            let x = &self.inputs[tokens[0].batch];
            let ids = tokens.iter().map(|token| token.token);
            Ok(x.index_select(&Tensor::from_iter(ids, x.device())?, 0)?)
        };
        batches.map(of_batch).collect()
    }
}

impl Tap for ExpertInputs {
    fn observe(&mut self, _layer: usize, _site: Site, _x: &Tensor) -> TapResult {
        Ok(())
    }

    fn routed(&mut self, _layer: usize, routed: &Routed<'_>) -> TapResult {
        self.inputs = routed.inputs.to_vec();
        self.routings = routed.routings.to_vec();
        Ok(())
    }
}

/// Softmax over all rows of the router at those of an expert.
fn probability(routing: &Routing, token: usize, expert: usize) -> f64 {
    let logits = &routing.logits[token * routing.experts..][..routing.experts];
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let weight = |logit: f32| (f64::from(logit) - max).exp();
    let own = logits.iter().enumerate();
    let own = own.filter(|(row, _)| routing.expert_of(*row) == expert);
    let own: f64 = own.map(|(_, &logit)| weight(logit)).sum();
    own / logits.iter().map(|&logit| weight(logit)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ExpertMap;
    use crate::mixture::RoutingRule;
    use candle_core::Device;

    #[test]
    fn an_expert_has_its_tokens_and_a_pool_of_those_that_came_closest_to_choosing_it() {
        let rule = RoutingRule {
            chosen: 1,
            normalise: true,
        };
        // Tokens 0 and 3 choose the first of two experts; of the others the second batch's comes closest.
        let batch = |logits: &[f32]| rule.route(logits.to_vec(), 2).unwrap();
        let x = |first: f32| Tensor::new(&[[first], [first + 1.0]], &Device::Cpu).unwrap();
        let inputs = ExpertInputs {
            inputs: vec![x(0.0), x(2.0)],
            routings: vec![batch(&[2.0, 0.0, 0.0, 3.0]), batch(&[0.0, 1.0, 4.0, 1.0])],
        };
        let place = |tokens: &[ExpertToken]| -> Vec<(usize, u32)> {
            tokens.iter().map(|t| (t.batch, t.token)).collect()
        };
        let (own, pool) = inputs.tokens(0, 1);
        assert_eq!(
            (place(&own), place(&pool)),
            (vec![(0, 0), (1, 1)], vec![(1, 0)])
        );
        assert!(own.iter().all(|token| token.gate == 1.0));
        assert_eq!(place(&inputs.tokens(0, 9).1), [(0, 1), (1, 0)]);
        // Both rows as one expert: it has all tokens, and there is nobody else.
        let map = ExpertMap::new(vec![0, 0], 1).unwrap();
        let mut tied = inputs.clone();
        for routing in &mut tied.routings {
            routing.map = Some(map.clone());
        }
        let (all, none) = tied.tokens(0, 9);
        assert_eq!((all.len(), none.len()), (4, 0));
        let rows = inputs.rows(&own).unwrap();
        let values: Vec<Vec<f32>> = rows
            .iter()
            .map(|x| x.flatten_all().unwrap().to_vec1().unwrap())
            .collect();
        assert_eq!(values, [[0.0], [3.0]]);
    }
}
