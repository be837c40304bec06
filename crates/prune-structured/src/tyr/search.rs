//! The whole search: iterations of a supernet and generations in it.

use super::data::Data;
use super::evolve::{Levels, offspring};
use super::options::{Accumulation, Options};
use super::space::{Sublayer, spacing, uniform};
use super::state::{Folder, Identity, State};
use super::supernet;
use crate::compensation::LeastSquares;
use crate::divergence::{Fitness, Kept, LevelStore, Sublayers, Teacher, TopK};
use crate::evolution::select;
use crate::plan::{LayerPlan, Plan};
use crate::ranking::Ranking;
use crate::recipe::Recipe;
use crate::stats::Part;
use crate::{Calibration, Error, Result};
use causal_lm::{Decoder, Progress};
use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use std::path::Path;
use std::time::Instant;

/// Widths that a search starts from.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// The same share of every sublayer, at a ratio of all prunable parameters; the paper's.
    Uniform(f64),
    /// Those of a plan, whose split between attention and MLPs is kept.
    Plan(&'a Plan),
}

/// How a search runs.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// Its sizes and seed.
    pub options: &'a Options,
    /// Its folder, made where it does not exist.
    pub dir: &'a Path,
}

/// What a search has found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The widths, to be refitted by least squares on `calibration`.
    pub plan: Plan,
    /// Statistics of the last supernet, with Gram matrices in the folder of the search.
    pub calibration: Calibration,
    /// KL divergence from the dense model, in nats per position, on the tokens of the last stage
    /// of the last generation, before settling; `None` without generations.
    pub kl: Option<f64>,
    /// Tokens of all candidates that were compared in this run.
    pub candidate_tokens: u64,
    /// Time that comparing them took in this run.
    pub seconds: f64,
}

/// Searches for the widths of each sublayer, keeping everything in `dir`, which may hold the same search, interrupted:
/// it continues where it stopped and finds what it would have found.
///
/// The recipe gives the shapes that may result and the damping of least squares. `progress` has a stage for the dense
/// model's predictions, one for each supernet (steps are blocks) and one for the generations in it; a step counts when
/// its result is on disk.
///
/// # Errors
/// Those of [`Options::check`], [`Error::StateFile`] for a folder of another search or a damaged file,
/// [`Error::Cancelled`], [`Error::Ratio`], [`Error::Unreachable`] and [`Error::Width`] for widths that cannot be asked of
/// this model, and what reading and running it report.
pub fn search(
    decoder: &Decoder<'_>,
    data: &Data<'_>,
    recipe: &Recipe,
    start: Start<'_>,
    Run { options, dir }: Run<'_>,
    progress: &dyn Progress,
) -> Result<Found> {
    options.check(decoder, recipe)?;
    let ridge = Options::ridge(decoder, recipe)?;
    let rankings = Ranking::unscored(decoder, &recipe.shape)?;
    let (ratio, centres) = match start {
        Start::Uniform(ratio) => (ratio, uniform(&rankings, ratio)?),
        Start::Plan(plan) => (plan.ratio, steps_of(decoder, plan, &rankings)?),
    };
    let weights = decoder.checkpoint().content_hash()?;
    let identity = Identity::of(weights, data, options, &recipe.shape, ridge, &centres);
    let (folder, state) = Folder::open(dir, &identity)?;
    let mut state = state.unwrap_or_else(|| State {
        iteration: 0,
        generation: 0,
        parent: vec![0; centres.len()],
        centres,
        kl: None,
    });
    let place = (dir, weights);
    let top_k = TopK::renormalised(options.top_k);
    let teacher = Teacher::new(decoder, data.search, top_k, place, progress)?;
    let layers = decoder.config().layers();
    let last = options.iterations - usize::from(!options.settle);
    let (mut candidate_tokens, mut seconds) = (0, 0.0);
    loop {
        // After the last iteration, one width of each sublayer and no search.
        let settling = state.iteration == options.iterations;
        let generations = if settling { 0 } else { options.generations };
        let space: Vec<Sublayer> = rankings
            .iter()
            .zip(&state.centres)
            .map(|(ranking, &centre)| Sublayer {
                ranking: ranking.clone(),
                centre,
                spacing: spacing(ranking, options, state.iteration),
                reach: if settling { 0 } else { options.reach as i8 },
            })
            .collect();
        folder.remove_before(state.iteration)?;
        let store = LevelStore::create(folder.iteration(state.iteration))?;
        let accumulation = match settling {
            true => Accumulation::Centre,
            false => options.accumulation,
        };
        let sizes = Options {
            accumulation,
            ..options.clone()
        };
        let stage = |what: &str| format!("{what} {} of {}", state.iteration + 1, last + 1);
        progress.begin(&stage("supernet"), layers as u64);
        let supernet = supernet::Supernet {
            decoder,
            windows: data.calibration,
            space: &space,
            options: &sizes,
            ridge,
            store: &store,
        };
        supernet.build(progress)?;
        let rankings: Vec<&Ranking> = space.iter().map(|s| &s.ranking).collect();
        let sites = Sublayers::new(rankings, &store, &decoder.config().widths);
        let fitness = Fitness {
            decoder,
            windows: data.search,
            teacher: &teacher,
            sites: &sites,
            memory: options.memory,
            sharing: options.sharing,
        };
        if generations > 0 {
            progress.begin(&stage("generations of supernet"), generations as u64);
            progress.advance(state.generation as u64)?;
        }
        while state.generation < generations {
            let rng = |purpose| rng(options.seed, state.iteration, state.generation, purpose);
            let mutants = offspring(&space, &state.parent, options.offspring, &mut rng(0));
            let mut evaluate = |stage: usize, candidates: &[Levels]| {
                let started = Instant::now();
                let len = data.search.window_len();
                let count = data.search.count();
                let wanted = options.stages[stage].tokens.div_ceil(len).clamp(1, count);
                let mut windows =
                    index::sample(&mut rng(1 + stage as u64), count, wanted).into_vec();
                windows.sort_unstable();
                let candidates: Vec<Vec<usize>> = candidates
                    .iter()
                    .map(|levels| steps(&space, levels))
                    .collect();
                // Candidates are cancelled between two blocks; only whole generations count.
                let found = fitness.of(&candidates, &windows, progress, 0);
                candidate_tokens += (candidates.len() * wanted * len) as u64;
                seconds += started.elapsed().as_secs_f64();
                found
            };
            let best = select(&options.stages, &state.parent, mutants, &mut evaluate)?;
            folder.record(&state, &best)?;
            state.generation += 1;
            (state.parent, state.kl) = (best.candidate, Some(best.fitness));
            folder.save(&state)?;
            progress.advance(1)?;
        }
        let found = steps(&space, &state.parent);
        if state.iteration == last {
            let plan = Plan {
                recipe: recipe.clone(),
                ratio,
                compensation: LeastSquares { ridge }.into(),
                layers: plan_layers(decoder, &space, &found, &store)?,
            };
            return Ok(Found {
                plan,
                calibration: calibration(layers, &store)?,
                kl: state.kl,
                candidate_tokens,
                seconds,
            });
        }
        state = State {
            iteration: state.iteration + 1,
            generation: 0,
            parent: vec![0; found.len()],
            centres: found,
            kl: state.kl,
        };
        folder.save(&state)?;
    }
}

