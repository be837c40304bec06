//! Where llama.cpp would split a text otherwise than `tokenizer.json` says.
//!
//! A GGUF file has a vocabulary, merges or scores, and kinds of tokens. What else a `tokenizer.json` says of merging and of
//! added tokens has no place in it. Each function here is one such statement: it holds for what the file can say, or the
//! reason names the token that would be split otherwise.

use causal_lm::gguf::{STRIP_NOTHING, TokenKind};
use serde_json::Value as Json;
use std::collections::{HashMap, HashSet};

/// The reason why llama.cpp would split otherwise.
type Result<T> = std::result::Result<T, String>;

/// What a file has to say of added tokens.
pub(super) struct Added {
    /// Whether there are none.
    pub(super) is_empty: bool,
    /// Whether they take in the white space behind them, in the way that llama.cpp knows of Phi-3.
    pub(super) strip: bool,
}

impl Added {
    /// Reads `added_tokens`, which llama.cpp finds in a text as it stands.
    pub(super) fn read(tokenizer: &Json) -> Result<Self> {
        let all = tokenizer["added_tokens"].as_array();
        let all: Vec<&Json> = all.into_iter().flatten().collect();
        let is = |token: &Json, flag: &str| token[flag].as_bool() == Some(true);
        let text = |token: &Json| token["content"].as_str().unwrap_or_default().to_string();
        for token in &all {
            for (flag, meaning) in [
                ("single_word", "only where it is a word of its own"),
                ("lstrip", "with the white space before it"),
            ] {
                if is(token, flag) {
                    return Err(format!(
                        "the added token {:?} is found {meaning} ({flag}), and in llama.cpp wherever it stands",
                        text(token)
                    ));
                }
            }
            // Special tokens are found in templates, not in texts.
            let changed = changes(&tokenizer["normalizer"], &text(token));
            if is(token, "normalized") && !is(token, "special") && changed {
                return Err(format!(
                    "the added token {:?} is found in normalised text, and in llama.cpp in the text as it stands",
                    text(token)
                ));
            }
        }
        let strips = |token: &&&Json| is(token, "rstrip");
        let strip = all.iter().any(|token| strips(&token));
        let as_phi3 =
            |token: &&Json| is(token, "rstrip") != STRIP_NOTHING.contains(&text(token).as_str());
        if let Some(token) = all.iter().find(|token| strip && !as_phi3(token)) {
            return Err(format!(
                "some added tokens take in the white space behind them (rstrip), and {:?} does{}: llama.cpp knows this only of \
                 all tokens but {}",
                text(token),
                if is(token, "rstrip") { "" } else { " not" },
                STRIP_NOTHING.join(", ")
            ));
        }
        Ok(Self {
            is_empty: all.is_empty(),
            strip,
        })
    }
}

/// Whether a normalizer changes `text` or what stands around it.
fn changes(normalizer: &Json, text: &str) -> bool {
    let steps = match normalizer["normalizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![normalizer],
    };
    steps.iter().any(|step| match step["type"].as_str() {
        None => false,
        // Spaces are written otherwise in both, token and text.
        Some("Replace") => step["pattern"]["String"].as_str() != Some(" "),
        Some("NFC") => !text.is_ascii(),
        Some(_) => true,
    })
}

/// What a BPE model may say beside its vocabulary and merges.
pub(super) fn plain_model(model: &Json) -> Result<()> {
    for field in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if let Some(text) = model[field].as_str().filter(|text| !text.is_empty()) {
            return Err(format!(
                "llama.cpp's BPE has no {field}, and this has {text:?}"
            ));
        }
    }
    match model["dropout"].as_f64() {
        Some(share) if share > 0.0 => Err(format!(
            "{share} of the merges are left out at random (dropout), in llama.cpp none"
        )),
        _ => Ok(()),
    }
}

