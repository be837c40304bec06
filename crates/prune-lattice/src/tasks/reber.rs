//! Reber strings (Reber 1967) and embedded ones (Fahlman 1991; Hochreiter and Schmidhuber 1997).

use super::{Dfa, Sizes, symbol_dataset};
use crate::{data::Dataset, error::Result};
use rand::Rng;

/// Symbols 0 to 6.
const ALPHABET: &str = "BTPSXVE";
const B: u32 = 0;
const T: u32 = 1;
const P: u32 = 2;
const S: u32 = 3;
const X: u32 = 4;
const V: u32 = 5;
const E: u32 = 6;
/// (state, symbol, next state); 7 accepts.
const ARCS: [(usize, u32, usize); 12] = [
    (0, B, 1),
    (1, T, 2),
    (1, P, 3),
    (2, S, 2),
    (2, X, 4),
    (3, T, 3),
    (3, V, 5),
    (4, X, 3),
    (4, S, 6),
    (5, P, 4),
    (5, V, 6),
    (6, E, 7),
];
const LENGTHS: std::ops::RangeInclusive<usize> = 8..=30;
const EMBEDDED_LENGTHS: std::ops::RangeInclusive<usize> = 5..=12;

/// The automaton of Reber's grammar over B, T, P, S, X, V, E = 0 to 6.
pub fn reber_automaton() -> Dfa {
    let mut next = vec![vec![8; 7]; 9];
    ARCS.iter()
        .for_each(|&(from, symbol, to)| next[from][symbol as usize] = to);
    Dfa {
        next,
        accept: (0..9).map(|s| s == 7).collect(),
    }
}

fn encode(text: &str) -> Option<Vec<u32>> {
    text.chars()
        .map(|c| ALPHABET.find(c).map(|k| k as u32))
        .collect()
}

/// Whether a text is a Reber string.
pub fn is_reber(text: &str) -> bool {
    encode(text).is_some_and(|s| reber_automaton().accepts(&s))
}

/// Whether a text is an embedded Reber string: `B x R x E` with x one of T and P and R a Reber string.
pub fn is_embedded_reber(text: &str) -> bool {
    encode(text).is_some_and(|s| match s.as_slice() {
        [B, first @ (T | P), inner @ .., last, E] => {
            first == last && reber_automaton().accepts(inner)
        }
        _ => false,
    })
}

/// A walk through the grammar with a fair coin at each branch, of a length in the range.
fn walk(lengths: &std::ops::RangeInclusive<usize>, rng: &mut impl Rng) -> Vec<u32> {
    loop {
        let (mut state, mut string) = (0, Vec::new());
        while state != 7 {
            let arcs = ARCS.iter().filter(|a| a.0 == state);
            let pick = rng.random_range(0..arcs.clone().count());
            if let Some(&(_, symbol, to)) = arcs.clone().nth(pick) {
                string.push(symbol);
                state = to;
            }
        }
        if lengths.contains(&string.len()) {
            return string;
        }
    }
}

pub(super) fn dataset(embedded: bool, sizes: Sizes, seed: u64) -> Result<Dataset> {
    let automaton = reber_automaton();
    symbol_dataset(
        if embedded { "embedded-reber" } else { "reber" },
        7,
        2,
        sizes,
        seed,
        |rng| {
            let valid = rng.random_bool(0.5);
            if embedded {
                // The invalid ones differ in the last branch symbol alone: only memory over the whole string tells.
                let first = if rng.random_bool(0.5) { T } else { P };
                let last = if valid { first } else { T + P - first };
                let mut string = vec![B, first];
                string.extend(walk(&EMBEDDED_LENGTHS, rng));
                string.extend([last, E]);
                return Ok((string, u32::from(valid)));
            }
            let mut string = walk(&LENGTHS, rng);
            while !valid && automaton.accepts(&string) {
                let at = rng.random_range(1..string.len() - 1);
                let old = string[at];
                string[at] = rng.random_range(0..7);
                if automaton.accepts(&string) {
                    string[at] = old;
                }
            }
            Ok((string, u32::from(valid)))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Examples, Targets};

    #[test]
    fn known_strings_are_accepted_or_refused() {
        for s in ["BTXSE", "BPVVE", "BTSSSXXTTVPSE", "BPTTTTVPXTVPSE"] {
            assert!(is_reber(s), "{s}");
        }
        for s in ["BTXE", "PVVE", "BTSXXTTTTVVEE", "BQVVE", ""] {
            assert!(!is_reber(s), "{s}");
        }
        assert!(is_embedded_reber("BTBPVVETE") && !is_embedded_reber("BTBPVVEPE"));
    }

    #[test]
    fn labels_of_the_data_set_are_those_of_the_automaton_and_balanced() {
        let sizes = Sizes {
            train: 400,
            valid: 10,
            test: 10,
        };
        for embedded in [false, true] {
            let Examples::Sequences(data) = dataset(embedded, sizes, 3).unwrap().train else {
                unreachable!()
            };
            let Targets::Classes(labels) = data.targets() else {
                unreachable!()
            };
            for (k, &label) in labels.iter().enumerate() {
                let text: String = data
                    .symbols(k)
                    .unwrap()
                    .iter()
                    .map(|&s| ALPHABET.as_bytes()[s as usize] as char)
                    .collect();
                let right = if embedded {
                    is_embedded_reber(&text)
                } else {
                    is_reber(&text)
                };
                assert_eq!(label == 1, right, "{text}");
            }
            let ones = labels.iter().sum::<u32>();
            assert!((150..250).contains(&ones));
        }
    }

    #[shared_data::needed("data/seq/reber_sequences.csv")]
    #[test]
    fn the_published_strings_have_the_labels_of_the_automaton() {
        let csv = shared_data::path!("data/seq/reber_sequences.csv");
        let csv = std::fs::read_to_string(csv).unwrap();
        let rows = csv.lines().skip(1).filter_map(|l| l.split_once(','));
        assert_eq!(
            rows.map(|(s, label)| assert_eq!(is_reber(s), label == "1", "{s}"))
                .count(),
            25_000
        );
    }
}
