//! Mixtures of experts: a router chooses a few MLPs for each token and adds up what they put out.
//!
//! Experts are run one after the other over all tokens that chose them. So each is loaded once however many windows there
//! are, its products are as large as they can be, and the sum of a token does not depend on what runs beside it: experts
//! are added in ascending order.
//!
//! Several router rows may share an expert, which then runs once with the sum of their gates, and rows may stand for constant
//! vectors, which are added behind the experts ([`MappedRows`]).

mod inputs;
mod mapped;
mod pass;
mod term;

use crate::block::Mlp;
use crate::config::ExpertMap;
use crate::linear::Linear;
use crate::ops;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

pub use inputs::{ExpertInputs, ExpertToken};
pub use mapped::MappedRows;
pub use pass::MixturePass;
pub use term::LinearTerm;

/// The experts of a block and their router.
#[derive(Clone, Debug)]
pub struct Moe {
    /// `[rows, hidden]`, a row for each expert unless `mapped` says otherwise.
    pub router: Linear,
    /// How experts are chosen and weighted.
    pub rule: RoutingRule,
    /// All experts, or none where they are loaded one at a time.
    pub experts: Vec<Mlp>,
    /// The expert that every token passes through.
    pub shared: Option<SharedExpert>,
    /// What is added to the output of the experts.
    pub term: Option<LinearTerm>,
    /// What router rows stand for, where they are not the experts one by one.
    pub mapped: Option<MappedRows>,
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
    /// Logits of all rows of the router, token by token.
    pub logits: Vec<f32>,
    /// Rows among which the router chose: experts, unless `map` says otherwise.
    pub experts: usize,
    /// Rows of each token.
    pub chosen: usize,
    /// The rows of each token, that of the highest logit first; of equal ones the lower number first.
    pub ids: Vec<u32>,
    /// What multiplies the output of each of `ids`.
    pub gates: Vec<f32>,
    /// What rows stand for, where they are not the experts one by one.
    pub map: Option<ExpertMap>,
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
            map: None,
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

    /// The expert that a row of the router stands for; ids behind the experts are constants.
    pub fn expert_of(&self, row: usize) -> usize {
        let map = self.map.as_ref();
        map.map_or(row, |map| map.ids().get(row).copied().unwrap_or(row))
    }

    /// What multiplies the output of an expert, or a constant, for a token: the sum of the gates of its rows. `None` where the
    /// token chose none of them.
    pub fn gate(&self, token: usize, expert: usize) -> Option<f32> {
        let range = token * self.chosen..(token + 1) * self.chosen;
        let rows = self.ids[range.clone()].iter().zip(&self.gates[range]);
        let own = rows.filter(|(row, _)| self.expert_of(**row as usize) == expert);
        let gates = own.map(|(_, &gate)| f64::from(gate));
        gates.reduce(|a, b| a + b).map(|sum| sum as f32)
    }

    /// For each expert the tokens that chose it, ascending, and its gates for them; behind the experts the same for constants.
    pub fn by_expert(&self) -> Vec<(Vec<u32>, Vec<f32>)> {
        let Some(map) = &self.map else {
            let mut all = vec![(Vec::new(), Vec::new()); self.experts];
            for (at, (&id, &gate)) in self.ids.iter().zip(&self.gates).enumerate() {
                let (tokens, gates) = &mut all[id as usize];
                tokens.push((at / self.chosen) as u32);
                gates.push(gate);
            }
            return all;
        };
        let mut all = vec![(Vec::new(), Vec::new()); map.experts() + map.constants()];
        for token in 0..self.tokens() {
            let rows = &self.ids[token * self.chosen..][..self.chosen];
            let mut experts: Vec<usize> = rows
                .iter()
                .map(|&row| self.expert_of(row as usize))
                .collect();
            experts.sort_unstable();
            experts.dedup();
            for expert in experts {
                let (tokens, gates) = &mut all[expert];
                tokens.push(token as u32);
                gates.extend(self.gate(token, expert));
            }
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
    /// Number of experts: the rows of the router, unless some share experts or stand for constants.
    pub fn experts(&self) -> usize {
        let mapped = self.mapped.as_ref();
        mapped.map_or(self.router.outputs(), |mapped| mapped.map.experts())
    }

    /// Bytes in memory of the router, constants, the shared expert, the linear term and the experts that are loaded.
    pub fn bytes(&self) -> usize {
        let term = self.term.as_ref().map_or(0, LinearTerm::bytes);
        let shared = self.shared.as_ref();
        let shared = shared.map_or(0, |shared| shared.mlp.bytes() + shared.gate.bytes());
        let novices = self.mapped.iter().filter_map(|rows| rows.novices.as_ref());
        let novices = novices.map(|x| x.elem_count() * x.dtype().size_in_bytes());
        let beside = shared + term + novices.sum::<usize>();
        self.router.bytes() + beside + self.experts.iter().map(Mlp::bytes).sum::<usize>()
    }

    /// Routes the tokens of `x`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// When `x` has another width than the router, and [`Error::Routing`], also for a map of another number of rows.
    pub fn route(&self, x: &Tensor) -> Result<Routing> {
        let logits = self.router.forward(x)?;
        let logits = logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let logits = ops::with_f32(&logits, <[f32]>::to_vec)?;
        let rows = self.router.outputs();
        let map = self.mapped.as_ref().map(|mapped| &mapped.map);
        if let Some(map) = map.filter(|map| map.rows() != rows) {
            return Err(Error::Routing {
                chosen: map.rows(),
                experts: rows,
            });
        }
        Ok(Routing {
            map: map.cloned(),
            ..self.rule.route(logits, rows)?
        })
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
    fn rows_of_one_expert_add_up_their_gates_and_ids_behind_the_experts_are_constants() {
        // Rows 0 and 3 are one expert, 1 and 4 the other, 2 a constant.
        let map = ExpertMap::new(vec![0, 1, 2, 0, 1], 2).unwrap();
        let routing = Routing {
            map: Some(map),
            ..rule(true).route(logits(), 5).unwrap()
        };
        // Rows of the tokens: 3 2, 1 3, 0 3, 1 0, 0 3, 1 3.
        let [first, second, constant]: [(Vec<u32>, Vec<f32>); 3] =
            routing.by_expert().try_into().unwrap();
        assert_eq!(first.0, [0, 1, 2, 3, 4, 5]);
        assert_eq!(second.0, [1, 3, 5]);
        assert_eq!(constant.0, [0]);
        let gate = |token: usize, slot: usize| routing.gates[2 * token + slot];
        assert_eq!(first.1[0], gate(0, 0));
        assert_eq!((constant.1[0], second.1[0]), (gate(0, 1), gate(1, 0)));
        for (at, token) in [(2, 2), (4, 4)] {
            assert!((first.1[at] - 1.0).abs() < 1e-6, "{token}");
            assert_eq!(routing.gate(token, 0), Some(first.1[at]));
        }
        assert_eq!(routing.gate(2, 1), None);
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
