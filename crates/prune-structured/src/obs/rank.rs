//! Rankings and error curves of whole models from their Gram matrices.

use super::{Nested, Problem, Rounds, Units, error_curve, sweep};
use crate::compensation::{Compensation, DEFAULT_RIDGE};
use crate::ranking::{Ranking, Shape};
use crate::stats::{output_gains, output_weight, standardise};
use crate::{Calibration, Result};
use causal_lm::{Decoder, Progress};

/// Ranks the units of every sublayer by the order in which a sweep eliminates them.
///
/// The score of a step is the loss that removing it adds for each column, standardised within its
/// sublayer and, where it would rise along the ranking, averaged over its neighbours.
pub(crate) fn rank(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    rounds: Option<Rounds>,
    shape: &Shape,
    progress: &dyn Progress,
) -> Result<Vec<Ranking>> {
    let mut rankings = Ranking::unscored(decoder, shape)?;
    progress.begin("ranking", rankings.len() as u64);
    for ranking in &mut rankings {
        let problem = problem(decoder, calibration, ranking, DEFAULT_RIDGE)?;
        let units = Units::of(ranking, problem.columns());
        let rounds = rounds.unwrap_or(Rounds::suggested(problem.columns()));
        let levels = [ranking.protected];
        let order = sweep(problem.clone(), &units, rounds, &levels)?.order;
        let errors = Nested::new(&problem, &units.columns_of(&order))?.errors();
        ranking.reorder(order, step_scores(&units, &errors));
        progress.advance(1)?;
    }
    Ok(rankings)
}

/// Squared output error of a sublayer under a compensation when the first k steps of its ranking stay, for k = 0 ..=
/// steps.
pub(crate) fn step_errors(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    compensation: Compensation,
    ranking: &Ranking,
) -> Result<Vec<f64>> {
    let problem = problem(decoder, calibration, ranking, compensation.ridge())?;
    let moments = &calibration.part(ranking.layer, ranking.part)?.moments;
    let units = Units::of(ranking, problem.columns());
    let order = units.columns_of(ranking.order());
    let input = (moments.mean.as_slice(), moments.count);
    let errors = error_curve(&problem, &order, compensation, input)?;
    Ok((0..=ranking.steps().len())
        .map(|steps| errors[units.kept(steps) * units.columns])
        .collect())
}

fn problem(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    ranking: &Ranking,
    ridge: f64,
) -> Result<Problem> {
    let Ranking { layer, part, .. } = *ranking;
    let weight = output_weight(decoder, layer, part)?;
    let problem = Problem::new(&weight, &calibration.gram(layer, part)?, ridge, layer)?;
    problem.with_gains(output_gains(decoder, layer, part)?)
}

/// Scores of the steps from the errors of keeping the first k columns.
fn step_scores(units: &Units, errors: &[f64]) -> Vec<f64> {
    let mut scores: Vec<f64> = (0..units.steps.len())
        .map(|step| {
            let [from, to] = [step, step + 1].map(|s| units.kept(s) * units.columns);
            (errors[from] - errors[to]) / (to - from) as f64
        })
        .collect();
    standardise(&mut scores);
    never_rising(&scores)
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
