//! How far candidates are from the dense model.
//!
//! Candidates run side by side, block by block, so that only one block's weights are in memory.
//! Those that agree on all levels up to a block share its result: an offspring starts where it
//! first differs from its parent, or from any other candidate. When hidden states of all would
//! take more memory than allowed, candidates run in groups, neighbours in the order of their
//! levels together.

use super::activations::Activations;
use super::levels::LevelStore;
use super::teacher::{Teacher, logits};
use super::variant::Half;
use crate::ranking::Ranking;
use crate::{Error, Result};
use causal_lm::{Block, Decoder, Head, Progress, Windows};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// What candidates of a generation share while they are compared. Results do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Sharing {
    /// The blocks before their first difference: each prefix of levels runs once.
    Prefixes,
    /// Nothing: every candidate runs from the embedding on, as a measure of what sharing saves.
    Nothing,
}

/// Measures candidates; a candidate keeps a number of steps of each ranking.
pub(crate) struct Fitness<'a> {
    pub(crate) decoder: &'a Decoder<'a>,
    /// The windows that the teacher has seen.
    pub(crate) windows: &'a Windows,
    pub(crate) teacher: &'a Teacher,
    /// One for each sublayer, in the order of the layers, attention first.
    pub(crate) rankings: Vec<&'a Ranking>,
    pub(crate) store: &'a LevelStore,
    /// Bytes of hidden states.
    pub(crate) memory: usize,
    pub(crate) sharing: Sharing,
}

/// Candidates that agree so far, and what they have in common.
struct Run {
    candidates: Vec<usize>,
    hidden: Activations,
}

