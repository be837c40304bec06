//! One layer as methods see it: statistics of its experts, and their outputs where a method asks for more.

use super::collect::Collector;
use super::routing::{logits, restricted};
use super::statistics::LayerStatistics;
use crate::Result;
use crate::tensor::values;
use candle_core::{DType, Device, Tensor};
use causal_lm::block::Mlp;
use causal_lm::mixture::{Routing, RoutingRule};
use causal_lm::{Decoder, Progress};

/// Values of experts' outputs that are held at once: a quarter of a GiB.
const MOST_VALUES: usize = 1 << 26;

/// A layer whose experts are to be compared.
pub(crate) struct Layer<'a> {
    pub(crate) decoder: &'a Decoder<'a>,
    pub(crate) index: usize,
    pub(crate) rule: RoutingRule,
    pub(crate) statistics: LayerStatistics,
    inputs: Vec<Tensor>,
    routings: Vec<Routing>,
    pub(crate) progress: &'a dyn Progress,
}

/// Outputs of experts for the tokens of a batch.
pub(crate) struct Outputs {
    pub(crate) width: usize,
    pub(crate) experts: usize,
    pub(crate) tokens: usize,
    /// For each token and expert one more than the place of its row, or 0.
    at: Vec<u32>,
    rows: Vec<f32>,
}

/// Tokens with their logits and the outputs of experts for them.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a> {
    pub(crate) rule: RoutingRule,
    pub(crate) routing: &'a Routing,
    pub(crate) outputs: &'a Outputs,
}

impl Outputs {
    pub(crate) fn new(tokens: usize, experts: usize, width: usize) -> Self {
        Self {
            width,
            experts,
            tokens,
            at: vec![0; tokens * experts],
            rows: vec![],
        }
    }

    /// Adds an expert's outputs for some tokens.
    pub(crate) fn add(&mut self, expert: usize, tokens: &[u32], rows: &[f32]) {
        let first = self.rows.len() / self.width;
        self.rows.extend_from_slice(rows);
        for (at, &token) in tokens.iter().enumerate() {
            self.at[token as usize * self.experts + expert] = (first + at + 1) as u32;
        }
    }

    /// The output of an expert for a token, which must have been asked for.
    pub(crate) fn row(&self, token: usize, expert: usize) -> &[f32] {
        match self.at[token * self.experts + expert] {
            0 => &[],
            at => &self.rows[(at as usize - 1) * self.width..][..self.width],
        }
    }
}

impl Batch<'_> {
    /// Logits of a token.
    pub(crate) fn logits(&self, token: usize) -> &[f32] {
        logits(self.routing, token)
    }

    /// The gates of a token in the model.
    pub(crate) fn gates(&self, token: usize) -> impl Iterator<Item = (usize, f64)> {
        let chosen = self.routing.chosen;
        let range = token * chosen..(token + 1) * chosen;
        let ids = self.routing.ids[range.clone()]
            .iter()
            .map(|&id| id as usize);
        ids.zip(self.routing.gates[range].iter().map(|&g| f64::from(g)))
    }

    /// Σ g f over gates.
    pub(crate) fn sum(&self, token: usize, gates: impl Iterator<Item = (usize, f64)>) -> Vec<f64> {
        let mut sum = vec![0.0; self.outputs.width];
        for (expert, gate) in gates {
            for (sum, &x) in sum.iter_mut().zip(self.outputs.row(token, expert)) {
                *sum += gate * f64::from(x);
            }
        }
        sum
    }

    /// ‖Σ c f‖² for coefficients that are summed up by expert.
    pub(crate) fn square(&self, token: usize, coefficients: &[(usize, f64)]) -> f64 {
        let sum = self.sum(token, coefficients.iter().copied());
        sum.iter().map(|x| x * x).sum()
    }
}

impl<'a> Layer<'a> {
    pub(crate) fn new(
        (decoder, index): (&'a Decoder<'a>, usize),
        rule: RoutingRule,
        collector: Collector,
        progress: &'a dyn Progress,
    ) -> Self {
        let Collector {
            statistics,
            inputs,
            routings,
        } = collector;
        Self {
            decoder,
            index,
            rule,
            statistics,
            inputs,
            routings,
            progress,
        }
    }

