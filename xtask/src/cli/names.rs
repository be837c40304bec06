//! Names and paths as users type them: the nearest known name where one is unknown, and paths with commas in lists.

use std::ffi::OsStr;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, Command, Error};

/// Parses a name; an error says which name, made of `words`, is the nearest that can be parsed.
pub(super) fn parse<T>(text: &str, words: &[&str]) -> Result<T, String>
where
    T: FromStr,
    T::Err: Display,
{
    text.parse().map_err(|error: T::Err| {
        let near = nearest(text, words).filter(|near| near.parse::<T>().is_ok());
        match near {
            None => error.to_string(),
            Some(near) => format!("{error}\n\n  tip: a similar value exists: '{near}'"),
        }
    })
}

/// The nearest of `words`, where a text is near to one.
pub(super) fn near(text: &str, words: &[&str]) -> Option<String> {
    nearest(text, words).filter(|near| words.contains(&near.as_str()))
}

/// One of some names, which help texts list; an error says the nearest of them, whatever its case.
#[derive(Clone)]
pub(super) struct Known {
    names: Vec<&'static str>,
    parser: PossibleValuesParser,
}

impl Known {
    pub(super) fn new(names: impl IntoIterator<Item = &'static str>) -> Self {
        let names: Vec<&str> = names.into_iter().collect();
        Self {
            parser: PossibleValuesParser::new(names.iter().copied()),
            names,
        }
    }
}

impl TypedValueParser for Known {
    type Value = String;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<String, Error> {
        let parsed = self.parser.parse_ref(command, arg, value);
        parsed.map_err(|mut error| {
            let near = value.to_str().and_then(|text| similar(text, &self.names));
            if let Some(near) = near {
                let near = ContextValue::String(near.into());
                error.insert(ContextKind::SuggestedValue, near);
            }
            error
        })
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        self.parser.possible_values()
    }
}

/// The words of a list as help texts show it.
pub(super) fn words(list: &str) -> Vec<&str> {
    list.split(", ").collect()
}

/// The text with every unknown word replaced by a similar one; the whole text counts as a word too.
fn nearest(text: &str, words: &[&str]) -> Option<String> {
    if let Some(word) = similar(text, words) {
        return Some(word.to_string());
    }
    let mut near = String::new();
    for part in text.split_inclusive(['-', '+']) {
        let word = part.trim_end_matches(['-', '+']);
        let known = words.contains(&word) || word.chars().any(|c| c.is_ascii_digit());
        let similar = similar(word, words).filter(|_| !words.contains(&word));
        near += match (similar, known) {
            (Some(similar), _) => similar,
            (None, true) => word,
            (None, false) => return None,
        };
        near += &part[word.len()..];
    }
    Some(near)
}

/// The word of fewest edits, where these are few for its length; case is none.
fn similar<'w>(text: &str, words: &[&'w str]) -> Option<&'w str> {
    let lower = text.to_lowercase();
    let edits = words.iter().map(|word| (edits(&lower, word), *word));
    let (edits, word) = edits.min_by_key(|(edits, _)| *edits)?;
    (word != text && 3 * edits <= word.chars().count().max(3)).then_some(word)
}

/// Characters to insert, delete, replace or exchange with their neighbour.
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            table[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = table[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let least = replaced.min(table[i - 1][j] + 1).min(table[i][j - 1] + 1);
                let exchanged = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                match exchanged {
                    true => least.min(table[i - 2][j - 2] + 1),
                    false => least,
                }
            };
        }
    }
    table[a.len()][b.len()]
}

/// The paths of a list that was split at commas: parts that are a path only together are put together again.
pub(super) fn paths(parts: Vec<PathBuf>) -> Vec<PathBuf> {
    let texts: Option<Vec<&str>> = parts.iter().map(|part| part.to_str()).collect();
    match texts {
        Some(texts) => joined(&texts, |text| Path::new(text).exists())
            .into_iter()
            .map(PathBuf::from)
            .collect(),
        None => parts,
    }
}

/// The items of a list that was split at commas, the longest that `exists` first.
pub(super) fn joined(parts: &[&str], exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut items = Vec::new();
    let mut rest = parts;
    while !rest.is_empty() {
        let together = |count: &usize| exists(&rest[..*count].join(","));
        let count = (2..=rest.len()).rev().find(together).unwrap_or(1);
        items.push(rest[..count].join(","));
        rest = &rest[count..];
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_one_that_can_be_parsed() {
        let words = ["gptq", "rtn", "int3", "sym", "wanda"];
        assert_eq!(nearest("gtpq-int3", &words).as_deref(), Some("gptq-int3"));
        assert_eq!(
            nearest("wanda-2:4+rtm-int3-smy", &words).as_deref(),
            Some("wanda-2:4+rtn-int3-sym")
        );
        assert_eq!(nearest("GPTQ-Int3", &words).as_deref(), Some("gptq-int3"));
        assert_eq!(nearest("something", &words), None);
        let error = parse::<u32>("12x", &["120", "7"]).unwrap_err();
        assert!(error.ends_with("exists: '120'"), "{error}");
        let error = parse::<u32>("word", &["work"]).unwrap_err();
        assert!(!error.contains("tip"), "{error}");
    }

    #[test]
    fn edits_are_counted_as_by_hand() {
        for (a, b, count) in [
            ("", "abc", 3),
            ("rebr", "reber", 1),
            ("gtpq", "gptq", 1),
            ("abcd", "badc", 2),
            ("x", "x", 0),
        ] {
            assert_eq!(edits(a, b), count, "{a} {b}");
            assert_eq!(edits(b, a), count, "{b} {a}");
        }
    }

    #[test]
    fn parts_that_are_a_path_together_are_one() {
        let there = ["a,b", "c", "d,e,f"];
        let exists = |text: &str| there.contains(&text);
        assert_eq!(joined(&["a", "b", "c"], exists), ["a,b", "c"]);
        assert_eq!(
            joined(&["c", "d", "e", "f", "g"], exists),
            ["c", "d,e,f", "g"]
        );
        assert_eq!(joined(&["x", "y"], exists), ["x", "y"]);
    }
}
