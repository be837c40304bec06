//! Mixtures of experts: a router chooses a few MLPs for each token and adds up what they put out.
//!
//! Experts are run one after the other over all tokens that chose them. So each is loaded once however many windows there
//! are, its products are as large as they can be, and the sum of a token does not depend on what runs beside it: experts
//! are added in ascending order.

mod inputs;
mod pass;
mod term;

use crate::block::Mlp;
use crate::linear::Linear;
use crate::ops;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

pub use inputs::{ExpertInputs, ExpertToken};
pub use pass::MixturePass;
pub use term::LinearTerm;

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
    /// What is added to the output of the experts.
    pub term: Option<LinearTerm>,
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
    /// Bytes in memory of the router, the shared expert, the linear term and the experts that are loaded.
    pub fn bytes(&self) -> usize {
        let term = self.term.as_ref().map_or(0, LinearTerm::bytes);
        let shared = self.shared.as_ref();
        let shared = shared.map_or(0, |shared| shared.mlp.bytes() + shared.gate.bytes());
        self.router.bytes() + shared + term + self.experts.iter().map(Mlp::bytes).sum::<usize>()
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
