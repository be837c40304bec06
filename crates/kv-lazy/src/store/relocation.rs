//! How tokens move when others are evicted: the one description that keys, values, positions and every policy's own state follow.
//!
//! A [`Relocation`] is a list of copies inside a row, ordered so that no source is overwritten before it is read, and
//! the length that remains. *Compaction* keeps physical order and moves everything behind the first hole; *slot reuse*
//! moves the last tokens into the holes, one token per evicted token.

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
    /// The moves that free the ascending slots `evict` of `len` tokens under `layout`.
    pub(crate) fn of(evict: &[u32], len: usize, layout: super::Layout) -> Self {
        match layout {
            super::Layout::Compact => Self::compact(evict, len),
            super::Layout::SlotReuse | super::Layout::SinkRing => Self::swap_in(evict, len),
        }
    }

    /// Of `len` tokens those in the ascending slots `evict` leave; the others stay in order, without holes.
    pub fn compact(evict: &[u32], len: usize) -> Self {
        let mut runs = Vec::with_capacity(evict.len());
        let mut to = evict.first().map_or(len, |&slot| slot as usize);
        for (i, &slot) in evict.iter().enumerate() {
            let from = slot as usize + 1;
            let end = evict.get(i + 1).map_or(len, |&next| next as usize);
            if end > from {
                let count = end - from;
                runs.push(Run { from, to, count });
                to += count;
            }
        }
        Self {
            runs,
            len: len - evict.len(),
        }
    }

    /// Of `len` tokens those in the ascending slots `evict` leave; tokens from the end are moved into the holes.
    pub fn swap_in(evict: &[u32], len: usize) -> Self {
        let kept = len - evict.len();
        let (holes, gone) = evict.split_at(evict.partition_point(|&slot| (slot as usize) < kept));
        let mut gone = gone.iter().peekable();
        let movers =
            (kept..len).filter(|&slot| gone.next_if(|&&next| next as usize == slot).is_none());
        let runs = holes
            .iter()
            .zip(movers)
            .map(|(&hole, from)| Run {
                from,
                to: hole as usize,
                count: 1,
            })
            .collect();
        Self { runs, len: kept }
    }

    /// Of `len` slots whose last `new` were just appended, moves the first of these over `slots`, one for one; the rest
    /// follow.
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
            let part = |kept: bool| (0..flags.len() as u32).filter(|&i| flags[i as usize] == kept).collect::<Vec<u32>>();
            let (keep, evict): (Vec<u32>, Vec<u32>) = (part(true), part(false));
            let tokens: Vec<u32> = (0..flags.len() as u32).flat_map(|i| [i, 1000 + i]).collect();
            let want: Vec<u32> = keep.iter().flat_map(|&i| [i, 1000 + i]).collect();
            let mut compacted = tokens.clone();
            Relocation::compact(&evict, flags.len()).apply(&mut compacted, 2);
            prop_assert_eq!(&compacted, &want);
            let mut swapped = tokens;
            Relocation::swap_in(&evict, flags.len()).apply(&mut swapped, 2);
            let mut pairs: Vec<[u32; 2]> = swapped.chunks(2).map(|p| [p[0], p[1]]).collect();
            pairs.sort_unstable();
            prop_assert_eq!(pairs.concat(), want);
        }
    }

    #[test]
    fn slot_reuse_moves_one_token_for_one_evicted() {
        let run = |from, to, count| Run { from, to, count };
        assert_eq!(Relocation::swap_in(&[3], 100).runs, [run(99, 3, 1)]);
        assert_eq!(Relocation::swap_in(&[3, 99], 100).runs, [run(98, 3, 1)]);
        assert_eq!(Relocation::compact(&[3], 100).runs, [run(4, 3, 96)]);
    }
}
