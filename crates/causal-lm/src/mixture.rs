//! Mixtures of experts: a router chooses a few MLPs for each token and adds up what they put out.
//!
//! Experts are run one after the other over all tokens that chose them. So each is loaded once however many windows there
//! are, its products are as large as they can be, and the sum of a token does not depend on what runs beside it: experts
//! are added in ascending order.

use crate::block::Mlp;
use crate::linear::Linear;
use crate::ops;
use crate::tap::{ExpertPass, Routed, Tap};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// The experts of a block and their router.
#[derive(Clone, Debug)]
pub struct Moe {
    /// `[experts, hidden]`.
    pub router: Linear,
    /// How experts are chosen and weighted.
    pub rule: RoutingRule,
    /// All experts, or none where they are loaded one at a time.
    pub experts: Vec<Mlp>,
    /// The expert that every token passes through.
    pub shared: Option<SharedExpert>,
}

/// An expert that every token passes through.
#[derive(Clone, Debug)]
pub struct SharedExpert {
    /// What it computes.
    pub mlp: Mlp,
    /// `[1, hidden]`: its output is multiplied by the sigmoid of this linear.
    pub gate: Linear,
}

/// How a router's logits become gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingRule {
    /// Experts that are chosen for a token.
    pub chosen: usize,
    /// Whether the gates of a token are divided by their sum. Without it they are the softmax over all experts.
    pub normalise: bool,
}

/// Which experts tokens go to.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Logits of all experts, token by token.
    pub logits: Vec<f32>,
    /// Experts among which the router chose.
    pub experts: usize,
    /// Experts of each token.
    pub chosen: usize,
    /// The experts of each token, that of the highest logit first; of equal ones the lower number first.
    pub ids: Vec<u32>,
    /// What multiplies the output of each of `ids`.
    pub gates: Vec<f32>,
}

impl RoutingRule {
    /// Routes tokens by the logits of `experts` experts each.
    ///
    /// # Errors
    /// [`Error::Routing`] when there are fewer experts than a token needs.
    pub fn route(self, logits: Vec<f32>, experts: usize) -> Result<Routing> {
        let Self { chosen, .. } = self;
        if chosen == 0 || chosen > experts || !logits.len().is_multiple_of(experts.max(1)) {
            return Err(Error::Routing { chosen, experts });
        }
        let tokens = logits.len() / experts;
        let (mut ids, mut gates) = (vec![0; tokens * chosen], vec![0.0; tokens * chosen]);
        let rows = logits.par_chunks(experts);
        rows.zip(ids.par_chunks_mut(chosen))
            .zip(gates.par_chunks_mut(chosen))
            .for_each(|((logits, ids), gates)| self.route_token(logits, ids, gates));
        Ok(Routing {
            logits,
            experts,
            chosen,
            ids,
            gates,
        })
    }

    fn route_token(self, logits: &[f32], ids: &mut [u32], gates: &mut [f32]) {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |&a: &u32, &b: &u32| {
            let (x, y) = (logits[a as usize], logits[b as usize]);
            y.total_cmp(&x).then(a.cmp(&b))
        };
        let chosen = ids.len();
        if chosen < order.len() {
            order.select_nth_unstable_by(chosen - 1, by_logit);
            order.truncate(chosen);
        }
        order.sort_unstable_by(by_logit);
        ids.copy_from_slice(&order);
        let max = f64::from(logits[ids[0] as usize]);
        let weight = |logit: f32| (f64::from(logit) - max).exp();
        let sum: f64 = match self.normalise {
            true => ids.iter().map(|&id| weight(logits[id as usize])).sum(),
            false => logits.iter().map(|&logit| weight(logit)).sum(),
        };
        for (gate, &id) in gates.iter_mut().zip(ids.iter()) {
            *gate = (weight(logits[id as usize]) / sum) as f32;
        }
    }
}

impl Routing {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len() / self.chosen
    }

    /// For each expert the tokens that chose it, ascending, and its gates for them.
    pub fn by_expert(&self) -> Vec<(Vec<u32>, Vec<f32>)> {
        let mut all = vec![(Vec::new(), Vec::new()); self.experts];
        for (at, (&id, &gate)) in self.ids.iter().zip(&self.gates).enumerate() {
            let (tokens, gates) = &mut all[id as usize];
            tokens.push((at / self.chosen) as u32);
            gates.push(gate);
        }
        all
    }
}

