//! Deterministic finite automata: counting modulo k and Tomita's seven languages (1982), sampled uniformly per length.

use super::{Sizes, symbol_dataset};
use crate::{
    data::Dataset,
    error::{Error, Result},
};
use rand::Rng;

/// A complete automaton; state 0 is the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dfa {
    /// `next[state][symbol]`
    pub next: Vec<Vec<usize>>,
    /// Whether a state accepts.
    pub accept: Vec<bool>,
}

impl Dfa {
    /// Whether it accepts a string.
    pub fn accepts(&self, string: &[u32]) -> bool {
        self.accept[string
            .iter()
            .fold(0, |state, &s| self.next[state][s as usize])]
    }

    /// A string of that length drawn uniformly among the accepted ones, or among the others; `None` when there is none.
    pub fn sample(&self, length: usize, accepted: bool, rng: &mut impl Rng) -> Option<Vec<u32>> {
        // ways[k][state]: how many of the strings of length k lead from there to the verdict asked for. f64: counts grow as
        // 2^length and only their ratios matter.
        let mut ways = vec![
            self.accept
                .iter()
                .map(|&a| f64::from(u8::from(a == accepted)))
                .collect::<Vec<f64>>(),
        ];
        for k in 0..length {
            let row = self
                .next
                .iter()
                .map(|to| to.iter().map(|&t| ways[k][t]).sum())
                .collect();
            ways.push(row);
        }
        if ways[length][0] == 0.0 {
            return None;
        }
        let mut state = 0;
        let string = (0..length)
            .rev()
            .map(|left| {
                let to = &self.next[state];
                let mut draw = rng.random::<f64>() * to.iter().map(|&t| ways[left][t]).sum::<f64>();
                let mut symbol = None;
                for (s, &t) in to.iter().enumerate().filter(|(_, t)| ways[left][**t] > 0.0) {
                    symbol = Some(s);
                    draw -= ways[left][t];
                    if draw < 0.0 {
                        break;
                    }
                }
                let symbol =
                    symbol.expect("a state on a path to the verdict has a successor on it");
                state = to[symbol];
                symbol as u32
            })
            .collect();
        Some(string)
    }
}

/// Tomita's language `k` in 1..=7 over {0, 1}.
pub fn tomita(k: u8) -> Option<Dfa> {
    let dfa = |next: &[[usize; 2]], accept: &[usize]| {
        Some(Dfa {
            next: next.iter().map(|n| n.to_vec()).collect(),
            accept: (0..next.len()).map(|s| accept.contains(&s)).collect(),
        })
    };
    match k {
        // 1*
        1 => dfa(&[[1, 0], [1, 1]], &[0]),
        // (10)*
        2 => dfa(&[[2, 1], [0, 2], [2, 2]], &[0]),
        // No odd run of ones followed by an odd run of zeros.
        3 => dfa(&[[0, 1], [2, 0], [3, 4], [2, 1], [4, 4]], &[0, 1, 3]),
        // No 000.
        4 => dfa(&[[1, 0], [2, 0], [3, 0], [3, 3]], &[0, 1, 2]),
        // An even number of zeros and of ones.
        5 => dfa(&[[1, 2], [0, 3], [3, 0], [2, 1]], &[0]),
        // As many ones as zeros modulo 3.
        6 => dfa(&[[2, 1], [0, 2], [1, 0]], &[0]),
        // 0*1*0*1*
        7 => dfa(&[[0, 1], [2, 1], [2, 3], [4, 3], [4, 4]], &[0, 1, 2, 3]),
        _ => None,
    }
}

const LENGTHS: std::ops::RangeInclusive<usize> = 2..=12;
const TOMITA_LENGTHS: std::ops::RangeInclusive<usize> = 2..=16;

/// Ones modulo `k`, over lengths 2 to 12.
pub(super) fn counting(k: u32, sizes: Sizes, seed: u64) -> Result<Dataset> {
    if k < 2 {
        return Err(Error::Setting {
            setting: "task",
            reason: format!("counting modulo {k}"),
        });
    }
    symbol_dataset("counting", 2, k as usize, sizes, seed, |rng| {
        let n = rng.random_range(LENGTHS);
        let string: Vec<u32> = (0..n).map(|_| rng.random_range(0..2)).collect();
        let label = string.iter().sum::<u32>() % k;
        Ok((string, label))
    })
}

pub(super) fn tomita_dataset(k: u8, sizes: Sizes, seed: u64) -> Result<Dataset> {
    let dfa = tomita(k).ok_or_else(|| Error::Setting {
        setting: "task",
        reason: format!("there is no Tomita language {k}"),
    })?;
    symbol_dataset("tomita", 2, 2, sizes, seed, |rng| {
        let accepted = rng.random_bool(0.5);
        // Some lengths have no string of the verdict asked for; every language has one among all lengths.
        loop {
            let length = rng.random_range(TOMITA_LENGTHS);
            if let Some(string) = dfa.sample(length, accepted, rng) {
                return Ok((string, u32::from(accepted)));
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed;

    /// The languages by their definitions in words.
    fn member(k: u8, s: &[u32]) -> bool {
        let text: String = s.iter().map(|&b| if b == 1 { '1' } else { '0' }).collect();
        let ones = s.iter().filter(|&&b| b == 1).count();
        let zeros = s.len() - ones;
        match k {
            1 => zeros == 0,
            2 => s.len().is_multiple_of(2) && s.chunks(2).all(|p| p == [1, 0]),
            3 => {
                let runs: Vec<&[u32]> = s.chunk_by(|a, b| a == b).collect();
                !runs
                    .windows(2)
                    .any(|w| w[0][0] == 1 && w[0].len() % 2 == 1 && w[1].len() % 2 == 1)
            }
            4 => !text.contains("000"),
            5 => ones.is_multiple_of(2) && zeros.is_multiple_of(2),
            6 => (ones + 2 * zeros).is_multiple_of(3),
            _ => s.chunk_by(|a, b| a == b).count() + usize::from(s.first() == Some(&1)) <= 4,
        }
    }

    #[test]
    fn tomita_automata_agree_with_their_definitions_on_all_strings_up_to_12() {
        for k in 1..=7 {
            let dfa = tomita(k).unwrap();
            for n in 0..=12 {
                for bits in 0..1u32 << n {
                    let s: Vec<u32> = (0..n).map(|i| bits >> i & 1).collect();
                    assert_eq!(dfa.accepts(&s), member(k, &s), "tomita{k} {s:?}");
                }
            }
        }
        assert!(tomita(0).is_none() && tomita(8).is_none());
    }

    #[test]
    fn sampling_is_uniform_over_the_strings_of_a_verdict() {
        let (dfa, mut rng) = (tomita(4).unwrap(), seed::rng(1, "dfa"));
        let mut seen = std::collections::BTreeMap::new();
        for _ in 0..13_000 {
            let s = dfa.sample(4, true, &mut rng).unwrap();
            assert!(dfa.accepts(&s));
            *seen.entry(s).or_insert(0) += 1;
        }
        // 13 of the 16 strings of length 4 have no 000.
        assert_eq!(seen.len(), 13);
        assert!(seen.values().all(|&c| (850..1150).contains(&c)), "{seen:?}");
        assert!(tomita(2).unwrap().sample(3, true, &mut rng).is_none());
    }
}
