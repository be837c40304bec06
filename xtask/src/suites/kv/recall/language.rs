//! The language of the recall tasks: pairs of a key and a value amid filler, and keys that ask for their value again.
//!
//! A query is a bare key; the value is the target at its position and is not shown, so that the pair itself is needed again and again.

use rand::seq::SliceRandom;
use rand::{Rng, seq::index};
use rand_chacha::ChaCha8Rng;

/// Begin of sequence.
pub(super) const BOS: u32 = 0;
/// Keys, and as many values.
pub(super) const KEYS: usize = 16;
/// Kinds of filler.
const FILLERS: u32 = 7;
/// Tokens of the language.
pub(super) const VOCABULARY: usize = 1 + 2 * KEYS + FILLERS as usize;

/// The token of a key.
pub(super) fn key(index: usize) -> u32 {
    1 + index as u32
}

/// The token of a value.
pub(super) fn value(index: usize) -> u32 {
    1 + (KEYS + index) as u32
}

/// The index of a value's token, if it is one.
pub(super) fn value_index(token: u32) -> Option<usize> {
    (token as usize)
        .checked_sub(1 + KEYS)
        .filter(|&index| index < KEYS)
}

fn filler(rng: &mut ChaCha8Rng) -> u32 {
    1 + 2 * KEYS as u32 + rng.random_range(0..FILLERS)
}

/// A sequence with its questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sample {
    /// Tokens; where a question was answered with a value whose key comes later, the true one.
    pub(super) tokens: Vec<u32>,
    /// Questions: position and the value that is right there, ascending.
    pub(super) questions: Vec<(usize, u32)>,
    /// Positions that hold the key of the answer to the question before; filled with the model's own answer when it runs.
    pub(super) follow: Vec<usize>,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Multi-query associative recall: every pair is asked for again and again after gaps.
    Mqar,
    /// One pair at some depth of filler, asked for at the end.
    Passkey,
    /// A string of values, after filler once more from its first value on.
    Copy,
    /// Chains of pairs followed hop by hop, with quiet gaps between hops; the model's answer is the next hop's key.
    Chain,
}

impl Kind {
    pub(super) const ALL: [Kind; 4] = [Kind::Mqar, Kind::Passkey, Kind::Copy, Kind::Chain];

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Mqar => "mqar",
            Kind::Passkey => "passkey",
            Kind::Copy => "copy",
            Kind::Chain => "chain",
        }
    }

    /// A line on what is asked.
    pub(super) fn about(self) -> &'static str {
        match self {
            Kind::Mqar => {
                "Multi-query associative recall: pairs come first and are asked for again and again, each at its own interval."
            }
            Kind::Passkey => "Passkey: one pair at some depth of filler, asked for at the end.",
            Kind::Copy => "Delayed copy: a string of values, and after filler once more.",
            Kind::Chain => {
                "Chains: pairs lead from key to key; hops are asked for with quiet gaps between them and go on from the model's own answer; \
                 a chain counts where all its hops are right."
            }
        }
    }

    /// A sequence of `length` tokens, of which the first `prompt` are BOS and filler.
    pub(super) fn sample(self, length: usize, prompt: usize, rng: &mut ChaCha8Rng) -> Sample {
        let mut sample = Sample {
            tokens: (0..length).map(|_| filler(rng)).collect(),
            questions: Vec::new(),
            follow: Vec::new(),
        };
        sample.tokens[0] = BOS;
        match self {
            Kind::Mqar => sample.mqar(prompt, rng),
            Kind::Passkey => sample.passkey(prompt, rng),
            Kind::Copy => sample.copy(prompt, rng),
            Kind::Chain => sample.chain(prompt, rng),
        }
        sample
    }
}

/// `count` different numbers below [`KEYS`].
fn some(count: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    index::sample(rng, KEYS, count).into_vec()
}

impl Sample {
    fn pair(&mut self, at: usize, from: usize, to: usize) {
        self.tokens[at] = key(from);
        self.tokens[at + 1] = value(to);
    }

    fn ask(&mut self, at: usize, from: usize, to: usize) {
        self.tokens[at] = key(from);
        self.questions.push((at, value(to)));
    }