/// The entries of a vocabulary that merges may make.
pub(super) struct Entries<'a> {
    /// Those of several characters.
    long: Vec<&'a str>,
    all: HashSet<&'a str>,
    ranks: HashMap<(&'a str, &'a str), usize>,
    merges: &'a [(String, String)],
}

impl<'a> Entries<'a> {
    pub(super) fn new(
        tokens: &'a [String],
        kinds: &[TokenKind],
        merges: &'a [(String, String)],
    ) -> Self {
        let entries = tokens.iter().zip(kinds);
        let normal = entries.filter(|(_, kind)| **kind == TokenKind::Normal);
        let all: HashSet<&str> = normal.map(|(token, _)| token.as_str()).collect();
        // In the order of the vocabulary, so that a reason names the first.
        let long = tokens.iter().map(String::as_str);
        let is_long = |token: &&str| all.contains(token) && token.chars().nth(1).is_some();
        let mut ranks = HashMap::new();
        for (rank, (a, b)) in merges.iter().enumerate() {
            ranks.entry((a.as_str(), b.as_str())).or_insert(rank);
        }
        Self {
            long: long.filter(is_long).collect(),
            all,
            ranks,
            merges,
        }
    }

    /// That merging makes every entry of its own text, so that it is the same whether whole pieces are looked up first.
    pub(super) fn are_made(&self) -> Result<()> {
        match self.long.iter().find(|entry| !self.makes(entry)) {
            None => Ok(()),
            Some(entry) => Err(format!(
                "no merges make the entry {entry:?}: it is found before merging (ignore_merges), and in llama.cpp never"
            )),
        }
    }

    /// Whether merging the characters of `entry` leaves one token.
    fn makes(&self, entry: &str) -> bool {
        // Ends of the parts.
        let mut ends: Vec<usize> = entry.char_indices().map(|(at, _)| at).skip(1).collect();
        ends.push(entry.len());
        while ends.len() > 1 {
            let start = |part: usize| if part == 0 { 0 } else { ends[part - 1] };
            let pair = |left: usize| {
                let (a, b) = (
                    &entry[start(left)..ends[left]],
                    &entry[ends[left]..ends[left + 1]],
                );
                Some((*self.ranks.get(&(a, b))?, left))
            };
            match (0..ends.len() - 1).filter_map(pair).min() {
                Some((_, left)) => ends.remove(left),
                None => return false,
            };
        }
        true
    }

