//! Curves of what pruning one sublayer does to the whole model's output.

use crate::compensate::{Compensation, complement, refit};
use crate::obs::{Level, Units};
use crate::ranking::Ranking;
use crate::tyr::{Fitness, LevelStore, Sharing, Teacher};
use crate::{Calibration, Error, Recipe, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Windows};
use std::path::Path;

/// How curves are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// What progress adds up to when every curve of `rankings` is measured.
    pub fn steps(&self, decoder: &Decoder<'_>, rankings: &[Ranking]) -> usize {
        let layers = decoder.config().layers();
        let widths = |r: &Ranking| grid(r.protected, r.steps.len(), self.points).len();
        layers + rankings.iter().map(widths).sum::<usize>() * (1 + layers)
    }
}

/// What curves are measured on, and where.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// Windows whose predictions are compared.
    pub windows: &'a Windows,
    /// Folder for pruned sublayers and the dense model's predictions.
    pub dir: &'a Path,
}

/// Gives every ranking the curve of the model's KL divergence from the dense one, in nats per
/// position, when this sublayer alone is pruned and compensated.
///
/// Models that differ from the dense one in a single sublayer share all blocks before it. `progress`
/// is told how many of [`Measure::steps`] are done since it was told last.
///
/// # Errors
/// [`Error::Missing`] without Gram matrices where the recipe refits, [`Error::Search`] for a
/// compensation by bias, which a curve leaves out, and what running the model reports.
pub fn measure(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    recipe: &Recipe,
    rankings: &mut [Ranking],
    Data { windows, dir }: Data<'_>,
    options: Measure,
    progress: &mut dyn FnMut(usize),
) -> Result<()> {
    let compensation = recipe.compensation(decoder);
    if compensation == Compensation::Bias {
        return Err(Error::Search {
            option: "compensation",
            value: "bias".into(),
            expected: "least squares or none where curves are measured",
        });
    }
    let store = LevelStore::create(dir)?;
    let teacher = Teacher::new(decoder, windows, options.top_k, dir)?;
    let dense: Vec<usize> = rankings.iter().map(|r| r.steps.len()).collect();
    let mut grids = Vec::with_capacity(rankings.len());
    let mut candidates = vec![dense.clone()];
    for (i, ranking) in rankings.iter().enumerate() {
        let grid = grid(ranking.protected, ranking.steps.len(), options.points);
        store_widths(decoder, calibration, compensation, ranking, &grid, &store)?;
        progress(grid.len());
        for &steps in &grid {
            let mut candidate = dense.clone();
            candidate[i] = steps;
            candidates.push(candidate);
        }
        grids.push(grid);
    }
    let all: Vec<usize> = (0..windows.count()).collect();
    let fitness = Fitness {
        decoder,
        windows,
        teacher: &teacher,
        rankings: rankings.iter().collect(),
        store: &store,
        memory: options.memory,
        sharing: Sharing::Prefixes,
    };
    let found = fitness.of_watched(&candidates, &all, progress)?;
    let (of_dense, mut found) = (found[0], &found[1..]);
    for (ranking, grid) in rankings.iter_mut().zip(grids) {
        let (of_ranking, rest) = found.split_at(grid.len());
        found = rest;
        let mut points: Vec<(usize, f64)> =
            grid.into_iter().zip(of_ranking.iter().copied()).collect();
        points.push((ranking.steps.len(), of_dense));
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
    let name = part.output().weight(layer);
    let weight = decoder
        .checkpoint()
        .tensor_as(&name, DType::F32, &Device::Cpu)?;
    let columns = weight.dim(1)?;
    let units = Units::of(ranking, columns);
    let gram = match compensation {
        Compensation::LeastSquares { .. } | Compensation::Alternating { .. } => {
            Some(calibration.gram(layer, part)?)
        }
        _ => None,
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
