//! Drawn exchanges around a plan: some sites get more, others give as much up, the whole plan is measured, and the better
//! one stays. What the sum over sites leaves is found this way, at many passes each.

use crate::driver::Frontier;
use crate::error::Result;
use crate::measure::Divergence;
use crate::plan::Round;
use causal_lm::Progress;
use prune_structured::evolution::{self, Stage};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Plans drawn in a generation.
const OFFSPRING: usize = 12;
/// How many of them are measured on all tokens.
const SURVIVORS: usize = 3;

/// What plans are drawn from.
struct Space<'e> {
    /// What each site may get, from few bytes to many.
    envelopes: &'e [Vec<usize>],
    budget: u64,
}

impl Frontier<'_> {
    /// The best plan that some generations of exchanges find from `now`, with the rounds. Never a worse one.
    pub(crate) fn refine(
        &mut self,
        (now, measured): (Vec<usize>, Divergence),
        (envelopes, budget): (&[Vec<usize>], u64),
        progress: &dyn Progress,
    ) -> Result<(Vec<usize>, Divergence, Vec<Round>)> {
        let space = Space { envelopes, budget };
        let stage = |tokens, survivors| Stage { tokens, survivors };
        let stages = [
            stage(self.options.coarse_tokens, SURVIVORS),
            stage(self.options.fine_tokens, 1),
        ];
        let (mut now, mut measured, mut rounds) = (now, measured, Vec::new());
        for generation in 0..self.options.refine {
            // A generator for each generation, so that a run that was stopped draws the same.
            let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed);
            rng.set_stream(1 + generation as u64);
            let drawn =
                evolution::offspring(&now, OFFSPRING, || self.exchange(&space, &now, &mut rng));
            if drawn.is_empty() {
                break;
            }
            let base = now.clone();
            let mut found: Vec<(Vec<usize>, Divergence)> = Vec::new();
            let mut evaluate = |at: usize, candidates: &[Vec<usize>]| -> Result<Vec<f64>> {
                let tokens = stages[at].tokens;
                let what = format!("exchanges {} of {}", generation + 1, self.options.refine);
                let all = self.divergences(&what, candidates, &base, tokens, progress)?;
                if at + 1 == stages.len() {
                    found.extend(candidates.iter().cloned().zip(all.iter().copied()));
                }
                Ok(all.iter().map(|kl| kl.mean).collect())
            };
            let best = evolution::select(&stages, &now, drawn, &mut evaluate)?;
            let kept = best.fitness < measured.mean;
            let of_best = found
                .into_iter()
                .find(|(items, _)| *items == best.candidate);
            let Some((_, of_best)) = of_best.filter(|_| kept) else {
                continue;
            };
            rounds.push(Round {
                predicted: Some(
                    (measured.mean + self.sum(&best.candidate) - self.sum(&now)).max(0.0),
                ),
                measured: of_best,
                kept,
            });
            (now, measured) = (best.candidate, of_best);
        }
        Ok((now, measured, rounds))
    }

    /// Another plan within the budget: some sites one step dearer, as many others cheaper as pay for them, and what is left
    /// spent on one site more.
    fn exchange(&self, space: &Space<'_>, now: &[usize], rng: &mut impl Rng) -> Vec<usize> {
        let Space { envelopes, budget } = *space;
        let place = |items: &[usize], site: usize| -> Option<usize> {
            envelopes[site].iter().position(|&item| item == items[site])
        };
        let up = |items: &[usize], site: usize| -> Option<usize> {
            envelopes[site].get(place(items, site)? + 1).copied()
        };
        let down = |items: &[usize], site: usize| -> Option<usize> {
            let cheaper = place(items, site)?.checked_sub(1)?;
            envelopes[site].get(cheaper).copied()
        };
        let mut items = now.to_vec();
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.shuffle(rng);
        let mut raised = Vec::new();
        for _ in 0..evolution::flips(rng) {
            let next = order
                .iter()
                .find(|site| !raised.contains(*site) && up(&items, **site).is_some());
            let Some(&site) = next else { break };
            items[site] = up(&items, site).unwrap_or(items[site]);
            raised.push(site);
        }
        order.shuffle(rng);
        for &site in order.iter().filter(|site| !raised.contains(site)) {
            if self.bytes_of(&items) <= budget {
                break;
            }
            items[site] = down(&items, site).unwrap_or(items[site]);
        }
        order.shuffle(rng);
        for &site in &order {
            let Some(dearer) = up(&items, site) else {
                continue;
            };
            let richer = self.with(&items, site, dearer);
            if self.bytes_of(&richer) <= budget && self.meets(&richer) {
                items = richer;
                break;
            }
        }
        // What does not pay for itself is no exchange.
        match self.bytes_of(&items) <= budget && self.meets(&items) {
            true => items,
            false => now.to_vec(),
        }
    }
}
