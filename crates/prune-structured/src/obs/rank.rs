//! Rankings and error curves of whole models from their Gram matrices.

use super::{Nested, Problem, Rounds, Units, error_curve, sweep};
use crate::ranking::{Ranking, Shape};
use crate::rate_distortion::Distortion;
use crate::score::standardise;
use crate::{Calibration, Compensation, DEFAULT_RIDGE, Result};
use candle_core::{DType, Device};
use causal_lm::Decoder;

/// Ranks the units of every sublayer by the order in which a sweep eliminates them.
///
/// The score of a step is the loss that removing it adds for each column, standardised within its
/// sublayer and, where it would rise along the ranking, averaged over its neighbours.
pub(crate) fn rank(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    rounds: Option<Rounds>,
    shape: &Shape,
) -> Result<Vec<Ranking>> {
    let mut rankings = Ranking::unscored(decoder, shape)?;
    for ranking in &mut rankings {
        let problem = problem(decoder, calibration, ranking, DEFAULT_RIDGE)?;
        let units = Units::of(ranking, problem.columns());
        let rounds = rounds.unwrap_or(Rounds::suggested(problem.columns()));
        let levels = [ranking.protected];
        ranking.order = sweep(problem.clone(), &units, rounds, &levels)?.order;
        let errors = Nested::new(&problem, &units.columns_of(&ranking.order))?.errors();
        ranking.score_steps(&units, &errors);
    }
    Ok(rankings)
}

/// Gives every ranking the curve of its output error under a compensation.
pub(crate) fn attach_errors(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    compensation: Compensation,
    distortion: Distortion,
    rankings: &mut [Ranking],
) -> Result<()> {
    for ranking in rankings {
        let problem = problem(decoder, calibration, ranking, compensation.ridge())?;
        let moments = &calibration.part(ranking.layer, ranking.part)?.moments;
        let units = Units::of(ranking, problem.columns());
        let order = units.columns_of(&ranking.order);
        let input = (moments.mean.as_slice(), moments.count);
        let errors = error_curve(&problem, &order, compensation, input)?;
        let scale = match distortion {
            Distortion::Output => 1.0,
            Distortion::Relative => errors[0],
            Distortion::Hidden => calibration.layers[ranking.layer].hidden_square,
        };
        // Where nothing comes out, nothing can be lost.
        let scale = if scale > 0.0 { scale } else { 1.0 };
        ranking.errors = Some(
            (0..=ranking.steps.len())
                .map(|steps| errors[units.kept(steps) * units.columns] / scale)
                .collect(),
        );
    }
    Ok(())
}

fn problem(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    ranking: &Ranking,
    ridge: f64,
) -> Result<Problem> {
    let Ranking { layer, part, .. } = *ranking;
    let name = part.output().weight(layer);
    let weight = decoder
        .checkpoint()
        .tensor_as(&name, DType::F32, &Device::Cpu)?;
    Problem::new(&weight, &calibration.gram(layer, part)?, ridge, layer)
}

impl Ranking {
    fn score_steps(&mut self, units: &Units, errors: &[f64]) {
        let mut scores: Vec<f64> = (0..self.steps.len())
            .map(|step| {
                let [from, to] = [step, step + 1].map(|s| units.kept(s) * units.columns);
                (errors[from] - errors[to]) / (to - from) as f64
            })
            .collect();
        standardise(&mut scores);
        for (step, score) in self.steps.iter_mut().zip(never_rising(&scores)) {
            step.score = score;
        }
    }
}

/// The closest values that never rise, by averaging runs that do.
fn never_rising(values: &[f64]) -> Vec<f64> {
    let mut runs: Vec<(f64, usize)> = Vec::with_capacity(values.len());
    for &value in values {
        let mut run = (value, 1);
        while let Some(&(mean, len)) = runs.last()
            && mean < run.0
        {
            runs.pop();
            let both = len + run.1;
            run = (
                (mean * len as f64 + run.0 * run.1 as f64) / both as f64,
                both,
            );
        }
        runs.push(run);
    }
    runs.into_iter()
        .flat_map(|(mean, len)| std::iter::repeat_n(mean, len))
        .collect()
}