    /// Number of experts.
    pub(crate) fn experts(&self) -> usize {
        self.statistics.experts.len()
    }

    /// Loads an expert.
    pub(crate) fn expert(&self, expert: usize) -> Result<Mlp> {
        let mlp = self.decoder.expert(self.index, expert)?;
        self.decoder.release_expert(self.index, expert);
        Ok(mlp)
    }

    /// Rows of the router, in f64.
    pub(crate) fn router(&self) -> Result<Vec<Vec<f64>>> {
        let name = self.decoder.config().names.router(self.index);
        let rows = self.decoder.checkpoint().tensor_as(
            // A layer with experts has a router.
            &name.unwrap_or_default(),
            DType::F64,
            &Device::Cpu,
        )?;
        Ok(rows.to_vec2()?)
    }

    /// Weights of an expert, gate, up and down one after the other.
    pub(crate) fn weights(&self, expert: usize) -> Result<Vec<f32>> {
        let mlp = self.expert(expert)?;
        let linears = mlp.gate.iter().chain([&mlp.up, &mlp.down]);
        let mut weights = Vec::new();
        for linear in linears {
            let weight = linear
                .weight()?
                .to_dtype(DType::F32)?
                .to_device(&Device::Cpu)?;
            weights.extend(weight.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(weights)
    }

    /// What the layer reads of some neighbouring tokens, counted over all windows in their order: a row for each.
    pub(crate) fn inputs(&self, first: usize, count: usize) -> Result<Vec<f32>> {
        let (mut rows, mut before) = (Vec::new(), 0);
        for x in &self.inputs {
            let tokens = x.dim(0)?;
            let from = first.clamp(before, before + tokens);
            let to = (first + count).clamp(before, before + tokens);
            if from < to {
                rows.extend(values(&x.narrow(0, from - before, to - from)?)?);
            }
            before += tokens;
        }
        Ok(rows)
    }

    /// Outputs of the experts that `wanted` names for a token by its logits, at most `most` for each. As many tokens at a
    /// time as memory allows, in their order; each expert is loaded once for them.
    pub(crate) fn for_each_batch(
        &self,
        most: usize,
        wanted: impl Fn(&[f32]) -> Vec<usize>,
        mut visit: impl FnMut(Batch<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut first = 0;
        while first < self.inputs.len() {
            let mut last = first + 1;
            let mut values = self.inputs[first].elem_count() * most;
            while let Some(next) = self.inputs.get(last) {
                values += next.elem_count() * most;
                if values > MOST_VALUES {
                    break;
                }
                last += 1;
            }
            let x = Tensor::cat(&self.inputs[first..last], 0)?;
            let routing = joined(&self.routings[first..last]);
            first = last;
            // The windows of a single input may be too many.
            let tokens = routing.tokens();
            let at_once = (MOST_VALUES / (x.dim(1)? * most).max(1)).max(1);
            for start in (0..tokens).step_by(at_once) {
                let count = at_once.min(tokens - start);
                let part = (x.narrow(0, start, count)?, &part(&routing, start, count));
                self.visit_batch(part, &wanted, &mut visit)?;
            }
        }
        Ok(())
    }

    fn visit_batch(
        &self,
        (x, routing): (Tensor, &Routing),
        wanted: &impl Fn(&[f32]) -> Vec<usize>,
        visit: &mut impl FnMut(Batch<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut tokens_of = vec![Vec::new(); routing.experts];
        for token in 0..routing.tokens() {
            for expert in wanted(logits(routing, token)) {
                tokens_of[expert].push(token as u32);
            }
        }
        let mut outputs = Outputs::new(routing.tokens(), routing.experts, x.dim(1)?);
        for (expert, tokens) in tokens_of.iter().enumerate() {
            self.progress.advance(0)?;
            if tokens.is_empty() {
                continue;
            }
            let index = Tensor::new(&tokens[..], x.device())?;
            let rows = run(&self.expert(expert)?, &x.index_select(&index, 0)?)?;
            outputs.add(expert, tokens, &rows);
        }
        visit(Batch {
            rule: self.rule,
            routing,
            outputs: &outputs,
        })
    }

    /// The same for the experts of the model's own choice and those chosen among `kept`.
    pub(crate) fn for_each_rerouted(
        &self,
        kept: &[usize],
        visit: impl FnMut(Batch<'_>) -> Result<()>,
    ) -> Result<()> {
        let rule = self.rule;
        let wanted = |logits: &[f32]| {
            let dense = restricted(rule, logits, |_| true);
            let among = restricted(rule, logits, |e| kept.contains(&e));
            let mut experts: Vec<usize> = dense.iter().chain(&among).map(|(e, _)| *e).collect();
            experts.sort_unstable();
            experts.dedup();
            experts
        };
        self.for_each_batch(2 * rule.chosen, wanted, visit)
    }

    /// For each expert the mean of its outputs over all tokens, whether they chose it or not.
    pub(crate) fn means_over_all(&self) -> Result<Vec<Vec<f64>>> {
        let mut means = Vec::with_capacity(self.experts());
        for expert in 0..self.experts() {
            self.progress.advance(0)?;
            let mlp = self.expert(expert)?;
            let mut sum: Vec<f64> = Vec::new();
            for x in &self.inputs {
                let width = x.dim(1)?;
                sum.resize(width, 0.0);
                for row in run(&mlp, x)?.chunks(width) {
                    sum.iter_mut()
                        .zip(row)
                        .for_each(|(sum, &x)| *sum += f64::from(x));
                }
            }
            let tokens = self.statistics.tokens.max(1) as f64;
            means.push(sum.into_iter().map(|sum| sum / tokens).collect());
        }
        Ok(means)
    }

    /// Logits of all tokens, batch by batch.
    pub(crate) fn routings(&self) -> &[Routing] {
        &self.routings
    }
}

/// The same for all their tokens.
fn joined(routings: &[Routing]) -> Routing {
    let shape = routings.first();
    Routing {
        logits: routings
            .iter()
            .flat_map(|r| r.logits.iter().copied())
            .collect(),
        experts: shape.map_or(0, |routing| routing.experts),
        chosen: shape.map_or(1, |routing| routing.chosen),
        ids: routings
            .iter()
            .flat_map(|r| r.ids.iter().copied())
            .collect(),
        gates: routings
            .iter()
            .flat_map(|r| r.gates.iter().copied())
            .collect(),
        map: shape.and_then(|routing| routing.map.clone()),
    }
}

/// The same for some neighbouring tokens.
fn part(routing: &Routing, start: usize, count: usize) -> Routing {
    let (experts, chosen) = (routing.experts, routing.chosen);
    let of_chosen = start * chosen..(start + count) * chosen;
    Routing {
        logits: routing.logits[start * experts..(start + count) * experts].to_vec(),
        experts,
        chosen,
        ids: routing.ids[of_chosen.clone()].to_vec(),
        gates: routing.gates[of_chosen].to_vec(),
        map: routing.map.clone(),
    }
}

/// An expert's outputs for some rows.
fn run(mlp: &Mlp, x: &Tensor) -> Result<Vec<f32>> {
    let output = mlp.down.forward(&mlp.neurons(x)?)?;
    let output = output.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    Ok(output.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_routing_joined_are_the_whole() {
        let rule = RoutingRule {
            chosen: 2,
            normalise: true,
        };
        let logits = (0..15).map(|i| ((i * 7) % 11) as f32).collect();
        let whole = rule.route(logits, 3).unwrap();
        let parts = [(0, 2), (2, 2), (4, 1)].map(|(start, count)| part(&whole, start, count));
        assert_eq!(parts.each_ref().map(Routing::tokens), [2, 2, 1]);
        let again = joined(&parts);
        assert_eq!(
            (again.logits, again.ids, again.gates),
            (whole.logits, whole.ids, whole.gates)
        );
    }
}
