//! Cuts through pooled units.

use crate::ranking::{Ranking, pool};
use crate::stats::Part;

/// Keeps the best steps of one part, or of all, up to the cumulated cost closest to `budget`; `keep` is at the protected
/// steps before.
pub(super) fn cut(rankings: &[Ranking], part: Option<Part>, budget: f64, keep: &mut [usize]) {
    let of_part = |r: &&Ranking| part.is_none_or(|part| r.part == part);
    let protected: u64 = rankings
        .iter()
        .filter(of_part)
        .map(|r| r.cost(r.protected))
        .sum();
    let pool = pool(rankings, part);
    let mut spent = protected;
    let mut best = ((protected as f64 - budget).abs(), 0);
    for (count, &(i, step)) in pool.iter().enumerate() {
        spent += rankings[i].steps()[step].cost;
        let gap = (spent as f64 - budget).abs();
        if gap < best.0 {
            best = (gap, count + 1);
        }
    }
    for &(i, _) in &pool[..best.1] {
        keep[i] += 1;
    }
}

/// The protected steps of each ranking.
pub(super) fn protected(rankings: &[Ranking]) -> Vec<usize> {
    rankings.iter().map(|r| r.protected).collect()
}
