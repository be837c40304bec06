//! One trained network: pruned by every method at every sparsity, repaired, fine-tuned, measured.

use super::{
    Connectivity, ExactRemoval, ExperimentConfig, OrderSummary, Ramp, Repair, Row, Stage,
    judge::{Judge, Judged},
    run::{Inner, sparsities, steps},
};
use crate::{
    calibration::{Calibration, Moments, RecordConfig, record},
    connectivity::{SameNeurons, functional_similarity, reach_kept},
    data::{Dataset, Examples},
    error::{Error, Result},
    exact::{Counts, ExactConfig, equal_neurons, find, kept, remove},
    influence::Influence,
    mask::{MaskSet, restrict_masks},
    order::CutReport,
    prune::{
        Method, PruneConfig, PruneContext, PruneReport, influence_of, layers_of, prune_in,
        rank_neurons_in, recurrence_of, scores_in, sparsity_between,
    },
    repair::{merge_passes, refit},
    rnn::{BlockMatrix, BlockRnn, Evaluation, Rnn, TrainConfig, train},
};
use rayon::prelude::*;
use std::time::Instant;
use tensor_io::Progress;

/// What all pruned networks of a run share.
pub(super) struct Session<'a> {
    pub(super) config: &'a ExperimentConfig,
    pub(super) training: &'a TrainConfig,
    pub(super) visit: &'a Visit<'a>,
    pub(super) progress: &'a dyn Progress,
}

impl Session<'_> {
    fn inner(&self, name: impl Into<String>) -> Inner<'_> {
        Inner::new(self.progress, name)
    }

    /// As [`inner`](Self::inner), for training.
    fn training(&self, name: impl Into<String>, config: &TrainConfig) -> Inner<'_> {
        Inner::of_training(self.progress, name, config.epochs)
    }
}

/// A network that was pruned, with the row that says how good it is.
#[non_exhaustive]
pub struct PrunedNetwork<'a> {
    /// What was measured.
    pub row: &'a Row,
    /// The network; smaller than the one before pruning where neurons were merged.
    pub rnn: &'a Rnn,
    /// The masks that it is under.
    pub masks: &'a MaskSet,
    /// The neurons that the method keeps, where it ranks them.
    pub keep: Option<&'a [Vec<bool>]>,
    /// What the states of the network before pruning do.
    pub calibration: &'a Calibration,
}

/// What is done with every pruned network, from several threads at once.
pub type Visit<'a> = dyn Fn(&PrunedNetwork<'_>) -> Result<()> + Sync + 'a;

/// A network before pruning.
pub(super) struct Source<'a> {
    pub(super) name: &'a str,
    pub(super) rnn: &'a Rnn,
    pub(super) data: &'a Dataset,
    pub(super) judge: &'a dyn Judge,
    /// Weights of readers outside the network, by layer ([`PruneContext::readers`]).
    pub(super) readers: &'a [Vec<f32>],
    /// The entries that exist.
    pub(super) wired: &'a MaskSet,
    /// The seed that it was trained with.
    pub(super) seed: Option<u64>,
}

/// The network, and what is known of it before anything is pruned.
pub(super) struct Dense<'a> {
    source: Source<'a>,
    test: Evaluation,
    calibration: Calibration,
    /// States on test examples, for comparisons of connectivity.
    states: Vec<Moments>,
    influence: Influence,
    /// Range of the components of its input vectors.
    input_range: Option<(f32, f32)>,
}

/// Weights that differ by less than this share of the largest one count as equal.
const EQUAL: f64 = 1e-6;

/// Examples on which connectivity is compared and states are looked at.
fn connectivity_recording() -> RecordConfig {
    RecordConfig::default().with(|c| {
        c.sequences = Some(200);
        c.symbols = Some(2_000);
    })
}

/// Moments of the states of all layers on test examples.
fn states_of(rnn: &Rnn, data: &Dataset, progress: &dyn Progress) -> Result<Vec<Moments>> {
    let recorded = record(rnn, &data.test, &connectivity_recording(), progress)?;
    Ok(recorded.layers.into_iter().map(|l| l.after).collect())
}

fn influence(rnn: &Rnn, config: &PruneConfig) -> Result<Influence> {
    influence_of(&layers_of(rnn), rnn.config().cell, &config.lattice)
}