impl SharedExpert {
    /// What multiplies the output for each token, `[tokens, 1]`.
    ///
    /// # Errors
    /// When `x` has another width than the gate.
    pub fn gates(&self, x: &Tensor) -> Result<Tensor> {
        Ok(candle_nn::ops::sigmoid(&self.gate.forward(x)?)?)
    }
}

impl Moe {
    /// Bytes in memory of the router, the shared expert and the experts that are loaded.
    pub fn bytes(&self) -> usize {
        let shared = self.shared.as_ref();
        let shared = shared.map_or(0, |shared| shared.mlp.bytes() + shared.gate.bytes());
        self.router.bytes() + shared + self.experts.iter().map(Mlp::bytes).sum::<usize>()
    }

    /// Routes the tokens of `x`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// When `x` has another width than the router, and [`Error::Routing`].
    pub fn route(&self, x: &Tensor) -> Result<Routing> {
        let logits = self.router.forward(x)?;
        let logits = logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let logits = ops::with_f32(&logits, <[f32]>::to_vec)?;
        self.rule.route(logits, self.router.outputs())
    }

    /// An expert, where all are loaded.
    pub(crate) fn expert(&self, expert: usize) -> Result<Mlp> {
        let loaded = self.experts.get(expert).cloned();
        loaded.ok_or(Error::Routing {
            chosen: expert + 1,
            experts: self.experts.len(),
        })
    }

    /// What the experts put out for the inputs, `[tokens, hidden]` each, with each expert asked for once.
    pub(crate) fn run(
        &self,
        layer: usize,
        inputs: &[Tensor],
        expert: &mut dyn FnMut(usize) -> Result<Mlp>,
        tap: &mut dyn Tap,
    ) -> Result<Vec<Tensor>> {
        let routings = inputs.iter().map(|x| self.route(x));
        let routings: Vec<Routing> = routings.collect::<Result<_>>()?;
        let at_tap = |source| Error::Tap { layer, source };
        let routed = Routed {
            inputs,
            routings: &routings,
        };
        tap.routed(layer, &routed).map_err(at_tap)?;
        let mut sums = inputs.iter().map(Sum::new).collect::<Result<Vec<_>>>()?;
        let by_expert: Vec<_> = routings.iter().map(Routing::by_expert).collect();
        for id in 0..self.router.outputs() {
            // What the expert reads of each batch.
            let mut rows = Vec::with_capacity(inputs.len());
            let (mut tokens, mut gates, mut first) = (Vec::new(), Vec::new(), 0);
            for (x, of_batch) in inputs.iter().zip(&by_expert) {
                let (of_batch, of_gates) = &of_batch[id];
                if !of_batch.is_empty() {
                    let index = Tensor::new(&of_batch[..], x.device())?;
                    rows.push(x.index_select(&index, 0)?);
                }
                tokens.extend(of_batch.iter().map(|token| token + first));
                gates.extend(of_gates);
                first += x.dim(0)? as u32;
            }
            if rows.is_empty() {
                continue;
            }
            let input = Tensor::cat(&rows, 0)?;
            let pass = pass(&expert(id)?, Some(id), input, tokens, gates)?;
            tap.expert(layer, &pass).map_err(at_tap)?;
            let weighted = pass.weighted()?;
            let mut at = 0;
            for (sum, of_batch) in sums.iter_mut().zip(&by_expert) {
                let (of_batch, _) = &of_batch[id];
                if !of_batch.is_empty() {
                    sum.add(of_batch, &weighted.narrow(0, at, of_batch.len())?)?;
                }
                at += of_batch.len();
            }
        }
        let mut outputs = Vec::with_capacity(inputs.len());
        let mut first = 0;
        for (sum, x) in sums.into_iter().zip(inputs) {
            let sum = sum.finish(x)?;
            let count = x.dim(0)? as u32;
            outputs.push(match &self.shared {
                None => sum,
                Some(shared) => {
                    let gates = shared.gates(x)?.to_dtype(DType::F32)?;
                    let gates = gates.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
                    let tokens = (first..first + count).collect();
                    let pass = pass(&shared.mlp, None, x.clone(), tokens, gates)?;
                    tap.expert(layer, &pass).map_err(at_tap)?;
                    (sum + pass.weighted()?)?
                }
            });
            first += count;
        }
        Ok(outputs)
    }
}

