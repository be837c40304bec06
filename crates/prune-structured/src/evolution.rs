//! One generation of an evolutionary search, whatever its candidates are: different mutants of a parent, successive halving
//! over tokens, elitism.

use rand::Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Most exchanges in a mutation.
pub const FLIPS: usize = 4;
/// Mutations tried for each that is wanted, after which the neighbourhood counts as exhausted.
const TRIES: usize = 64;

/// One round of selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Tokens on which candidates are compared, rounded up to whole windows and drawn anew in
    /// every generation; all windows where there are no more.
    pub tokens: usize,
    /// Candidates that are kept.
    pub survivors: usize,
}

/// The fitness, lower being better, of candidates on the tokens of a stage.
pub type Evaluate<'e, C, E> = dyn FnMut(usize, &[C]) -> std::result::Result<Vec<f64>, E> + 'e;

/// The number of exchanges in a mutation: one to [`FLIPS`], fewer being likelier.
pub fn flips(rng: &mut impl Rng) -> usize {
    rng.random_range(1..=FLIPS).min(rng.random_range(1..=FLIPS))
}

/// Up to `count` mutants that differ from each other and from `parent`, in the order in which they were drawn.
pub fn offspring<C: Clone + Ord>(
    parent: &C,
    count: usize,
    mut mutate: impl FnMut() -> C,
) -> Vec<C> {
    let mut seen = BTreeSet::from([parent.clone()]);
    let mut found = Vec::new();
    for _ in 0..count.saturating_mul(TRIES) {
        if found.len() == count {
            break;
        }
        let mutant = mutate();
        if seen.insert(mutant.clone()) {
            found.push(mutant);
        }
    }
    found
}

/// The best of a generation and its fitness on the tokens of the last stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Best<C> {
    /// The best one, which may be the parent.
    pub candidate: C,
    /// Its fitness.
    pub fitness: f64,
    /// The parent's, on the same tokens.
    pub parent: f64,
}

/// Halves `offspring` over the stages and sets the last survivors beside `parent`, which stays
/// unless one of them is better.
///
/// # Errors
/// What `evaluate` reports, and [`Error::Search`](crate::Error::Search) without a stage.
pub fn select<C: Clone, E: From<crate::Error>>(
    stages: &[Stage],
    parent: &C,
    offspring: Vec<C>,
    evaluate: &mut Evaluate<'_, C, E>,
) -> std::result::Result<Best<C>, E> {
    let Some(last) = stages.len().checked_sub(1) else {
        return Err(no_stage().into());
    };
    let mut left = offspring;
    for (stage, sizes) in stages[..last].iter().enumerate() {
        if left.len() > sizes.survivors {
            let fitness = evaluate(stage, &left)?;
            let mut order: Vec<usize> = (0..left.len()).collect();
            order.sort_by(|&a, &b| fitness[a].total_cmp(&fitness[b]).then(a.cmp(&b)));
            order.truncate(sizes.survivors);
            left = order.into_iter().map(|i| left[i].clone()).collect();
        }
    }
    left.insert(0, parent.clone());
    let fitness = evaluate(last, &left)?;
    let best = (0..left.len())
        .min_by(|&a, &b| fitness[a].total_cmp(&fitness[b]))
        .expect("the parent is among them");
    Ok(Best {
        fitness: fitness[best],
        parent: fitness[0],
        candidate: left.swap_remove(best),
    })
}

fn no_stage() -> crate::Error {
    crate::Error::Search {
        option: "stages",
        value: "none".into(),
        expected: "at least one",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Result;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn a_parent_is_replaced_by_nothing_worse_and_mutants_are_all_different() {
        let stage = |survivors| Stage {
            tokens: 1,
            survivors,
        };
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mutants = offspring(&10i32, 8, || rng.random_range(5..16));
        assert_eq!(mutants.iter().collect::<BTreeSet<_>>().len(), 8);
        assert!(!mutants.contains(&10));
        // The first stage misleads: it prefers large numbers.
        let mut seen = Vec::new();
        let mut evaluate = |stage: usize, all: &[i32]| -> Result<Vec<f64>> {
            seen.push((stage, all.len()));
            let sign = if stage == 0 { -1.0 } else { 1.0 };
            Ok(all.iter().map(|&x| sign * f64::from(x)).collect())
        };
        let stages = [stage(3), stage(1)];
        let best = select(&stages, &10, mutants.clone(), &mut evaluate).unwrap();
        assert!(best.fitness <= best.parent);
        assert_eq!(seen, [(0, 8), (1, 4)]);
        assert!(
            select(
                &[],
                &10,
                mutants,
                &mut |_, _: &[i32]| Ok::<_, crate::Error>(vec![])
            )
            .is_err()
        );
    }
}
