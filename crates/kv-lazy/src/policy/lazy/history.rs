//! When tokens were active: TS and MRI, brought up to date from activation bits.
//!
//! TS and MRI are read only at evictions, so a step writes no more than one bit per token. Eight steps' bits make a byte, and a byte
//! is folded by table: the first and last active step in it and the longest gap between them are all that the
//! recurrence MRI ← max(MRI, t − TS), TS ← t leaves behind. 9 bytes of state per token.

use crate::store::Relocation;

/// Steps a byte of activation bits holds.
const STEPS: u32 = 8;

/// Per byte of activation bits: (first active step, last active step, longest gap between active steps), steps from 1; (0, 0, 0)
/// for none.
const FOLD: [(u8, u8, u8); 256] = {
    let mut table = [(0, 0, 0); 256];
    let mut bits = 1;
    while bits < 256 {
        let (mut first, mut last, mut gap) = (0, 0, 0);
        let mut step = 1;
        while step <= STEPS as u8 {
            if bits >> (step - 1) & 1 == 1 {
                if first == 0 {
                    first = step;
                } else if step - last > gap {
                    gap = step - last;
                }
                last = step;
            }
            step += 1;
        }
        table[bits] = (first, last, gap);
        bits += 1;
    }
    table
};

/// TS, MRI and pending activation bits of one head's tokens.
#[derive(Debug, Clone, Default)]
pub struct History {
    last_active: Vec<u32>,
    mri: Vec<u32>,
    bits: Vec<u8>,
    /// Step before the one that bit 0 stands for.
    base: u32,
}

impl History {
    /// `count` tokens born at step `birth`: TS = birth, MRI = 0.
    pub fn append(&mut self, count: usize, birth: u32) {
        let len = self.mri.len() + count;
        self.last_active.resize(len, birth);
        self.mri.resize(len, 0);
        self.bits.resize(len, 0);
    }

    /// Notes which tokens step `step` activated; steps come in ascending order from 1.
    pub fn record(&mut self, step: u32, weights: &[f32], active: impl Fn(f32) -> bool) {
        if step > self.base + STEPS {
            self.fold();
            self.base = step - 1;
        }
        let mask = 1u8 << (step - self.base - 1);
        for (bits, &weight) in self.bits.iter_mut().zip(weights) {
            *bits |= if active(weight) { mask } else { 0 };
        }
    }

    /// Brings TS and MRI up to date.
    pub fn fold(&mut self) {
        let base = self.base;
        for ((bits, seen), mri) in self
            .bits
            .iter_mut()
            .zip(&mut self.last_active)
            .zip(&mut self.mri)
        {
            let (first, last, gap) = FOLD[usize::from(*bits)];
            if first != 0 {
                let since = base + u32::from(first) - *seen;
                *mri = (*mri).max(since).max(u32::from(gap));
                *seen = base + u32::from(last);
                *bits = 0;
            }
        }
    }

    /// TS of each token, as of the last fold.
    pub fn last_active(&self) -> &[u32] {
        &self.last_active
    }

    /// MRI of each token, as of the last fold; 0: never active since birth.
    pub fn mri(&self) -> &[u32] {
        &self.mri
    }

    /// Tokens move or leave.
    pub fn relocate(&mut self, moves: &Relocation) {
        moves.apply(&mut self.last_active, 1);
        moves.apply(&mut self.mri, 1);
        moves.apply(&mut self.bits, 1);
    }

    /// Bytes of state.
    pub fn bytes(&self) -> usize {
        self.mri.len() * 9
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The recurrence of the paper, step by step, against folding bytes of bits.
        #[test]
        fn folded_bits_equal_the_stepwise_recurrence(
            pattern in proptest::collection::vec(any::<bool>(), 1..120),
            birth in 0u32..30,
            folds in proptest::collection::vec(any::<bool>(), 120),
        ) {
            let (mut seen, mut mri) = (birth, 0);
            let mut history = History::default();
            history.append(1, birth);
            for (i, &active) in pattern.iter().enumerate() {
                let t = birth.max(1) + i as u32;
                if active {
                    mri = mri.max(t - seen);
                    seen = t;
                }
                history.record(t, &[f32::from(u8::from(active))], |w| w > 0.5);
                if folds[i] {
                    history.fold();
                    prop_assert_eq!((history.last_active()[0], history.mri()[0]), (seen, mri));
                }
            }
            history.fold();
            prop_assert_eq!((history.last_active()[0], history.mri()[0]), (seen, mri));
        }
    }

    #[test]
    fn self_attention_at_birth_gives_mri_0_in_the_paper_and_1_in_the_program() {
        for (birth, mri) in [(5, 0), (4, 1)] {
            let mut history = History::default();
            history.append(1, birth);
            history.record(5, &[1.0], |w| w > 0.5);
            history.fold();
            assert_eq!(history.mri(), [mri]);
            assert_eq!(history.last_active(), [5]);
        }
    }
}