fn pass(
    mlp: &Mlp,
    expert: Option<usize>,
    input: Tensor,
    tokens: Vec<u32>,
    gates: Vec<f32>,
) -> Result<ExpertPass> {
    let neurons = mlp.neurons(&input)?;
    Ok(ExpertPass {
        expert,
        tokens,
        gates,
        output: mlp.down.forward(&neurons)?,
        input,
        neurons,
    })
}

impl ExpertPass {
    /// The outputs multiplied by their gates.
    fn weighted(&self) -> Result<Tensor> {
        let output = &self.output;
        let gates = Tensor::new(&self.gates[..], output.device())?;
        let gates = gates.to_dtype(output.dtype())?.unsqueeze(1)?;
        Ok(output.broadcast_mul(&gates)?)
    }
}

/// The sum of what experts put out for a batch, in place where that is possible.
enum Sum {
    Cpu(Vec<f32>),
    Other(Tensor),
}

impl Sum {
    fn new(x: &Tensor) -> Result<Self> {
        Ok(
            match matches!(x.device(), Device::Cpu) && x.dtype() == DType::F32 {
                true => Self::Cpu(vec![0.0; x.elem_count()]),
                false => Self::Other(x.zeros_like()?),
            },
        )
    }

    fn add(&mut self, tokens: &[u32], rows: &Tensor) -> Result<()> {
        match self {
            Self::Cpu(sums) => {
                let width = rows.dim(1)?;
                ops::with_f32(rows, |rows| {
                    for (&token, row) in tokens.iter().zip(rows.chunks(width)) {
                        let sums = &mut sums[token as usize * width..][..width];
                        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                    }
                })
            }
            Self::Other(sum) => {
                let tokens = Tensor::new(tokens, rows.device())?;
                *sum = sum.index_add(&tokens, rows, 0)?;
                Ok(())
            }
        }
    }

    fn finish(self, like: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Cpu(sums) => Tensor::from_vec(sums, like.shape(), like.device())?,
            Self::Other(sum) => sum,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of six tokens and five experts, of which the last is never chosen.
    fn logits() -> Vec<f32> {
        let logit = |t: i32, e: i32| match e {
            4 => -4.0,
            _ => ((5 * t + 3 * e + (t * e) % 4) % 11 - 5) as f32 / 2.0,
        };
        (0..6)
            .flat_map(|t| (0..5).map(move |e| logit(t, e)))
            .collect()
    }

    fn rule(normalise: bool) -> RoutingRule {
        RoutingRule {
            chosen: 2,
            normalise,
        }
    }

    #[test]
    fn the_highest_logits_are_chosen_and_equal_ones_by_the_lower_number() {
        let routing = rule(true).route(logits(), 5).unwrap();
        assert_eq!(routing.ids, [3, 2, 1, 3, 0, 3, 1, 0, 0, 3, 1, 3]);
        let counts: Vec<usize> = routing.by_expert().iter().map(|(t, _)| t.len()).collect();
        assert_eq!(counts, [3, 3, 1, 5, 0]);
    }

    #[test]
    fn gates_are_shares_of_the_chosen_or_of_all() {
        for (normalise, rows) in [
            (true, [[0.8175745, 0.1824255], [0.9525741, 0.0474259]]),
            (false, [[0.7772998, 0.173_439], [0.9152506, 0.0455677]]),
        ] {
            let routing = rule(normalise).route(logits(), 5).unwrap();
            for (token, expected) in [0, 3].into_iter().zip(rows) {
                for (gate, expected) in routing.gates[2 * token..].iter().zip(expected) {
                    assert!((gate - expected).abs() < 1e-6, "{gate} is not {expected}");
                }
            }
        }
    }

    #[test]
    fn with_all_experts_chosen_both_rules_are_one_softmax() {
        let all = |normalise| {
            let rule = RoutingRule {
                chosen: 5,
                normalise,
            };
            rule.route(logits(), 5).unwrap()
        };
        let (a, b) = (all(true), all(false));
        assert_eq!(a.ids, b.ids);
        for (a, b) in a.gates.iter().zip(&b.gates) {
            assert!((a - b).abs() < 1e-7);
        }
    }

    #[test]
    fn fewer_experts_than_a_token_needs_are_an_error() {
        let error = rule(true).route(vec![1.0; 3], 1).unwrap_err();
        assert!(matches!(
            error,
            Error::Routing {
                chosen: 2,
                experts: 1
            }
        ));
    }
}