/// A generator of its own for each purpose in each generation, so that an interrupted search continues as if it had
/// not been.
fn rng(seed: u64, iteration: usize, generation: usize, purpose: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(((iteration as u64) << 48) | ((generation as u64) << 16) | purpose);
    rng
}

fn steps(space: &[Sublayer], levels: &[i8]) -> Vec<usize> {
    let of = |(sublayer, &level): (&Sublayer, &i8)| sublayer.nearest(level);
    space.iter().zip(levels).map(of).collect()
}

/// Steps that a plan keeps of each ranking.
fn steps_of(decoder: &Decoder<'_>, plan: &Plan, rankings: &[Ranking]) -> Result<Vec<usize>> {
    plan.check(decoder)?;
    let of = |ranking: &Ranking| {
        let layer = &plan.layers[ranking.layer];
        let dense = decoder.config().widths[ranking.layer];
        let units = match ranking.part {
            Part::Mlp => layer.neurons.len(),
            Part::Attention if ranking.order().len() == dense.kv_heads => layer.kv_heads.len(),
            Part::Attention => layer.heads.len(),
        };
        ranking
            .steps_of(units)
            .filter(|&steps| steps >= ranking.protected)
            .ok_or_else(|| {
                Error::PlanMismatch(format!(
                    "layer {}: the shapes that a search may choose from have none with {units} units",
                    ranking.layer
                ))
            })
    };
    rankings.iter().map(of).collect()
}

fn plan_layers(
    decoder: &Decoder<'_>,
    space: &[Sublayer],
    steps: &[usize],
    store: &LevelStore,
) -> Result<Vec<LayerPlan>> {
    let dense = &decoder.config().widths;
    let mut layers: Vec<LayerPlan> = dense.iter().map(|&w| LayerPlan::whole(w)).collect();
    for (sublayer, &steps) in space.iter().zip(steps) {
        let ranking = &sublayer.ranking;
        let units = match store.load(ranking, steps)? {
            Kept::Dense => (0..ranking.order().len()).collect(),
            Kept::Some { units, .. } => units,
            Kept::Gone => vec![],
        };
        layers[ranking.layer].keep(dense[ranking.layer], ranking, units);
    }
    Ok(layers)
}

fn calibration(layers: usize, store: &LevelStore) -> Result<Calibration> {
    let of = |layer| {
        store.stats(layer)?.ok_or(Error::Missing {
            layer,
            what: "the supernet",
            need: "its files were removed while the search ran",
        })
    };
    Ok(Calibration {
        layers: (0..layers).map(of).collect::<Result<_>>()?,
        gram: Some(store.gram()),
    })
}
