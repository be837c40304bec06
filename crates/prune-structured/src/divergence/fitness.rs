//! How far candidates are from the dense model.
//!
//! Candidates run side by side, block by block, so that only one block's weights are in memory, and of a block with experts
//! one expert for each choice.
//! Those that agree on all levels up to a block share its result: an offspring starts where it
//! first differs from its parent, or from any other candidate. When hidden states of all would
//! take more memory than allowed, candidates run in groups, neighbours in the order of their
//! levels together.

use super::activations::Activations;
use super::teacher::Teacher;
use super::variant::Half;
use crate::{Error, Result};
use candle_core::Tensor;
use causal_lm::block::Mlp;
use causal_lm::mixture::MixturePass;
use causal_lm::{Block, Decoder, Head, NoTap, Progress, Windows};
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

/// Where a site is in a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The embedding, and the head where it is tied to it.
    Embedding,
    /// A half of this block.
    Block(usize),
    /// The head, where it is a matrix of its own.
    Head,
}

/// The places in which candidates differ, and what a choice makes of each.
///
/// Sites are numbered in the order of the data: the embedding, the halves of the blocks, the head. A choice is a number
/// whose meaning the implementation knows.
pub trait Sites: Sync {
    /// One for each site.
    fn places(&self) -> &[Place];

    /// The half of a loaded dense block, without its experts, that `choice` makes of a site in this block.
    ///
    /// # Errors
    /// What making or reading it reports.
    fn half(&self, block: &Block, site: usize, choice: usize) -> Result<Half>;

    /// Whether a site is the experts of its block: then [`Sites::expert`] gives what a choice makes of them, not
    /// [`Sites::half`].
    fn holds_experts(&self, _site: usize) -> bool {
        false
    }

    /// The expert of block `layer` that `choice` makes of a site that holds them.
    ///
    /// # Errors
    /// What making or reading it reports.
    fn expert(&self, layer: usize, _site: usize, _choice: usize, _expert: usize) -> Result<Mlp> {
        Err(Error::Missing {
            layer,
            what: "an expert",
            need: "a site that holds experts makes them",
        })
    }

    /// The matrix that `choice` makes of the embedding or the head, `[vocab, hidden]`; `None` for the dense one.
    ///
    /// # Errors
    /// What making or reading it reports.
    fn matrix(&self, _site: usize, _choice: usize) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// Measures candidates; a candidate is a choice for each site.
pub struct Fitness<'a> {
    /// The dense model.
    pub decoder: &'a Decoder<'a>,
    /// The windows that the teacher has seen.
    pub windows: &'a Windows,
    /// Predictions of the dense model on them.
    pub teacher: &'a Teacher,
    /// What candidates choose from.
    pub sites: &'a dyn Sites,
    /// Bytes of hidden states.
    pub memory: usize,
    /// What candidates share.
    pub sharing: Sharing,
}

/// Candidates that agree so far, and what they have in common.
struct Run {
    candidates: Vec<usize>,
    hidden: Activations,
}

impl Run {
    /// The same candidates with other hidden states.
    fn with(self, batches: Vec<Tensor>) -> Self {
        let hidden = Activations {
            batches,
            ..self.hidden
        };
        Self { hidden, ..self }
    }
}