    fn mqar(&mut self, start: usize, rng: &mut ChaCha8Rng) {
        let length = self.tokens.len();
        let pairs = ((length - start) / 8).clamp(1, 8);
        let (keys, values) = (some(pairs, rng), some(pairs, rng));
        for (i, (&k, &v)) in keys.iter().zip(&values).enumerate() {
            self.pair(start + 2 * i, k, v);
        }
        // Each key comes back at an interval of its own, from one that every window covers to half the sequence.
        let mut due: Vec<(usize, usize, usize)> = (0..pairs)
            .map(|i| {
                let interval = (length / 16).max(2) << rng.random_range(0..4);
                (
                    start + 2 * pairs + rng.random_range(0..interval),
                    interval,
                    i,
                )
            })
            .collect();
        for at in start + 2 * pairs..length {
            due.sort_unstable();
            let (when, interval, i) = due[0];
            if when <= at {
                self.ask(at, keys[i], values[i]);
                due[0].0 = at + interval;
            }
        }
    }

    fn passkey(&mut self, start: usize, rng: &mut ChaCha8Rng) {
        let last = self.tokens.len() - 1;
        let (k, v) = (rng.random_range(0..KEYS), rng.random_range(0..KEYS));
        self.pair(rng.random_range(start..last - 1), k, v);
        self.ask(last, k, v);
    }

    fn copy(&mut self, start: usize, rng: &mut ChaCha8Rng) {
        let length = self.tokens.len();
        let size = ((length - start) / 4).clamp(2, KEYS / 2);
        let string = some(size, rng);
        let again = rng.random_range(start + size..=length - size);
        for (i, &v) in string.iter().enumerate() {
            self.tokens[start + i] = value(v);
            self.tokens[again + i] = value(v);
            if i + 1 < size {
                self.questions.push((again + i, value(string[i + 1])));
            }
        }
    }

    fn chain(&mut self, start: usize, rng: &mut ChaCha8Rng) {
        let length = self.tokens.len();
        let hops = 3;
        let mut pairs = some(((length - start) / 8).clamp(hops + 1, KEYS / 2), rng);
        let chain = pairs[..=hops].to_vec();
        let mut steps: Vec<(usize, usize)> = chain.windows(2).map(|w| (w[0], w[1])).collect();
        // What does not belong to the chain leads elsewhere.
        let others = pairs.split_off(hops + 1);
        steps.extend(others.iter().map(|&k| (k, rng.random_range(0..KEYS))));
        steps.shuffle(rng);
        for (i, &(from, to)) in steps.iter().enumerate() {
            self.pair(start + 2 * i, from, to);
        }
        let first = start + 2 * steps.len();
        let mut at = index::sample(rng, length - first, hops).into_vec();
        at.sort_unstable();
        for (hop, at) in at.into_iter().enumerate() {
            self.ask(first + at, chain[hop], chain[hop + 1]);
            if hop > 0 {
                self.follow.push(first + at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn every_question_can_be_answered_from_what_stands_before_it() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for kind in Kind::ALL {
            for length in [32, 64, 128] {
                for _ in 0..50 {
                    let sample = kind.sample(length, 4, &mut rng);
                    assert_eq!((sample.tokens.len(), sample.tokens[0]), (length, BOS));
                    assert!(!sample.questions.is_empty(), "{kind:?} {length}");
                    assert!(sample.questions.is_sorted());
                    for &(at, answer) in &sample.questions {
                        let asked = sample.tokens[at];
                        let shown: Vec<u32> = (1..at)
                            .filter(|&i| sample.tokens[i - 1] == asked)
                            .map(|i| sample.tokens[i])
                            .filter(|&token| value_index(token).is_some())
                            .collect();
                        assert!(
                            !shown.is_empty() && shown.iter().all(|&v| v == answer),
                            "{kind:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_chain_goes_on_from_its_own_answers() {
        let sample = Kind::Chain.sample(64, 4, &mut ChaCha8Rng::seed_from_u64(1));
        for (hop, &at) in sample.follow.iter().enumerate() {
            let before = value_index(sample.questions[hop].1).unwrap();
            assert_eq!(sample.tokens[at], key(before));
        }
    }
}