/// What a method chose at one sparsity.
struct Chosen {
    config: PruneConfig,
    masks: MaskSet,
    report: PruneReport,
    /// The neurons that stay, for methods that rank them.
    keep: Option<Vec<Vec<bool>>>,
    /// Time of scoring and choosing.
    seconds: f64,
}

/// A network that was pruned, and perhaps repaired or trained, with the masks that it is under.
struct Pruned<'a> {
    rnn: Rnn,
    masks: &'a MaskSet,
    repair: Repair,
}

/// When and how it was measured.
struct Done {
    stage: Stage,
    epochs: usize,
    /// Time before the evaluation.
    seconds: f64,
}

impl<'a> Dense<'a> {
    pub(super) fn new(source: Source<'a>, progress: &dyn Progress) -> Result<Self> {
        let inner = Inner::new(progress, source.name);
        let Source { rnn, data, .. } = source;
        let dense = Judged { rnn, merged: None };
        Ok(Self {
            test: source.judge.test(&dense)?,
            calibration: record(rnn, &data.train, &RecordConfig::default(), &inner)?,
            states: states_of(rnn, data, &inner)?,
            influence: influence(rnn, &PruneConfig::new(Method::Dense, 0.0))?,
            input_range: data.input_range(),
            source,
        })
    }

