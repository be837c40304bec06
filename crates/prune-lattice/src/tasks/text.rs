//! Next-character prediction: on sentences of an own grammar, and on text files.

use super::{Sizes, splits};
use crate::{
    data::{Dataset, Examples},
    error::{Error, Result},
    rnn::InputKind,
};
use rand::{Rng, seq::IndexedRandom};
use std::{collections::BTreeMap, path::Path};

/// Characters and their numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    numbers: BTreeMap<char, u32>,
}

impl Vocabulary {
    /// The characters of a text, numbered in ascending order.
    pub fn of(text: &str) -> Self {
        let mut chars: Vec<char> = text.chars().collect();
        chars.sort_unstable();
        chars.dedup();
        Self {
            numbers: chars.into_iter().zip(0..).collect(),
        }
    }

    /// From a JSON object character → number, as stands beside character models.
    ///
    /// # Errors
    /// The file cannot be read, or is no such object, or the numbers are not 0 to n - 1.
    pub fn load(file: &Path) -> Result<Self> {
        let text = read_text(file)?;
        let wrong = |reason: String| Error::Data {
            file: file.into(),
            reason,
        };
        let numbers: BTreeMap<char, u32> =
            serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        let mut used: Vec<u32> = numbers.values().copied().collect();
        used.sort_unstable();
        if !used.iter().copied().eq(0..numbers.len() as u32) {
            return Err(wrong(format!(
                "the numbers of {} characters are not 0 to {}",
                numbers.len(),
                numbers.len() - 1
            )));
        }
        Ok(Self { numbers })
    }

    /// Number of characters.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// The numbers of a text's characters.
    ///
    /// # Errors
    /// A character is not in the vocabulary.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        text.chars()
            .map(|c| {
                self.numbers
                    .get(&c)
                    .copied()
                    .ok_or_else(|| Error::UnknownName {
                        kind: "character",
                        name: c.to_string(),
                        expected: format!("the {} characters of the vocabulary", self.len()),
                    })
            })
            .collect()
    }
}

/// A file of text, as all tasks and vocabularies read it: without the byte-order mark that some editors put before UTF-8.
///
/// # Errors
/// [`Error::Io`] for a file that cannot be read or is not UTF-8.
pub fn read_text(file: &Path) -> Result<String> {
    tensor_io::read_text(file).map_err(|source| Error::Io {
        file: file.into(),
        source,
    })
}

/// Shares of a text for training and validation; the rest is the test split.
const TRAIN: f64 = 0.90;
const VALID: f64 = 0.05;

/// Training, validation and test parts of a sequence of characters.
pub(crate) fn cut(mut symbols: Vec<u32>) -> [Vec<u32>; 3] {
    let at = |share: f64| (symbols.len() as f64 * share) as usize;
    let (valid, test) = (at(TRAIN), at(TRAIN + VALID));
    let test_part = symbols.split_off(test);
    let valid_part = symbols.split_off(valid);
    [symbols, valid_part, test_part]
}

pub(super) fn file_dataset(file: &Path) -> Result<Dataset> {
    let text = read_text(file)?;
    let vocabulary = Vocabulary::of(&text);
    let [train, valid, test] = cut(vocabulary.encode(&text)?).map(Examples::Text);
    if matches!(&valid, Examples::Text(t) if t.len() < 2) {
        return Err(Error::Data {
            file: file.into(),
            reason: "too short to be cut into three splits".into(),
        });
    }
    let vocab = vocabulary.len();
    Ok(Dataset {
        train,
        valid,
        test,
        input: InputKind::OneHot { vocab },
        outputs: vocab,
    })
}

const SINGULAR: [&str; 6] = [
    "the cat",
    "a dog",
    "the king",
    "one bird",
    "this girl",
    "that boy",
];
const PLURAL: [&str; 6] = [
    "the cats",
    "two dogs",
    "the kings",
    "many birds",
    "these girls",
    "those boys",
];
const VERBS: [&str; 6] = ["see", "like", "fear", "follow", "call", "know"];

/// Sentences with agreement over a distance and nested brackets, at least `length` characters cut to that length.
pub fn grammar_text(length: usize, rng: &mut impl Rng) -> String {
    let mut text = String::new();
    while text.len() < length {
        sentence(&mut text, 0, rng);
        text.push_str(". ");
    }
    text.truncate(length);
    text
}

fn pick<'a>(words: &[&'a str], rng: &mut impl Rng) -> &'a str {
    words.choose(rng).copied().unwrap_or_default()
}

fn sentence(text: &mut String, depth: usize, rng: &mut impl Rng) {
    let plural = rng.random_bool(0.5);
    text.push_str(pick(if plural { &PLURAL } else { &SINGULAR }, rng));
    // An aside between subject and verb, in brackets whose kind alternates with depth.
    if depth < 3 && rng.random_bool(0.35) {
        let (open, close) = if depth.is_multiple_of(2) {
            (" (", ")")
        } else {
            (" [", "]")
        };
        text.push_str(open);
        sentence(text, depth + 1, rng);
        text.push_str(close);
    }
    text.push(' ');
    text.push_str(pick(&VERBS, rng));
    text.push_str(if plural { " " } else { "s " });
    text.push_str(pick(
        if rng.random_bool(0.5) {
            &PLURAL
        } else {
            &SINGULAR
        },
        rng,
    ));
}

pub(super) fn grammar_dataset(sizes: Sizes, seed: u64) -> Result<Dataset> {
    let alphabet: String = SINGULAR
        .iter()
        .chain(&PLURAL)
        .chain(&VERBS)
        .copied()
        .collect::<String>()
        + " .()[]s";
    let vocabulary = Vocabulary::of(&alphabet);
    let [train, valid, test] = splits("char-grammar", sizes, seed, |size, rng| {
        Ok(Examples::Text(vocabulary.encode(&grammar_text(size, rng))?))
    })?;
    let vocab = vocabulary.len();
    Ok(Dataset {
        train,
        valid,
        test,
        input: InputKind::OneHot { vocab },
        outputs: vocab,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_no_character() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let text = "ab".repeat(100);
        let marked = file_dataset(&write("marked", &format!("\u{feff}{text}"))).unwrap();
        let plain = file_dataset(&write("plain", &text)).unwrap();
        assert_eq!(marked.outputs, 2);
        assert_eq!(format!("{marked:?}"), format!("{plain:?}"));
        let vocabulary = Vocabulary::load(&write("vocab", "\u{feff}{\"a\": 0}")).unwrap();
        assert_eq!(vocabulary, Vocabulary::of("a"));
    }
}
