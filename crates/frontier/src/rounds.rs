//! The plan of a budget, and measuring around it: divergences of sites add up only nearly, so that each site of a plan is moved
//! with all others as planned, and the budget divided again within a few steps of it.

use crate::divide::Choice;
use crate::driver::Frontier;
use crate::error::Result;
use crate::measure::Divergence;
use crate::menu::{Menu, Price};
use crate::plan::{Plan, Round};
use causal_lm::Progress;
use prune_structured::rate_distortion::{Point, knapsack};

impl Frontier<'_> {
    /// The best plan for a budget in bytes, measured, with rounds of measuring around it. Where the best choice along one
    /// axis or one of llama.cpp's mixes of block types is better, the plan goes on from that.
    ///
    /// # Errors
    /// [`crate::Error::Budget`] below the smallest plan, [`crate::Error::Cancelled`], and what making and measuring report.
    pub fn plan(&mut self, budget: u64, progress: &dyn Progress) -> Result<Plan> {
        let mut best = self.first(budget, progress)?;
        if best.choice.items != self.dense {
            self.improve(&mut best, budget, progress)?;
            if self.try_alternatives(&mut best, budget, progress)? {
                self.improve(&mut best, budget, progress)?;
            }
            if self.options.refine > 0 {
                let of = (best.choice.envelopes.as_slice(), budget);
                let now = (best.choice.items.clone(), best.measured);
                let (items, measured, rounds) = self.refine(now, of, progress)?;
                (best.choice.items, best.measured) = (items, measured);
                best.rounds.extend(rounds);
            }
        }
        Ok(self.to_plan(budget, &best.choice.items, best.measured, best.rounds))
    }

    /// The plan of a budget in bytes as the division of the curves gives it, measured, without rounds around it.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn divided_plan(&mut self, budget: u64, progress: &dyn Progress) -> Result<Plan> {
        let first = self.first(budget, progress)?;
        Ok(self.to_plan(budget, &first.choice.items, first.measured, first.rounds))
    }

    /// The division, measured.
    fn first(&mut self, budget: u64, progress: &dyn Progress) -> Result<Best> {
        let choice = self.choose(budget, &|_, _| true)?;
        let measured = self.measure_plans(std::slice::from_ref(&choice.items), progress)?[0];
        let round = Round {
            predicted: Some(choice.predicted),
            measured,
            kept: true,
        };
        Ok(Best {
            choice,
            measured,
            rounds: vec![round],
        })
    }

    /// Rounds of measuring around a plan, to none that is worse.
    fn improve(&mut self, best: &mut Best, budget: u64, progress: &dyn Progress) -> Result<()> {
        for _ in 0..self.options.rounds {
            let Choice {
                items,
                envelopes,
                price,
                ..
            } = &best.choice;
            let around = self.measure_around(items, envelopes, progress)?;
            let (before, mut better) = (best.measured.mean, false);
            let mut tried = Vec::new();
            // What was extrapolated may have misled: then once more with what was measured alone.
            for reach in [self.options.reach, 1] {
                let within = (budget, *price);
                let Some((next, change)) = self.move_within(items, &around, within, reach) else {
                    continue;
                };
                let of_next = self.measure_plans(std::slice::from_ref(&next), progress)?[0];
                better = of_next.mean < before;
                // A sum of gains beyond all that there is to gain predicts nothing.
                let predicted = Some(before + change).filter(|sum| *sum >= 0.0);
                tried.push((next, predicted, of_next));
                if better {
                    break;
                }
            }
            for (items, predicted, measured) in tried {
                best.compare(items, predicted, measured);
            }
            if !better || before - best.measured.mean < self.options.gain * before {
                break;
            }
        }
        Ok(())
    }

    /// Measures what other ways to spend the budget offer; whether one of them is better. The sum over sites may mislead a
    /// choice among many more than one along few, and has nothing to say of mixes, whose linears of a site have different types.
    fn try_alternatives(
        &mut self,
        best: &mut Best,
        budget: u64,
        progress: &dyn Progress,
    ) -> Result<bool> {
        let joint = best.choice.envelopes.clone();
        let alternatives = self.alternatives(budget)?;
        let items: Vec<Vec<usize>> = alternatives.iter().map(|c| c.items.clone()).collect();
        let measured = self.measure_plans(&items, progress)?;
        let mut better = false;
        for (mut choice, measured) in alternatives.into_iter().zip(measured) {
            let predicted = self.predicted_of(&choice.items);
            if choice.items == best.choice.items
                || !best.compare(choice.items.clone(), predicted, measured)
            {
                continue;
            }
            // A site may get whatever it may in the joint division, where that has what it got.
            for ((own, joint), item) in choice.envelopes.iter_mut().zip(&joint).zip(&choice.items) {
                if joint.contains(item) {
                    own.clone_from(joint);
                }
            }
            (best.choice, better) = (choice, true);
        }
        Ok(better)
    }

    /// What moving each site up to the reach from a plan would change: for each site its choices around the present one,
    /// from few bytes to many, with the change of the divergence.
    fn measure_around(
        &mut self,
        now: &[usize],
        envelopes: &[Vec<usize>],
        progress: &dyn Progress,
    ) -> Result<Vec<Vec<Neighbour>>> {
        let place = |site: usize| envelopes[site].iter().position(|&item| item == now[site]);
        let mut candidates = vec![now.to_vec()];
        let mut of_step = Vec::new();
        for (site, envelope) in envelopes.iter().enumerate() {
            let Some(at) = place(site) else { continue };
            for next in [at.checked_sub(1), Some(at + 1)].into_iter().flatten() {
                if let Some(&item) = envelope.get(next) {
                    candidates.push(self.with(now, site, item));
                    of_step.push((site, next));
                }
            }
        }
        let tokens = self.options.coarse_tokens;
        let stage = "measuring around the plan";
        let found = self.divergences(stage, &candidates, now, tokens, progress)?;
        let change = |site: usize, at: usize| -> Option<f64> {
            let measured = of_step.iter().position(|&step| step == (site, at))?;
            Some(found[measured + 1].mean - found[0].mean)
        };
        let mut around = Vec::new();
        for (site, envelope) in envelopes.iter().enumerate() {
            let menu = &self.menus[site];
            let alone = |at: usize| self.distortions[site].of(menu, envelope[at]);
            let neighbour = |at: usize, change: f64, steps: usize| Neighbour {
                item: envelope[at],
                bytes: menu.items[envelope[at]].bytes.unwrap_or(0),
                change,
                steps,
            };
            let Some(at) = place(site) else {
                let bytes = menu.items[now[site]].bytes.unwrap_or(0);
                around.push(vec![Neighbour {
                    item: now[site],
                    bytes,
                    change: 0.0,
                    steps: 0,
                }]);
                continue;
            };
            let mut of_site = Vec::new();
            let first = at.saturating_sub(self.options.reach);
            let last = (at + self.options.reach).min(envelope.len() - 1);
            for to in first..=last {
                let steps = to.abs_diff(at);
                let near = if to < at { at.wrapping_sub(1) } else { at + 1 };
                let found = match steps {
                    0 => Some(0.0),
                    _ => change(site, near),
                };
                let Some(found) = found else { continue };
                // Further steps grow as those of the site alone do, by as much more or less as the first step.
                let growth = match alone(near.min(envelope.len() - 1)) - alone(at) {
                    _ if steps < 2 => 0.0,
                    expected if expected != 0.0 => {
                        (found / expected).clamp(0.0, 4.0) * (alone(to) - alone(near))
                    }
                    _ => alone(to) - alone(near),
                };
                of_site.push(neighbour(to, found + growth, steps));
            }
            around.push(of_site);
        }
        Ok(around)
    }

    /// The best move within a number of steps; `None` where no site moves.
    fn move_within(
        &self,
        now: &[usize],
        around: &[Vec<Neighbour>],
        (budget, price): (u64, Price),
        reach: usize,
    ) -> Option<(Vec<usize>, f64)> {
        let near = |of_site: &Vec<Neighbour>| -> Vec<Neighbour> {
            let within = of_site.iter().filter(|n| n.steps <= reach);
            within.copied().collect()
        };
        let around: Vec<Vec<Neighbour>> = around.iter().map(near).collect();
        let curve = |(menu, of_site): (&Menu, &Vec<Neighbour>)| -> Vec<Point> {
            let point = |n: &Neighbour| Point {
                cost: n.bytes,
                distortion: n.change + price.of(&menu.items[n.item]),
            };
            of_site.iter().map(point).collect()
        };
        let curves: Vec<Vec<Point>> = self.menus.iter().zip(&around).map(curve).collect();
        let taken = knapsack(&curves, budget.checked_sub(self.fixed)?)?;
        let of_site = || taken.iter().zip(&around).map(|(&i, of_site)| of_site[i]);
        let next: Vec<usize> = of_site().map(|n| n.item).collect();
        if !self.meets(&next) {
            return None;
        }
        (next != now).then(|| (next, of_site().map(|n| n.change).sum()))
    }
}

/// The best plan so far.
struct Best {
    choice: Choice,
    measured: Divergence,
    /// What was measured on the way to it.
    rounds: Vec<Round>,
}

impl Best {
    /// Records another plan and takes its items where it is better; whether it is.
    fn compare(&mut self, items: Vec<usize>, predicted: Option<f64>, measured: Divergence) -> bool {
        let kept = measured.mean < self.measured.mean;
        self.rounds.push(Round {
            predicted,
            measured,
            kept,
        });
        if kept {
            (self.choice.items, self.measured) = (items, measured);
        }
        kept
    }
}

/// A choice near the present one.
#[derive(Clone, Copy, Debug)]
struct Neighbour {
    item: usize,
    bytes: u64,
    /// Of the divergence of the whole plan.
    change: f64,
    steps: usize,
}