    fn context(&self) -> PruneContext<'_> {
        let context = PruneContext::default()
            .calibrated(&self.calibration)
            .read_by(self.source.readers);
        match self.within() {
            None => context,
            Some(wired) => context.within(wired),
        }
    }

    /// The entries that exist, where they are not all.
    fn within(&self) -> Option<&MaskSet> {
        (!self.source.wired.is_empty()).then_some(self.source.wired)
    }

    /// What a pruned network keeps; `keep` are the neurons that the method keeps, `removed` whether the others are gone.
    fn connectivity(
        &self,
        rnn: &Rnn,
        keep: Option<&[Vec<bool>]>,
        removed: bool,
        progress: &dyn Progress,
    ) -> Result<Connectivity> {
        let after = states_of(rnn, self.source.data, progress)?;
        let similarity = |of: &dyn Fn(usize) -> Vec<(usize, usize)>| {
            let layers = self.states.iter().zip(&after).enumerate();
            let layers: Vec<SameNeurons<'_>> = layers
                .map(|(l, (before, after))| SameNeurons {
                    before,
                    after,
                    neurons: of(l),
                })
                .collect();
            functional_similarity(&layers)
        };
        let kept = |keep: &[Vec<bool>], l: usize| -> Vec<(usize, usize)> {
            let numbers = (0..keep[l].len()).filter(|&x| keep[l][x]);
            match removed {
                true => numbers.enumerate().map(|(k, x)| (x, k)).collect(),
                false => numbers.map(|x| (x, x)).collect(),
            }
        };
        let functional_kept = keep.and_then(|keep| similarity(&|l| kept(keep, l)));
        if removed {
            return Ok(Connectivity {
                functional: functional_kept,
                functional_kept,
                ..Connectivity::default()
            });
        }
        let pruned = influence(rnn, &PruneConfig::new(Method::Dense, 0.0))?;
        Ok(Connectivity {
            functional: similarity(&|l| (0..self.states[l].dim()).map(|x| (x, x)).collect()),
            functional_kept,
            reach: Some(reach_kept(&self.influence, &pruned, 1.0)?),
            reach_2: Some(reach_kept(&self.influence, &pruned, 2.0)?),
        })
    }

    /// Quality with weights and states of 8 bits.
    fn integers(&self, method: Method, pruned: &Pruned<'_>) -> Result<Option<Evaluation>> {
        let block = method.block().filter(|b| BlockMatrix::supports(*b));
        let Some(block) = block else { return Ok(None) };
        let network = BlockRnn::new(&pruned.rnn, pruned.masks, block)?.quantised();
        self.source.judge.test_blocks(&network)
    }

    /// What can be removed from a masked network without changing it, for inputs within the range of the data; and which of its
    /// states were constant on some of the training examples.
    fn exact(&self, pruned: &Pruned<'_>, progress: &dyn Progress) -> Result<Option<ExactRemoval>> {
        if pruned.repair == Repair::Merge || !self.source.readers.is_empty() {
            return Ok(None);
        }
        let train = &self.source.data.train;
        let states = record(&pruned.rnn, train, &connectivity_recording(), progress)?;
        let config = ExactConfig::default().calibrated(&states);
        let config = match self.input_range {
            Some((low, high)) => config.input_range(low, high),
            None => config,
        };
        let findings = find(&pruned.rnn, &config)?;
        let keep = kept(&findings);
        let masks = restrict_masks(&pruned.rnn, pruned.masks, &keep)?;
        let small = remove(&pruned.rnn, &findings)?;
        Ok(Some(ExactRemoval {
            neurons: Counts::of(&findings),
            params: small.params().count() - masks.pruned(),
            equal: equal_neurons(&pruned.rnn, EQUAL)?,
        }))
    }

    /// The rows of all `methods`, each at all sparsities.
    pub(super) fn prune_all(
        &self,
        session: &Session<'_>,
        methods: &[Method],
        seed: u64,
    ) -> Result<Vec<Row>> {
        let rows: Vec<Vec<Row>> = methods
            .par_iter()
            .map(|&method| self.prune_by(method, session, seed))
            .collect::<Result<_>>()?;
        Ok(rows.into_iter().flatten().collect())
    }

    /// Neurons are scored once for all sparsities.
    fn prune_by(&self, method: Method, session: &Session<'_>, seed: u64) -> Result<Vec<Row>> {
        let start = Instant::now();
        let sparsities = sparsities(session.config, method);
        let context = self.context();
        let base = session.config.prune_config(method, 0.0, seed);
        let scores = match method.ranks_neurons() {
            false => None,
            true => match scores_in(self.source.rnn, &context, &base) {
                Ok(scores) => Some(scores),
                Err(e @ Error::DegenerateOrder { .. }) => {
                    session.progress.advance(steps(session.config, &[method]))?;
                    let refused = |s: &f64| self.refused(method, *s, seed, &e);
                    return Ok(sparsities.iter().map(refused).collect());
                }
                Err(e) => return Err(e),
            },
        };
        let scoring = start.elapsed().as_secs_f64();
        let context = match &scores {
            Some(scores) => context.scored(scores),
            None => context,
        };
        let rows: Vec<Vec<Row>> = sparsities
            .into_par_iter()
            .map(|sparsity| {
                let start = Instant::now();
                let config = session.config.prune_config(method, sparsity, seed);
                let (masks, report) = prune_in(self.source.rnn, &context, &config)?;
                let keep = method
                    .ranks_neurons()
                    .then(|| rank_neurons_in(self.source.rnn, &context, &config))
                    .transpose()?;
                let chosen = Chosen {
                    config,
                    masks,
                    report,
                    keep,
                    seconds: scoring + start.elapsed().as_secs_f64(),
                };
                let rows = self.repair_all(&chosen, session)?;
                session.progress.advance(1)?;
                Ok(rows)
            })
            .collect::<Result<_>>()?;
        Ok(rows.into_iter().flatten().collect())
    }

    /// The rows of one choice, with every repair that applies to it.
    fn repair_all(&self, chosen: &Chosen, session: &Session<'_>) -> Result<Vec<Row>> {
        let (rnn, method) = (self.source.rnn, chosen.config.method);
        let inner = session.inner(format!("{method} on {}", self.source.name));
        let mut rows = Vec::new();
        for &repair in &session.config.repairs {
            let start = Instant::now();
            let small;
            let mut pruned = match (repair, &chosen.keep) {
                (Repair::Refit, _) if chosen.masks.is_empty() => continue,
                (Repair::Merge, None) => continue,
                (Repair::None, _) => {
                    let mut rnn = rnn.clone();
                    chosen.masks.apply(rnn.params_mut())?;
                    Pruned {
                        rnn,
                        masks: &chosen.masks,
                        repair,
                    }
                }
                (Repair::Refit, _) => {
                    let mut rnn = rnn.clone();
                    let config = &session.config.refit;
                    refit(&mut rnn, &chosen.masks, &self.calibration, config)?;
                    Pruned {
                        rnn,
                        masks: &chosen.masks,
                        repair,
                    }
                }
                (Repair::Merge, Some(keep)) => {
                    small = restrict_masks(rnn, self.source.wired, keep)?;
                    let (config, data) = (&session.config.merge, self.source.data);
                    let context = self.context();
                    let (merged, _) = merge_passes(rnn, keep, &context, config, data, &inner)?;
                    Pruned {
                        rnn: merged,
                        masks: &small,
                        repair,
                    }
                }
            };
            let seconds = chosen.seconds + start.elapsed().as_secs_f64();
            let removed = repair == Repair::Merge;
            let keep = chosen.keep.as_deref();
            rows.push(Row {
                connectivity: Some(self.connectivity(&pruned.rnn, keep, removed, &inner)?),
                int8: self.integers(method, &pruned)?,
                exact: self.exact(&pruned, &inner)?,
                ..self.row(
                    chosen,
                    &pruned,
                    session,
                    Done {
                        stage: Stage::OneShot,
                        epochs: 0,
                        seconds,
                    },
                )?
            });
            let epochs = session.config.finetune_epochs;
            if epochs > 0 {
                let start = Instant::now();
                self.tune(&mut pruned, chosen, session)?;
                let done = Done {
                    stage: Stage::FineTuned,
                    epochs,
                    seconds: start.elapsed().as_secs_f64(),
                };
                rows.push(self.row(chosen, &pruned, session, done)?);
            }
        }
        let trains = method.is_gradual() && session.config.finetune_epochs > 0;
        if let (Some(ramp), true) = (session.config.gradual, trains) {
            rows.push(self.gradually(ramp, chosen, session)?);
        }
        Ok(rows)
    }

    /// How networks are trained after pruning.
    fn tuning(&self, chosen: &Chosen, session: &Session<'_>) -> TrainConfig {
        let (config, training) = (session.config, session.training);
        let tuning = training.over(config.finetune_epochs, &self.source.data.train);
        tuning.with(|c| {
            c.learning_rate = training.learning_rate * config.finetune_rate;
            c.patience = None;
            c.target_loss = None;
            c.seed = chosen.config.seed.wrapping_add(1);
        })
    }

    /// The dense network, trained as long as the others while its sparsity rises.
    fn gradually(&self, ramp: Ramp, chosen: &Chosen, session: &Session<'_>) -> Result<Row> {
        let start = Instant::now();
        let Source {
            name, data, wired, ..
        } = self.source;
        let mut tuning = self.tuning(chosen, session);
        let updates = tuning.updates(&data.train);
        // Inputs are weighed by a calibration, which training changes.
        let prune = chosen.config.clone().with(|c| c.weigh_inputs = false);
        tuning.gradual = Some(ramp.schedule(updates, prune)?);
        let name = format!("pruning {name} by {}", chosen.config.method);
        let inner = session.training(name, &tuning);
        let mut rnn = self.source.rnn.clone();
        let masks = train(&mut rnn, data, &tuning, wired, &inner)?.masks;
        inner.finish()?;
        let pruned = Pruned {
            rnn,
            masks: &masks,
            repair: Repair::None,
        };
        let done = Done {
            stage: Stage::Gradual,
            epochs: tuning.epochs,
            seconds: start.elapsed().as_secs_f64(),
        };
        self.row(chosen, &pruned, session, done)
    }

    /// Fine-tuning under the masks.
    fn tune(&self, pruned: &mut Pruned<'_>, chosen: &Chosen, session: &Session<'_>) -> Result<()> {
        let tuning = self.tuning(chosen, session);
        let Source { name, data, .. } = self.source;
        let name = format!("fine-tuning {name} after {}", chosen.config.method);
        let inner = session.training(name, &tuning);
        train(&mut pruned.rnn, data, &tuning, pruned.masks, &inner)?;
        Ok(inner.finish()?)
    }

    /// A fresh network trained without any recurrent weight.
    pub(super) fn without_recurrence(&self, session: &Session<'_>, seed: u64) -> Result<Row> {
        let start = Instant::now();
        let Source { name, data, .. } = self.source;
        let mut rnn = Rnn::new(self.source.rnn.config().clone(), seed)?;
        let config = session.config.prune_config(Method::ZeroWhh, 0.0, seed);
        let (masks, report) = prune_in(&rnn, &self.context(), &config)?;
        let inner = session.training(format!("training {name} without W_hh"), session.training);
        train(&mut rnn, data, session.training, &masks, &inner)?;
        inner.finish()?;
        let chosen = Chosen {
            config,
            masks: masks.clone(),
            report,
            keep: None,
            seconds: 0.0,
        };
        let pruned = Pruned {
            rnn,
            masks: &masks,
            repair: Repair::None,
        };
        let done = Done {
            stage: Stage::FromScratch,
            epochs: 0,
            seconds: start.elapsed().as_secs_f64(),
        };
        self.row(&chosen, &pruned, session, done)
    }

    fn bits(&self, evaluation: &Evaluation) -> Option<f64> {
        matches!(self.source.data.test, Examples::Text(_)).then(|| evaluation.bits())
    }

    /// Neurons that stay, by layers of the network or of its wiring.
    fn neurons(&self, chosen: &Chosen, session: &Session<'_>) -> Option<Vec<usize>> {
        let flags: Vec<bool> = chosen.keep.as_ref()?.concat();
        let hidden = &self.source.rnn.config().hidden;
        let layers = session.config.wiring.layers().unwrap_or(hidden);
        let mut start = 0;
        let kept = layers.iter().map(|&n| {
            let layer = flags.iter().skip(start).take(n);
            start += n;
            layer.filter(|&&k| k).count()
        });
        Some(kept.collect())
    }

    /// Measures a network.
    fn row(
        &self,
        chosen: &Chosen,
        pruned: &Pruned<'_>,
        session: &Session<'_>,
        done: Done,
    ) -> Result<Row> {
        let start = Instant::now();
        let Pruned { rnn, masks, repair } = pruned;
        let config = &chosen.config;
        let merged = *repair == Repair::Merge;
        let judged = Judged {
            rnn,
            merged: chosen.keep.as_deref().filter(|_| merged),
        };
        let test = self.source.judge.test(&judged)?;
        let seconds = done.seconds + start.elapsed().as_secs_f64();
        let valid = self.source.judge.valid(&judged)?;
        let recurrence = recurrence_of(rnn, config.lattice.aggregate)?;
        let reached = sparsity_between(self.source.rnn, rnn, masks, self.within());
        let row = Row {
            reached: Some(reached),
            neurons: if merged {
                self.neurons(chosen, session)
            } else {
                None
            },
            repair: *repair,
            finetune_epochs: done.epochs,
            loss: Some(test.loss),
            validation: Some(valid.loss),
            bits: self.bits(&test),
            accuracy: test.accuracy,
            auc: test.auc,
            params: Some(rnn.params().count() - masks.pruned()),
            dead: Some(recurrence.iter().map(|l| l.dead).sum()),
            spectral_radius: recurrence.iter().map(|l| l.spectral_radius).collect(),
            order: summary(&chosen.report.cuts),
            seconds,
            ..self.empty(config.method, config.sparsity, config.seed, done.stage)
        };
        (session.visit)(&PrunedNetwork {
            row: &row,
            rnn,
            masks,
            keep: chosen.keep.as_deref(),
            calibration: &self.calibration,
        })?;
        Ok(row)
    }

    /// A row without results.
    fn empty(&self, method: Method, sparsity: f64, seed: u64, stage: Stage) -> Row {
        let shape = self.source.rnn.config();
        Row {
            suite: "lattice".into(),
            task: self.source.name.into(),
            cell: shape.cell,
            hidden: shape.hidden.clone(),
            method,
            sparsity,
            reached: None,
            neurons: None,
            seed,
            network: self.source.seed,
            stage,
            finetune_epochs: 0,
            loss: None,
            loss_dense: self.test.loss,
            validation: None,
            bits: None,
            bits_dense: self.bits(&self.test),
            accuracy: None,
            accuracy_dense: self.test.accuracy,
            auc: None,
            auc_dense: self.test.auc,
            repair: Repair::None,
            params: None,
            params_dense: self.source.rnn.params().count() - self.source.wired.pruned(),
            dead: None,
            spectral_radius: Vec::new(),
            connectivity: None,
            int8: None,
            exact: None,
            order: None,
            seconds: 0.0,
            error: None,
        }
    }

    fn refused(&self, method: Method, sparsity: f64, seed: u64, error: &Error) -> Row {
        Row {
            error: Some(error.to_string()),
            ..self.empty(method, sparsity, seed, Stage::OneShot)
        }
    }
}

fn summary(cuts: &[CutReport]) -> Option<OrderSummary> {
    let range = |of: fn(&CutReport) -> usize| {
        Some((cuts.iter().map(of).min()?, cuts.iter().map(of).max()?))
    };
    Some(OrderSummary {
        cuts: cuts.len(),
        degenerate_cuts: cuts.iter().filter(|c| c.order.degenerate).count(),
        classes: range(|c| c.order.classes)?,
        largest_class: range(|c| c.order.largest_class)?,
        irreducible: range(|c| c.order.irreducible_neurons)?,
    })
}
