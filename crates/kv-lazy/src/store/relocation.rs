//! How rows move when tokens leave: the one description that keys, values, positions and every policy's own state follow.
//!
//! A [`Relocation`] is a list of copies inside a row, ordered so that no source is overwritten before it is read, and
//! the length that remains. *Compaction* keeps physical order and moves everything behind the first hole; *slot reuse*
//! lets the last tokens drop into the holes and moves one row per evicted token.

/// A copy of `count` consecutive tokens from slot `from` to slot `to`, `to` < `from`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First slot read.
    pub from: usize,
    /// First slot written.
    pub to: usize,
    /// Tokens copied.
    pub count: usize,
}

/// Moves of one row: copies in order, then the length that remains.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Relocation {
    /// Copies, to be done in this order.
    pub runs: Vec<Run>,
    /// Tokens that remain.
    pub len: usize,
}

impl Relocation {
    /// Keeps the ascending slots `keep` in their order.
    pub fn compact(keep: &[u32]) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for (to, &from) in keep.iter().enumerate() {
            let from = from as usize;
            match runs.last_mut() {
                Some(run) if run.from + run.count == from && run.to + run.count == to => {
                    run.count += 1;
                }
                _ if from == to => {}
                _ => runs.push(Run { from, to, count: 1 }),
            }
        }
        Self {
            runs,
            len: keep.len(),
        }
    }

    /// Keeps the ascending slots `keep` of `len` and fills each hole with a token from the end.
    pub fn swap_in(keep: &[u32], len: usize) -> Self {
        let kept = keep.len();
        let mut movers = keep[keep.partition_point(|&slot| (slot as usize) < kept)..].iter();
        let mut held = keep.iter().peekable();
        let mut runs = Vec::new();
        for slot in 0..kept.min(len) {
            if held.peek().is_some_and(|&&next| next as usize == slot) {
                held.next();
            } else if let Some(&from) = movers.next() {
                runs.push(Run {
                    from: from as usize,
                    to: slot,
                    count: 1,
                });
            }
        }
        Self { runs, len: kept }
    }

    /// Of `len` slots whose last `new` were just appended, moves the first of these over `slots`, one for one; the rest
    /// close ranks behind.
    pub fn overwrite(slots: &[u32], len: usize, new: usize) -> Self {
        let first = len - new;
        let replaced = slots.len().min(new);
        let mut runs: Vec<Run> = slots[..replaced]
            .iter()
            .enumerate()
            .map(|(t, &slot)| Run {
                from: first + t,
                to: slot as usize,
                count: 1,
            })
            .collect();
        if replaced > 0 && replaced < new {
            runs.push(Run {
                from: first + replaced,
                to: first,
                count: new - replaced,
            });
        }
        Self {
            runs,
            len: len - replaced,
        }
    }

    /// Applies the moves to per-token data of `width` elements a token.
    pub fn apply<T: Copy>(&self, data: &mut Vec<T>, width: usize) {
        for run in &self.runs {
            let from = run.from * width;
            data.copy_within(from..from + run.count * width, run.to * width);
        }
        data.truncate(self.len * width);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn both_forms_keep_exactly_the_kept(flags in proptest::collection::vec(any::<bool>(), 1..80)) {
            let keep: Vec<u32> = (0..flags.len() as u32).filter(|&i| flags[i as usize]).collect();
            let tokens: Vec<u32> = (0..flags.len() as u32).flat_map(|i| [i, 1000 + i]).collect();
            let want: Vec<u32> = keep.iter().flat_map(|&i| [i, 1000 + i]).collect();
            let mut compacted = tokens.clone();
            Relocation::compact(&keep).apply(&mut compacted, 2);
            prop_assert_eq!(&compacted, &want);
            let mut swapped = tokens;
            Relocation::swap_in(&keep, flags.len()).apply(&mut swapped, 2);
            let mut pairs: Vec<[u32; 2]> = swapped.chunks(2).map(|p| [p[0], p[1]]).collect();
            pairs.sort_unstable();
            prop_assert_eq!(pairs.concat(), want);
        }
    }

    #[test]
    fn slot_reuse_moves_one_token_for_one_evicted() {
        let keep: Vec<u32> = (0..100).filter(|&i| i != 3).collect();
        let moves = Relocation::swap_in(&keep, 100);
        assert_eq!(
            moves.runs,
            [Run {
                from: 99,
                to: 3,
                count: 1
            }]
        );
        assert_eq!(
            Relocation::compact(&keep).runs,
            [Run {
                from: 4,
                to: 3,
                count: 96
            }]
        );
    }
}
