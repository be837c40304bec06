//! Mutations of the levels of a supernet: paired steps that leave the budget alone.

use super::space::Sublayer;
use crate::evolution;
use rand::Rng;

/// A level for each sublayer.
pub(crate) type Levels = Vec<i8>;

/// Up to `count` different mutants of `parent`, in the order in which they were drawn.
pub(crate) fn offspring(
    space: &[Sublayer],
    parent: &[i8],
    count: usize,
    rng: &mut impl Rng,
) -> Vec<Levels> {
    evolution::offspring(&parent.to_vec(), count, || mutate(space, parent, rng))
}

/// One to four exchanges, fewer being likelier: a step denser in one sublayer, a step sparser in
/// another of its kind, where both cost the same number of parameters.
pub(crate) fn mutate(space: &[Sublayer], parent: &[i8], rng: &mut impl Rng) -> Levels {
    let flips = evolution::flips(rng);
    let mut levels = parent.to_vec();
    for _ in 0..flips {
        let change = |i: usize, by: i8| -> Option<u64> {
            let (from, to) = (space[i].cost(levels[i])?, space[i].cost(levels[i] + by)?);
            Some(from.abs_diff(to))
        };
        let mut denser: Vec<(usize, u64)> = (0..space.len())
            .filter_map(|i| Some((i, change(i, -1)?)))
            .collect();
        let exchange = loop {
            if denser.is_empty() {
                break None;
            }
            let (i, cost) = denser.swap_remove(rng.random_range(0..denser.len()));
            let kind = space[i].ranking.part;
            let sparser: Vec<usize> = (0..space.len())
                .filter(|&j| j != i && space[j].ranking.part == kind)
                .filter(|&j| change(j, 1) == Some(cost))
                .collect();
            if !sparser.is_empty() {
                break Some((i, sparser[rng.random_range(0..sparser.len())]));
            }
        };
        if let Some((i, j)) = exchange {
            levels[i] -= 1;
            levels[j] += 1;
        }
    }
    levels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Result;
    use crate::evolution::{Evaluate, select};
    use crate::ranking::Ranking;
    use crate::stats::Part;
    use crate::tyr::Options;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use std::collections::BTreeSet;

    fn space(layers: usize) -> Vec<Sublayer> {
        let sublayer = |layer, part, units: usize, cost, spacing| {
            let mut ranking = Ranking::units(layer, part, &vec![0.0; units], cost, 1);
            ranking.protected = 1;
            Sublayer {
                centre: units * 3 / 4,
                ranking,
                spacing,
                reach: 4,
            }
        };
        (0..layers)
            .flat_map(|layer| {
                [
                    sublayer(layer, Part::Attention, 8, 40, 1),
                    sublayer(layer, Part::Mlp, 50, 3, 6),
                ]
            })
            .collect()
    }

    #[test]
    fn two_thousand_mutations_leave_the_budget_of_each_kind_alone() {
        let space = space(6);
        let budget = |levels: &[i8], part| -> u64 {
            let of_part = space.iter().zip(levels);
            of_part
                .filter(|(s, _)| s.ranking.part == part)
                .map(|(s, &level)| s.cost(level).unwrap())
                .sum()
        };
        let start = vec![0; space.len()];
        let mut levels = start.clone();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for _ in 0..2000 {
            levels = mutate(&space, &levels, &mut rng);
            for part in Part::ALL {
                assert_eq!(budget(&levels, part), budget(&start, part));
            }
        }
        assert_ne!(levels, start);
    }

    #[test]
    fn offspring_differ_from_each_other_and_the_parent_and_end_when_there_are_no_more() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let parent = vec![0; 12];
        let mutants = offspring(&space(6), &parent, 100, &mut rng);
        let distinct: BTreeSet<_> = mutants.iter().chain([&parent]).collect();
        assert_eq!((mutants.len(), distinct.len()), (100, 101));
        // A single layer has no partner.
        assert!(offspring(&space(1), &[0, 0], 10, &mut rng).is_empty());
    }

    #[test]
    fn fitness_on_a_fixed_batch_never_worsens_and_finds_a_hidden_optimum() {
        let space = space(5);
        let hidden: Levels = vec![1, -2, 0, 2, -1, -1, 1, 0, -1, 1];
        let options = Options::default();
        let mut evaluate = |_: usize, candidates: &[Levels]| -> Result<Vec<f64>> {
            let distance = |levels: &Levels| -> f64 {
                let gaps = levels.iter().zip(&hidden).map(|(a, b)| f64::from(a - b));
                gaps.map(|gap| gap * gap).sum()
            };
            Ok(candidates.iter().map(distance).collect())
        };
        let run = |evaluate: &mut Evaluate<'_, Levels, crate::Error>| {
            let (mut parent, mut last) = (vec![0; 10], f64::INFINITY);
            for generation in 0..40 {
                let mut rng = ChaCha8Rng::seed_from_u64(generation);
                let mutants = offspring(&space, &parent, options.offspring, &mut rng);
                let best = select(&options.stages, &parent, mutants, evaluate).unwrap();
                assert!(best.fitness <= best.parent && best.fitness <= last);
                (parent, last) = (best.candidate, best.fitness);
            }
            (parent, last)
        };
        let (found, fitness) = run(&mut evaluate);
        assert_eq!((found, fitness), (hidden.clone(), 0.0));
        assert_eq!(run(&mut evaluate), run(&mut evaluate));
    }
}