impl Fitness<'_> {
    /// Mean KL divergence in nats per position on the given windows, of each candidate. Each candidate in each block is
    /// `step` steps of `progress`; with 0 it can be cancelled there and counts nothing.
    ///
    /// # Errors
    /// [`causal_lm::Error::NonFinite`] for a candidate whose logits are not finite;
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn of(
        &self,
        candidates: &[Vec<usize>],
        windows: &[usize],
        progress: &dyn Progress,
        step: u64,
    ) -> Result<Vec<f64>> {
        let found = self.by_window(candidates, windows, progress, step)?;
        let mean = |kl: Vec<f64>| kl.iter().sum::<f64>() / windows.len() as f64;
        Ok(found.into_iter().map(mean).collect())
    }

    /// The same with the mean over the positions of each window.
    ///
    /// # Errors
    /// As [`Fitness::of`].
    pub fn by_window(
        &self,
        candidates: &[Vec<usize>],
        windows: &[usize],
        progress: &dyn Progress,
        step: u64,
    ) -> Result<Vec<Vec<f64>>> {
        let batch = self.windows.pick(windows);
        let window_bytes = self.windows.window_len()
            * self.decoder.config().hidden
            * self.decoder.dtype().size_in_bytes();
        // A block's input and output are held at once.
        let together = (self.memory / (2 * windows.len().max(1) * window_bytes)).max(1);
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        order.sort_by_key(|&i| &candidates[i]);
        let mut fitness = vec![Vec::new(); candidates.len()];
        for group in order.chunks(together) {
            let after_block = || Ok(progress.advance(step * group.len() as u64)?);
            for (i, kl) in self.of_group(candidates, group, (&batch, windows), &after_block)? {
                fitness[i] = kl;
            }
        }
        Ok(fitness)
    }

    /// The site at a place beside the blocks, if there is one.
    fn beside(&self, place: Place) -> Option<usize> {
        self.sites.places().iter().position(|&p| p == place)
    }

    /// Candidates of `run` by their choice of one site, the only key without such a site.
    fn split(candidates: &[Vec<usize>], run: &[usize], site: Option<usize>) -> Splits {
        let mut split = Splits::new();
        for &candidate in run {
            let choice = site.map(|site| candidates[candidate][site]);
            split.entry(choice).or_default().push(candidate);
        }
        split
    }

    /// The embedded windows of a group.
    fn start(
        &self,
        candidates: &[Vec<usize>],
        group: &[usize],
        batch: &Windows,
    ) -> Result<Vec<Run>> {
        let site = self.beside(Place::Embedding);
        let mut runs = Vec::new();
        for (choice, members) in Self::split(candidates, group, site) {
            let table = match (site, choice) {
                (Some(site), Some(choice)) => self.sites.matrix(site, choice)?,
                _ => None,
            };
            let hidden = Activations::embed_with(self.decoder, table, batch)?;
            match self.sharing {
                Sharing::Prefixes => runs.push(Run {
                    candidates: members,
                    hidden,
                }),
                Sharing::Nothing => runs.extend(members.into_iter().map(|candidate| Run {
                    candidates: vec![candidate],
                    hidden: hidden.clone(),
                })),
            }
        }
        Ok(runs)
    }

    fn of_group(
        &self,
        candidates: &[Vec<usize>],
        group: &[usize],
        (batch, windows): (&Windows, &[usize]),
        after_block: &dyn Fn() -> Result<()>,
    ) -> Result<Vec<(usize, Vec<f64>)>> {
        let mut runs = self.start(candidates, group, batch)?;
        for layer in 0..self.decoder.config().layers() {
            let block = self.decoder.frame(layer)?;
            let places = self.sites.places().iter().enumerate();
            let sites: Vec<usize> = places
                .filter(|&(_, &place)| place == Place::Block(layer))
                .map(|(site, _)| site)
                .collect();
            let mut next = Vec::new();
            for run in runs {
                let mut split: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
                for candidate in run.candidates {
                    let choices = sites.iter().map(|&s| candidates[candidate][s]);
                    split.entry(choices.collect()).or_default().push(candidate);
                }
                next.extend(split.into_iter().map(|(choices, candidates)| {
                    let hidden = run.hidden.clone();
                    (choices, Run { candidates, hidden })
                }));
            }
            let blocks = self.variants(&block, &sites, next.iter().map(|(choices, _)| choices))?;
            runs = match block.experts {
                None => next
                    .into_par_iter()
                    .map(|(choices, run)| {
                        let batches = run.hidden.through(&blocks[&choices])?;
                        Ok(run.with(batches))
                    })
                    .collect::<Result<_>>()?,
                Some(_) => self.through_experts((layer, &sites), next, &blocks)?,
            };
            self.decoder.release(layer);
            after_block()?;
        }
        self.finish(candidates, runs, windows)
    }

    /// Sends runs through a block with experts, of which one for each choice is in memory at a time.
    fn through_experts(
        &self,
        (layer, sites): (usize, &[usize]),
        runs: Vec<(Vec<usize>, Run)>,
        blocks: &BTreeMap<Vec<usize>, Block>,
    ) -> Result<Vec<Run>> {
        let site = sites
            .iter()
            .position(|&site| self.sites.holds_experts(site));
        let mut passes = runs
            .par_iter()
            .map(|(choices, run)| {
                let pass = run.hidden.routed(&blocks[choices])?;
                Ok((site.map(|site| choices[site]), pass))
            })
            .collect::<Result<Vec<_>>>()?;
        let experts = passes.first().and_then(|(_, pass)| pass.as_ref());
        for expert in 0..experts.map_or(0, MixturePass::experts) {
            // Those that no token of any run chose are not read.
            let mut loaded: BTreeMap<Option<usize>, Mlp> = BTreeMap::new();
            for (choice, pass) in &passes {
                let wanted = pass.as_ref().is_some_and(|pass| pass.wants(expert));
                if wanted && !loaded.contains_key(choice) {
                    let mlp = match (site, choice) {
                        (Some(site), &Some(choice)) => {
                            self.sites.expert(layer, sites[site], choice, expert)?
                        }
                        _ => self.decoder.expert(layer, expert)?,
                    };
                    loaded.insert(*choice, mlp);
                }
            }
            self.decoder.release_expert(layer, expert);
            passes.par_iter_mut().try_for_each(|(choice, pass)| {
                if let (Some(mlp), Some(pass)) = (loaded.get(choice), pass) {
                    pass.add(expert, mlp, &mut NoTap)?;
                }
                Ok::<_, Error>(())
            })?;
        }
        let done = passes.into_par_iter().map(|(_, pass)| match pass {
            Some(pass) => Ok(pass.finish(&mut NoTap)?),
            None => Ok(Vec::new()),
        });
        let batches: Vec<Vec<Tensor>> = done.collect::<Result<_>>()?;
        let runs = runs.into_iter().zip(batches);
        Ok(runs.map(|((_, run), batches)| run.with(batches)).collect())
    }

    /// The block at every combination of choices; halves that occur in several are made once.
    fn variants<'s>(
        &self,
        block: &Block,
        sites: &[usize],
        wanted: impl Iterator<Item = &'s Vec<usize>>,
    ) -> Result<BTreeMap<Vec<usize>, Block>> {
        let mut halves: BTreeMap<(usize, usize), Half> = BTreeMap::new();
        let mut blocks = BTreeMap::new();
        for choices in wanted {
            if blocks.contains_key(choices) {
                continue;
            }
            let mut variant = block.clone();
            for (&site, &choice) in sites.iter().zip(choices) {
                if self.sites.holds_experts(site) {
                    continue;
                }
                let half = match halves.entry((site, choice)) {
                    Entry::Occupied(made) => made.into_mut(),
                    Entry::Vacant(place) => place.insert(self.sites.half(block, site, choice)?),
                };
                half.place(&mut variant);
            }
            blocks.insert(choices.clone(), variant);
        }
        Ok(blocks)
    }

    /// Divergences of candidates whose hidden states have left the last block.
    fn finish(
        &self,
        candidates: &[Vec<usize>],
        runs: Vec<Run>,
        windows: &[usize],
    ) -> Result<Vec<(usize, Vec<f64>)>> {
        let dense = self.decoder.head()?;
        // A tied head is the embedding.
        let site = match self.decoder.config().tied {
            true => self.beside(Place::Embedding),
            false => self.beside(Place::Head),
        };
        let mut by_head: BTreeMap<Option<usize>, Vec<Run>> = BTreeMap::new();
        for run in runs {
            for (choice, candidates) in Self::split(candidates, &run.candidates, site) {
                let hidden = run.hidden.clone();
                let runs = by_head.entry(choice).or_default();
                runs.push(Run { candidates, hidden });
            }
        }
        let mut all = Vec::new();
        for (choice, runs) in by_head {
            let matrix = match (site, choice) {
                (Some(site), Some(choice)) => self.sites.matrix(site, choice)?,
                _ => None,
            };
            let head = match matrix {
                Some(matrix) => dense.clone().with_vocab(matrix)?,
                None => dense.clone(),
            };
            let found = self.divergences(&head, &runs, windows)?;
            for (run, kl) in runs.into_iter().zip(found) {
                all.extend(run.candidates.into_iter().map(|c| (c, kl.clone())));
            }
        }
        Ok(all)
    }

    /// Means over the positions of each window.
    fn divergences(&self, head: &Head, runs: &[Run], windows: &[usize]) -> Result<Vec<Vec<f64>>> {
        let mut found = vec![Vec::with_capacity(windows.len()); runs.len()];
        let mut first = 0;
        for batch in 0..runs.first().map_or(0, |run| run.hidden.batches.len()) {
            let count = runs[0].hidden.batches[batch].dim(0)?;
            let windows = &windows[first..first + count];
            first += count;
            let predictions = self.teacher.predictions(windows)?;
            let of_run = |run: &Run| -> Result<Vec<f64>> {
                predictions.by_window(head, &run.hidden.batches[batch], windows)
            };
            let of_batch: Vec<Vec<f64>> = runs.par_iter().map(of_run).collect::<Result<_>>()?;
            for (all, batch) in found.iter_mut().zip(of_batch) {
                all.extend(batch);
            }
        }
        Ok(found)
    }
}

/// Candidates by what they choose.
type Splits = BTreeMap<Option<usize>, Vec<usize>>;
