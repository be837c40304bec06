//! Which tokens have the lowest scores, in one head or among heads that share their budgets.

use super::Score;
use std::ops::Range;

/// How two tokens of a head or of different heads compare: by score, then by position.
fn claim(score: Score, id: u32) -> impl Fn(&(Score, u32)) -> std::cmp::Ordering {
    move |(other, other_id)| {
        score
            .value
            .total_cmp(&other.value)
            .then(score.tie.cmp(&other.tie))
            .then(id.cmp(other_id))
    }
}

/// The slots of each head that leave when the heads together keep `limit` tokens, each of them at least `least` and one more than what is protected.
pub(super) fn jointly(
    scores: &[Vec<Score>],
    ids: &[&[u32]],
    free: &Range<u32>,
    limit: usize,
    least: usize,
) -> Vec<Vec<u32>> {
    let mut kept = 0;
    let mut pool: Vec<(usize, u32)> = Vec::new();
    for (head, ids) in ids.iter().enumerate() {
        let key = |slot: u32| (scores[head][slot as usize], ids[slot as usize]);
        let mut own: Vec<u32> = (0..ids.len() as u32)
            .filter(|&slot| free.contains(&ids[slot as usize]))
            .collect();
        let held = ids.len() - own.len();
        let sure = least.saturating_sub(held).max(1).min(own.len());
        own.sort_unstable_by(|&a, &b| {
            let (score, id) = key(b);
            claim(score, id)(&key(a))
        });
        kept += held + sure;
        pool.extend(own[sure..].iter().map(|&slot| (head, slot)));
    }
    let key =
        |&(head, slot): &(usize, u32)| (scores[head][slot as usize], ids[head][slot as usize]);
    // Between heads the first wins a tie.
    pool.sort_by(|a, b| {
        let (score, id) = key(b);
        claim(score, id)(&key(a)).then(a.0.cmp(&b.0))
    });
    let mut evict = vec![Vec::new(); ids.len()];
    for &(head, slot) in pool.iter().skip(limit.saturating_sub(kept)) {
        evict[head].push(slot);
    }
    evict.iter_mut().for_each(|slots| slots.sort_unstable());
    evict
}

/// The slots of the `count` lowest scores among positions in `free`, ascending.
pub(super) fn lowest(scores: &[Score], ids: &[u32], free: &Range<u32>, count: usize) -> Vec<u32> {
    let key = |slot: u32| (scores[slot as usize], ids[slot as usize]);
    let order = |&a: &u32, &b: &u32| {
        let (score, id) = key(a);
        claim(score, id)(&key(b))
    };
    let candidates = (0..ids.len() as u32).filter(|&slot| free.contains(&ids[slot as usize]));
    if count == 1 {
        return candidates.min_by(order).into_iter().collect();
    }
    let mut candidates: Vec<u32> = candidates.collect();
    if (1..candidates.len()).contains(&count) {
        candidates.select_nth_unstable_by(count - 1, order);
    }
    candidates.truncate(count);
    candidates.sort_unstable();
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn heads_share_budgets_as_in_golden_values() {
        let numbers = golden::uniform("kv2.ada", 3 * 20);
        let scores: Vec<Vec<Score>> = numbers
            .chunks_exact(20)
            .zip([3.0, 1.0, 0.4])
            .map(|(row, factor)| row.iter().map(|x| Score::new(x.abs() * factor)).collect())
            .collect();
        let ids: Vec<u32> = (0..20).collect();
        let ids = [&ids[..]; 3];
        let kept = |floor: f64| {
            let least = (floor * 8.0) as usize;
            let evict = jointly(&scores, &ids, &(0..20), 24, least);
            evict
                .iter()
                .map(|slots| 20 - slots.len())
                .collect::<Vec<_>>()
        };
        assert_eq!(kept(0.2), [17, 6, 1]);
        assert_eq!(kept(1.0), [8, 8, 8]);
        // Each head keeps one token at least: without that it would be 18, 6 and 0.
        assert_eq!(kept(0.0), [17, 6, 1]);
    }
}
