//! Rate-distortion allocation (arXiv 2308.10438), and curves measured on the whole model.
//!
//! Every sublayer has a curve: its distortion at every number of parameters it may keep. Errors of different sublayers
//! are taken to add up, so the best allocation is a multiple-choice knapsack: [`RdDp`] takes one point from each curve.
//! [`measure`] replaces the curves by what pruning one sublayer does to the whole model's output.

use crate::compensation::{complement, refit};
use crate::divergence::{Fitness, LevelStore, Sharing, Sublayers, Teacher, TopK};
use crate::obs::{Level, Units};
use crate::ranking::Ranking;
use crate::stats::output_weight;
use crate::{Calibration, Compensation, Error, Recipe, Result};
use candle_core::{Device, Tensor};
use causal_lm::{Decoder, Progress, Windows};
use std::path::Path;

pub use crate::allocation::{Distortion, Knapsack, Point, RdDp, convexify, knapsack};

/// How curves are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Measure {
    /// Widths of each sublayer that are measured beside the dense one; errors between them are
    /// interpolated.
    pub points: usize,
    /// Logits of the dense model that are compared.
    pub top_k: usize,
    /// Bytes of hidden states held at once.
    pub memory: usize,
}

impl Default for Measure {
    fn default() -> Self {
        Self {
            points: 8,
            top_k: 512,
            memory: 1 << 30,
        }
    }
}

impl Measure {
    /// Refuses sizes that measure nothing.
    ///
    /// # Errors
    /// [`Error::Search`] without points or logits.
    pub fn check(&self) -> Result<()> {
        let sizes = [("points", self.points), ("top_k", self.top_k)];
        match sizes.into_iter().find(|(_, size)| *size == 0) {
            None => Ok(()),
            Some((option, _)) => Err(Error::Search {
                option,
                value: "0".into(),
                expected: "at least 1",
            }),
        }
    }
}

/// What curves are measured on, and where.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// Windows whose predictions are compared: others than those of the calibration, on which a refit looks better than it is.
    pub windows: &'a Windows,
    /// Folder for pruned sublayers and the dense model's predictions.
    pub dir: &'a Path,
    /// How many points and logits.
    pub options: Measure,
}

/// Refuses recipes whose curves cannot be measured, before anything is spent on it.
///
/// # Errors
/// [`Error::Search`] for a compensation by bias, which a curve leaves out.
pub fn check(decoder: &Decoder<'_>, recipe: &Recipe) -> Result<()> {
    let compensation = recipe.compensation(decoder);
    match compensation.adds_bias() {
        false => Ok(()),
        true => Err(Error::Search {
            option: "compensation",
            value: compensation.name().into(),
            expected: "least squares or none where curves are measured",
        }),
    }
}