impl Fitness<'_> {
    /// Mean KL divergence in nats per position on the given windows, of each candidate. Each candidate in each block is
    /// `step` steps of `progress`; with 0 it can be cancelled there and counts nothing.
    ///
    /// # Errors
    /// [`causal_lm::Error::NonFinite`] for a candidate whose logits are not finite; [`Error::Cancelled`].
    pub(crate) fn of(
        &self,
        candidates: &[Vec<usize>],
        windows: &[usize],
        progress: &dyn Progress,
        step: u64,
    ) -> Result<Vec<f64>> {
        let batch = pick(self.windows, windows)?;
        let window_bytes = self.windows.window_len()
            * self.decoder.config().hidden
            * self.decoder.dtype().size_in_bytes();
        // A block's input and output are held at once.
        let together = (self.memory / (2 * windows.len() * window_bytes)).max(1);
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        order.sort_by_key(|&i| &candidates[i]);
        let mut fitness = vec![0.0; candidates.len()];
        for group in order.chunks(together) {
            let after_block = || Ok(progress.advance(step * group.len() as u64)?);
            for (i, kl) in self.of_group(candidates, group, (&batch, windows), &after_block)? {
                fitness[i] = kl;
            }
        }
        Ok(fitness)
    }

    fn of_group(
        &self,
        candidates: &[Vec<usize>],
        group: &[usize],
        (batch, windows): (&Windows, &[usize]),
        after_block: &dyn Fn() -> Result<()>,
    ) -> Result<Vec<(usize, f64)>> {
        let start = Activations::embed(self.decoder, batch)?;
        let mut runs: Vec<Run> = match self.sharing {
            Sharing::Prefixes => vec![Run {
                candidates: group.to_vec(),
                hidden: start,
            }],
            Sharing::Nothing => group
                .iter()
                .map(|&candidate| Run {
                    candidates: vec![candidate],
                    hidden: start.clone(),
                })
                .collect(),
        };
        for layer in 0..self.decoder.config().layers() {
            let block = self.decoder.block(layer)?;
            self.decoder.release(layer);
            let sublayers: Vec<usize> = (0..self.rankings.len())
                .filter(|&s| self.rankings[s].layer == layer)
                .collect();
            let mut next = Vec::new();
            for run in runs {
                let mut split: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
                for candidate in run.candidates {
                    let steps = sublayers.iter().map(|&s| candidates[candidate][s]);
                    split.entry(steps.collect()).or_default().push(candidate);
                }
                next.extend(split.into_iter().map(|(steps, candidates)| {
                    let hidden = run.hidden.clone();
                    (steps, Run { candidates, hidden })
                }));
            }
            let blocks = self.variants(&block, &sublayers, next.iter().map(|(steps, _)| steps))?;
            runs = next
                .into_par_iter()
                .map(|(steps, run)| {
                    let batches = run.hidden.through(&blocks[&steps])?;
                    let hidden = Activations {
                        batches,
                        ..run.hidden
                    };
                    Ok(Run { hidden, ..run })
                })
                .collect::<Result<_>>()?;
            after_block()?;
        }
        let head = self.decoder.head()?;
        let found = self.divergences(&head, &runs, windows)?;
        Ok(runs
            .iter()
            .zip(found)
            .flat_map(|(run, kl)| run.candidates.iter().map(move |&candidate| (candidate, kl)))
            .collect())
    }

    /// The block at every combination of steps; halves that occur in several are made once.
    fn variants<'s>(
        &self,
        block: &Block,
        sublayers: &[usize],
        wanted: impl Iterator<Item = &'s Vec<usize>>,
    ) -> Result<BTreeMap<Vec<usize>, Block>> {
        let widths = self.decoder.config().widths[block.layer];
        let mut halves: BTreeMap<(usize, usize), Half> = BTreeMap::new();
        let mut blocks = BTreeMap::new();
        for steps in wanted {
            if blocks.contains_key(steps) {
                continue;
            }
            let mut variant = block.clone();
            for (&sublayer, &steps) in sublayers.iter().zip(steps) {
                let half = match halves.entry((sublayer, steps)) {
                    Entry::Occupied(made) => made.into_mut(),
                    Entry::Vacant(place) => {
                        let ranking = self.rankings[sublayer];
                        let kept = self.store.load(ranking, steps)?;
                        place.insert(Half::new(block, widths, ranking, kept)?)
                    }
                };
                half.place(&mut variant);
            }
            blocks.insert(steps.clone(), variant);
        }
        Ok(blocks)
    }

    fn divergences(&self, head: &Head, runs: &[Run], windows: &[usize]) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; runs.len()];
        let mut first = 0;
        for batch in 0..runs.first().map_or(0, |run| run.hidden.batches.len()) {
            let count = runs[0].hidden.batches[batch].dim(0)?;
            let windows = &windows[first..first + count];
            first += count;
            let predictions = self.teacher.predictions(windows)?;
            let of_run = |run: &Run| -> Result<f64> {
                let mut rows = Vec::new();
                logits(head, &run.hidden.batches[batch], &mut |logits| {
                    rows.extend(predictions.divergences(rows.len(), logits, head.vocab_size()));
                })?;
                if let Some(row) = rows.iter().position(|kl| !kl.is_finite()) {
                    let len = self.windows.window_len() - 1;
                    return Err(Error::Model(causal_lm::Error::NonFinite {
                        stage: "the logits of a pruned model".into(),
                        window: windows[row / len],
                        position: row % len,
                    }));
                }
                Ok(rows.iter().sum())
            };
            let found: Vec<f64> = runs.par_iter().map(of_run).collect::<Result<_>>()?;
            sums.iter_mut().zip(found).for_each(|(sum, kl)| *sum += kl);
        }
        let positions = (windows.len() * (self.windows.window_len() - 1)) as f64;
        Ok(sums.into_iter().map(|sum| sum / positions).collect())
    }
}

/// The windows at the given places.
fn pick(windows: &Windows, places: &[usize]) -> Result<Windows> {
    let all: Vec<&[u32]> = windows.iter().collect();
    let tokens: Vec<u32> = places.iter().flat_map(|&i| all[i]).copied().collect();
    Ok(Windows::cut(&tokens, windows.window_len(), None)?)
}
