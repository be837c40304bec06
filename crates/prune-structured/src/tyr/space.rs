//! The widths that a search chooses from.
//!
//! A level counts steps of a ranking away from a sublayer's centre, positive towards sparser. All
//! sublayers of a kind have the same spacing, so that a step up in one and a step down in another
//! leave the number of parameters as it was.

use super::options::Options;
use crate::ranking::Ranking;
use crate::stats::Part;
use crate::{Error, Result};

/// A sublayer and its widths.
#[derive(Clone, Debug)]
pub(crate) struct Sublayer {
    /// Costs and protected steps; its order and scores mean nothing.
    pub(crate) ranking: Ranking,
    /// Steps that level 0 keeps.
    pub(crate) centre: usize,
    /// Steps between levels.
    pub(crate) spacing: usize,
    /// Levels to each side.
    pub(crate) reach: i8,
}

impl Sublayer {
    /// Steps that a level keeps; `None` beyond its reach and beyond what may go.
    pub(crate) fn steps(&self, level: i8) -> Option<usize> {
        let steps = self.centre as isize - isize::from(level) * self.spacing as isize;
        let steps = usize::try_from(steps).ok()?;
        let within = (self.ranking.protected..=self.ranking.steps().len()).contains(&steps);
        (level.abs() <= self.reach && within).then_some(steps)
    }

    /// As `steps`, with the nearest width that there is for a level beyond it.
    pub(crate) fn nearest(&self, level: i8) -> usize {
        let toward = if level > 0 { -1 } else { 1 };
        let mut level = level;
        loop {
            match self.steps(level) {
                Some(steps) => return steps,
                // Level 0 always is a width.
                None => level += toward,
            }
        }
    }

    /// Steps of all levels, ascending, without repetition.
    pub(crate) fn widths(&self) -> Vec<usize> {
        (-self.reach..=self.reach)
            .rev()
            .filter_map(|level| self.steps(level))
            .collect()
    }

    /// Parameters of a level.
    pub(crate) fn cost(&self, level: i8) -> Option<u64> {
        self.steps(level).map(|steps| self.ranking.cost(steps))
    }
}

/// Spacing of the sublayers of a kind in an iteration.
pub(crate) fn spacing(ranking: &Ranking, options: &Options, iteration: usize) -> usize {
    let first = options.spacing * ranking.steps().len() as f64;
    let halved = (first / f64::powi(2.0, iteration as i32)).round() as usize;
    let finest = match ranking.part {
        Part::Attention => 1,
        Part::Mlp => options.finest_neurons / ranking.steps()[0].units,
    };
    halved.max(finest).max(1)
}

/// Steps kept when every sublayer gives up the same share: attention rounded to whole steps over
/// the model, the MLPs making up for it, odd steps spread evenly over the layers.
///
/// # Errors
/// [`Error::Ratio`] and [`Error::Unreachable`].
pub(crate) fn uniform(rankings: &[Ranking], ratio: f64) -> Result<Vec<usize>> {
    if !(0.0..1.0).contains(&ratio) {
        return Err(Error::Ratio(ratio));
    }
    let total: u64 = rankings.iter().map(|r| r.cost(r.steps().len())).sum();
    let mut keep: Vec<usize> = rankings.iter().map(|r| r.steps().len()).collect();
    let saved = |keep: &[usize]| -> f64 {
        let kept: u64 = rankings.iter().zip(keep).map(|(r, &k)| r.cost(k)).sum();
        (total - kept) as f64
    };
    for part in Part::ALL {
        let of_part: Vec<usize> = (0..rankings.len())
            .filter(|&i| rankings[i].part == part)
            .collect();
        let steps: usize = of_part.iter().map(|&i| rankings[i].steps().len()).sum();
        let cost: u64 = of_part.iter().map(|&i| rankings[i].cost(keep[i])).sum();
        if steps == 0 {
            continue;
        }
        let each = cost as f64 / steps as f64;
        let due = match part {
            Part::Attention => ratio * steps as f64,
            Part::Mlp => (ratio * total as f64 - saved(&keep)) / each,
        };
        remove(rankings, &of_part, due.round().max(0.0) as usize, &mut keep);
    }
    let largest = rankings
        .iter()
        .flat_map(Ranking::steps)
        .map(|s| s.cost)
        .max();
    if (saved(&keep) - ratio * total as f64).abs() > largest.unwrap_or(0) as f64 {
        let kept = rankings.iter().map(|r| r.cost(r.protected)).sum();
        return Err(Error::Unreachable { ratio, kept, total });
    }
    Ok(keep)
}

/// Takes `due` steps from the given rankings, in proportion to their length and as far as
/// protected steps allow.
fn remove(rankings: &[Ranking], of_part: &[usize], due: usize, keep: &mut [usize]) {
    let all: usize = of_part.iter().map(|&i| rankings[i].steps().len()).sum();
    let (mut passed, mut removed) = (0, 0);
    let take = |i: usize, wanted: usize, keep: &mut [usize]| {
        let taken = wanted.min(keep[i] - rankings[i].protected);
        keep[i] -= taken;
        taken
    };
    for &i in of_part {
        passed += rankings[i].steps().len();
        // Rounded in the middle, so that a single odd step falls on a middle layer.
        let target = (passed * due + all / 2) / all;
        removed += take(i, target.saturating_sub(removed), keep);
    }
    while removed < due {
        let before = removed;
        for &i in of_part {
            if removed < due {
                removed += take(i, 1, keep);
            }
        }
        if removed == before {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rankings(layers: usize, heads: usize, neurons: usize) -> Vec<Ranking> {
        (0..layers)
            .flat_map(|layer| {
                let mut attention =
                    Ranking::units(layer, Part::Attention, &vec![0.0; heads], 50, 1);
                let mut mlp = Ranking::units(layer, Part::Mlp, &vec![0.0; neurons], 3, 1);
                (attention.protected, mlp.protected) = (1, 1);
                [attention, mlp]
            })
            .collect()
    }

    proptest! {
        #[test]
        fn the_uniform_start_is_within_one_neuron_of_the_ratio_and_spread_evenly(
            layers in 1usize..8,
            heads in 4usize..9,
            ratio in 0.0f64..0.6,
        ) {
            let rankings = rankings(layers, heads, 200);
            let keep = uniform(&rankings, ratio).unwrap();
            let total: u64 = rankings.iter().map(|r| r.cost(r.steps().len())).sum();
            let kept: u64 = rankings.iter().zip(&keep).map(|(r, &k)| r.cost(k)).sum();
            prop_assert!(((total - kept) as f64 - ratio * total as f64).abs() <= 1.5);
            for part in [0, 1] {
                let of_part = || keep.iter().skip(part).step_by(2);
                prop_assert!(of_part().max().unwrap() - of_part().min().unwrap() <= 1);
            }
        }
    }

    #[test]
    fn what_protected_steps_forbid_is_refused() {
        assert!(matches!(
            uniform(&rankings(2, 2, 4), 0.99),
            Err(Error::Unreachable { .. })
        ));
        assert!(matches!(
            uniform(&rankings(2, 2, 4), 1.0),
            Err(Error::Ratio(_))
        ));
    }
}