    /// That merging by the score of the result is merging by pairs: llama.cpp joins two neighbours wherever the vocabulary
    /// has their text, the best result first.
    pub(super) fn merge_by_score(&self) -> Result<()> {
        for entry in &self.long {
            for (at, _) in entry.char_indices().skip(1) {
                let (a, b) = entry.split_at(at);
                let neighbours = self.all.contains(a) && self.all.contains(b);
                if neighbours && !self.ranks.contains_key(&(a, b)) {
                    return Err(format!(
                        "no merge joins {a:?} and {b:?} to the entry {entry:?}, and llama.cpp joins whatever makes an entry"
                    ));
                }
            }
        }
        let mut seen: HashSet<String> = HashSet::new();
        let mut last = String::new();
        for (a, b) in self.merges {
            let result = format!("{a}{b}");
            if result != last && self.all.contains(result.as_str()) {
                if !seen.insert(result.clone()) {
                    return Err(format!(
                        "the merge of {a:?} and {b:?} ranks below one that makes {last:?}, another of the same result above: \
                         llama.cpp gives all merges of one result one rank"
                    ));
                }
                last = result;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| text.to_string()).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        let pair = |(a, b): &(&str, &str)| (a.to_string(), b.to_string());
        list.iter().map(pair).collect()
    }

    #[test]
    fn entries_that_merges_by_pair_and_by_score_make_differently_are_named() {
        let check = |tokens: &[&str], merges: &[(&str, &str)]| {
            let (tokens, merges) = (texts(tokens), pairs(merges));
            let kinds = vec![TokenKind::Normal; tokens.len()];
            Entries::new(&tokens, &kinds, &merges).merge_by_score()
        };
        let tokens = ["a", "b", "c", "ab", "bc", "abc"];
        let all = [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")];
        check(&tokens, &all).unwrap();
        let missing = check(&tokens, &all[..3]).unwrap_err();
        assert!(missing.contains("\"ab\" and \"c\""), "{missing}");
        let never = check(&["x", "y", "xy"], &[]).unwrap_err();
        assert!(never.contains("\"xy\""), "{never}");
        // An entry that its own characters are not enough for is never made by either.
        check(&["x", "xyz"], &[]).unwrap();
        let mixed = [("b", "c"), ("a", "bc"), ("a", "b"), ("ab", "c")];
        let mixed = check(&tokens, &mixed).unwrap_err();
        assert!(mixed.contains("one rank"), "{mixed}");
    }

    #[test]
    fn an_entry_is_made_if_its_own_characters_merge_to_it() {
        let tokens = texts(&["a", "b", "c", "ab", "bc", "abc"]);
        let kinds = vec![TokenKind::Normal; tokens.len()];
        let made = |merges: &[(&str, &str)]| {
            let merges = pairs(merges);
            Entries::new(&tokens, &kinds, &merges).are_made()
        };
        made(&[("b", "c"), ("a", "bc"), ("a", "b")]).unwrap();
        // bc is joined first, and nothing joins a to it.
        let reason = made(&[("b", "c"), ("a", "b"), ("ab", "c")]).unwrap_err();
        assert!(reason.contains("\"abc\""), "{reason}");
    }

    #[test]
    fn flags_of_added_tokens_are_refused_where_they_change_what_is_found() {
        let read = |flags: Json, normalizer: Json| {
            let mut token = json!({"id": 0, "content": "<tool>", "special": false});
            for (flag, value) in flags.as_object().unwrap() {
                token[flag] = value.clone();
            }
            let found = Added::read(&json!({"added_tokens": [token], "normalizer": normalizer}));
            found.map(|added| added.strip)
        };
        let prepend =
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]});
        for flag in ["single_word", "lstrip"] {
            let reason = read(json!({flag: true}), Json::Null).unwrap_err();
            assert!(
                reason.contains("<tool>") && reason.contains(flag),
                "{reason}"
            );
        }
        let normalized = json!({"normalized": true});
        let reason = read(normalized.clone(), prepend.clone()).unwrap_err();
        assert!(reason.contains("normalised"), "{reason}");
        assert_eq!(read(normalized.clone(), Json::Null), Ok(false));
        assert_eq!(read(normalized.clone(), json!({"type": "NFC"})), Ok(false));
        let special = json!({"normalized": true, "special": true});
        assert_eq!(read(special, prepend), Ok(false));
        assert_eq!(read(json!({"rstrip": true}), Json::Null), Ok(true));
        let accented = json!({"normalized": true, "content": "é"});
        assert!(read(accented, json!({"type": "NFC"})).is_err());
        let some = json!([
            {"content": "<s>", "rstrip": false}, {"content": "<a>", "rstrip": true}, {"content": "<b>", "rstrip": false},
        ]);
        let reason = Added::read(&json!({"added_tokens": some})).err().unwrap();
        assert!(reason.contains("\"<b>\" does not"), "{reason}");
    }

    #[test]
    fn options_of_a_model_that_files_have_no_place_for_are_named() {
        for (field, value) in [
            ("continuing_subword_prefix", json!("##")),
            ("end_of_word_suffix", json!("</w>")),
            ("dropout", json!(0.1)),
        ] {
            let reason = plain_model(&json!({field: value})).unwrap_err();
            assert!(reason.contains(field), "{reason}");
        }
        plain_model(&json!({"continuing_subword_prefix": "", "dropout": null})).unwrap();
    }
}