/// Gives every ranking the curve of the model's KL divergence from the dense one, in nats per
/// position, when this sublayer alone is pruned and compensated.
///
/// Models that differ from the dense one in a single sublayer share all blocks before it. `progress` has a stage for the
/// dense model's predictions, one for pruning every sublayer at every width, and one for comparing. Predictions in the
/// folder are used when they are of the same weights, windows and k.
///
/// # Errors
/// [`Error::Missing`] without Gram matrices where the recipe refits, [`Error::Search`] for a compensation by bias, which
/// a curve leaves out, those of [`Measure::check`], [`Error::Cancelled`], and what running the model reports.
pub fn measure(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    recipe: &Recipe,
    rankings: &mut [Ranking],
    Data {
        windows,
        dir,
        options,
    }: Data<'_>,
    progress: &dyn Progress,
) -> Result<()> {
    check(decoder, recipe)?;
    options.check()?;
    let compensation = recipe.compensation(decoder);
    let store = LevelStore::create(dir)?;
    let place = (dir, decoder.checkpoint().content_hash()?);
    let teacher = Teacher::new(
        decoder,
        windows,
        TopK::renormalised(options.top_k),
        place,
        progress,
    )?;
    let dense: Vec<usize> = rankings.iter().map(|r| r.steps().len()).collect();
    progress.begin("pruning sublayers", rankings.len() as u64);
    let mut grids = Vec::with_capacity(rankings.len());
    let mut candidates = vec![dense.clone()];
    for (i, ranking) in rankings.iter().enumerate() {
        let grid = grid(ranking.protected, ranking.steps().len(), options.points);
        store_widths(decoder, calibration, compensation, ranking, &grid, &store)?;
        progress.advance(1)?;
        for &steps in &grid {
            let mut candidate = dense.clone();
            candidate[i] = steps;
            candidates.push(candidate);
        }
        grids.push(grid);
    }
    let all: Vec<usize> = (0..windows.count()).collect();
    let widths = &decoder.config().widths;
    let sites = Sublayers::new(rankings.iter().collect(), &store, widths);
    let fitness = Fitness {
        decoder,
        windows,
        teacher: &teacher,
        sites: &sites,
        memory: options.memory,
        sharing: Sharing::Prefixes,
    };
    let layers = decoder.config().layers();
    progress.begin("comparing models", (candidates.len() * layers) as u64);
    let found = fitness.of(&candidates, &all, progress, 1)?;
    let (of_dense, mut found) = (found[0], &found[1..]);
    for (ranking, grid) in rankings.iter_mut().zip(grids) {
        let (of_ranking, rest) = found.split_at(grid.len());
        found = rest;
        let mut points: Vec<(usize, f64)> =
            grid.into_iter().zip(of_ranking.iter().copied()).collect();
        points.push((ranking.steps().len(), of_dense));
        ranking.errors = Some(interpolate(&points));
    }
    Ok(())
}

/// At most `points` widths below `steps`, ascending from the least.
fn grid(least: usize, steps: usize, points: usize) -> Vec<usize> {
    let span = steps - least;
    let points = points.min(span);
    (0..points).map(|i| least + i * span / points).collect()
}

/// Values at 0 ..= the last place, linear between the given ones and constant before the first.
fn interpolate(points: &[(usize, f64)]) -> Vec<f64> {
    let mut values = vec![points[0].1; points[0].0];
    for pair in points.windows(2) {
        let [(from, a), (to, b)] = [pair[0], pair[1]];
        let share = |at: usize| (at - from) as f64 / (to - from) as f64;
        values.extend((from..to).map(|at| a + (b - a) * share(at)));
    }
    values.extend(points.last().map(|&(_, value)| value));
    values
}

fn store_widths(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    compensation: Compensation,
    ranking: &Ranking,
    grid: &[usize],
    store: &LevelStore,
) -> Result<()> {
    let Ranking { layer, part, .. } = *ranking;
    let weight = output_weight(decoder, layer, part)?;
    let columns = weight.dim(1)?;
    let units = Units::of(ranking, columns);
    let gram = match compensation.refits() {
        true => Some(calibration.gram(layer, part)?),
        false => None,
    };
    let level = |&steps: &usize| -> Result<Level> {
        let kept_units = ranking.kept(steps);
        let kept = units.columns_of(&kept_units);
        let weight = match &gram {
            Some(gram) if !kept.is_empty() => {
                let removed = complement(&kept, columns);
                refit(&weight, gram, &kept, &removed, compensation.ridge(), layer)?
            }
            _ => {
                let ids = kept.iter().map(|&column| column as u32);
                weight.index_select(&Tensor::from_iter(ids, &Device::Cpu)?, 1)?
            }
        };
        Ok(Level {
            steps,
            units: kept_units,
            weight,
            error: 0.0,
        })
    };
    let levels: Vec<Level> = grid.iter().map(level).collect::<Result<_>>()?;
    store.save(ranking, &levels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_between_measured_widths_lie_on_a_line() {
        assert_eq!(grid(1, 9, 4), [1, 3, 5, 7]);
        assert_eq!(grid(1, 3, 10), [1, 2]);
        let values = interpolate(&[(1, 8.0), (3, 4.0), (4, 0.0)]);
        assert_eq!(values, [8.0, 8.0, 6.0, 4.0, 0.0]);
    }
}
