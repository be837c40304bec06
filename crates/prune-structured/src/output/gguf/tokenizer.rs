//! The vocabulary of a GGUF file, from `tokenizer.json`.
//!
//! llama.cpp has its own tokenizers. Two kinds of `tokenizer.json` correspond to one exactly enough:
//!
//! - byte-level BPE (`gpt2`), when its pre-tokenizer is one that llama.cpp knows by name: GPT-2's,
//!   SmolLM's, Llama 3's or Qwen2's;
//! - SentencePiece-like BPE with byte fallback (`llama`). llama.cpp merges by the score of the result,
//!   so that a token's score is minus the rank of the first merge that makes it.
//!
//! Everything else (Unigram, WordPiece, other pre-tokenizers) is an error: a model that splits text
//! otherwise than in training would be silently worse. So are vocabularies that llama.cpp would merge otherwise, and added
//! tokens that it would find elsewhere ([`splits`](super::splits)).

use super::splits;
use crate::{Error, Result};
use causal_lm::gguf::{GgufTensors, TokenKind, strips_behind_tokens};
use causal_lm::{Decoder, TextTokenizer};
use serde_json::Value as Json;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tensor_io::gguf::{Metadata, Value};

/// GPT-4's pattern with up to three digits together, as Llama 3 uses it.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits, as Qwen2 and Qwen3 use it.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A `tokenizer.json` and what it is read for.
struct File<'a> {
    path: PathBuf,
    json: Json,
    decoder: &'a Decoder<'a>,
}

/// The `tokenizer.*` keys, and the `general.name` of the file: `name`, or another where that would change how llama.cpp
/// finds tokens.
pub(super) fn metadata(
    decoder: &Decoder<'_>,
    name: String,
) -> Result<(String, Vec<(String, Value)>)> {
    if let Some(source) = decoder.checkpoint().source()
        && let Some(tensors) = source.as_any().downcast_ref::<GgufTensors>()
    {
        let metadata = tensors.file().metadata();
        let own = metadata.get_str("general.name")?.map(String::from);
        return Ok((own.unwrap_or(name), stored(&metadata)?));
    }
    let dir = decoder.checkpoint().dir();
    let path = dir.join("tokenizer.json");
    let json = read_json(&path)?;
    let file = File {
        path,
        json,
        decoder,
    };
    let added = splits::Added::read(&file.json).map_err(|reason| file.error(reason))?;
    let name = match (added.strip, strips_behind_tokens(&name)) {
        (true, false) => format!("{name} (phi-3)"),
        (false, true) if !added.is_empty => "model".into(),
        _ => name,
    };
    let mut values = file.vocabulary()?;
    let config = decoder.config();
    let tokenizer = TextTokenizer::open(dir)?;
    let byte_fallback = file.byte_fallback();
    let mut add = |key: &str, value| values.push((format!("tokenizer.ggml.{key}"), value));
    match tokenizer.bos() {
        Some(bos) => add("bos_token_id", Value::U32(bos)),
        // Of such a vocabulary readers take token 1 where the key is left out.
        None if byte_fallback => add("bos_token_id", Value::U32(u32::MAX)),
        None => {}
    }
    if let Some(&eos) = config.eos.first() {
        add("eos_token_id", Value::U32(eos));
    }
    add("add_bos_token", Value::Bool(tokenizer.adds_bos()));
    add("add_eos_token", Value::Bool(false));
    values.extend(chat_templates(&tokenizer));
    Ok((name, values))
}

/// The chat templates: one without a name, others by names in which llama.cpp's converter admits letters and digits.
fn chat_templates(tokenizer: &TextTokenizer) -> Vec<(String, Value)> {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let (mut values, mut names) = (Vec::new(), Vec::new());
    for (name, template) in tokenizer.chat_templates() {
        let key = match tokenizer.chat_template() == Some(template) && name == "default" {
            true => "tokenizer.chat_template".to_string(),
            false => {
                names.push(name.chars().map(plain).collect::<String>());
                format!("tokenizer.chat_template.{}", names[names.len() - 1])
            }
        };
        values.push((key, Value::String(template.into())));
    }
    if !names.is_empty() {
        values.push(("tokenizer.chat_templates".into(), names.into()));
    }
    values
}

/// The keys of a GGUF file.
fn stored(metadata: &Metadata<'_>) -> Result<Vec<(String, Value)>> {
    let mut values = Vec::new();
    for key in metadata.keys().filter(|key| key.starts_with("tokenizer.")) {
        values.extend(metadata.get(key)?.map(|value| (key.to_string(), value)));
    }
    Ok(values)
}

fn read_json(path: &Path) -> Result<Json> {
    let error = |reason: String| Error::ExportFile {
        path: path.into(),
        reason,
    };
    let bytes = std::fs::read(path).map_err(|e| error(e.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|e| error(e.to_string()))
}

impl File<'_> {
    fn error(&self, reason: impl Into<String>) -> Error {
        Error::ExportFile {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    /// Whether it falls back to bytes, as SentencePiece does.
    fn byte_fallback(&self) -> bool {
        let model = &self.json["model"];
        model["byte_fallback"].as_bool().unwrap_or(false)
    }

    fn vocabulary(&self) -> Result<Vec<(String, Value)>> {
        let model = &self.json["model"];
        // Old files leave the type out.
        if !matches!(model["type"].as_str(), None | Some("BPE")) {
            let found = &model["type"];
            return Err(self.error(format!("a GGUF vocabulary can be made of BPE, not {found}")));
        }
        splits::plain_model(model).map_err(|reason| self.error(reason))?;
        let merges = self.merges()?;
        let byte_fallback = self.byte_fallback();
        let (tokens, kinds) = self.tokens(byte_fallback)?;
        let mut values: Vec<(&str, Value)> = Vec::new();
        let ignore_merges = model["ignore_merges"].as_bool() == Some(true);
        let entries = splits::Entries::new(&tokens, &kinds, &merges);
        if byte_fallback {
            let entries = match ignore_merges {
                true => entries.are_made().and_then(|()| entries.merge_by_score()),
                false => entries.merge_by_score(),
            };
            entries.map_err(|reason| self.error(reason))?;
            let add_space = self.prepends_space()?;
            let scores = scores(&tokens, &kinds, &merges);
            values.push(("model", Value::String("llama".into())));
            values.push(("pre", Value::String("default".into())));
            values.push(("tokens", tokens.clone().into()));
            values.push(("scores", scores.into()));
            values.push(("add_space_prefix", Value::Bool(add_space)));
        } else {
            let pre = match (self.pre_tokenizer()?, ignore_merges) {
                // The same expression, without whole pieces before merges.
                ("llama-bpe", false) => "smaug-bpe",
                ("llama-bpe", true) => "llama-bpe",
                (pre, true) => {
                    entries.are_made().map_err(|reason| self.error(reason))?;
                    pre
                }
                (pre, false) => pre,
            };
            let merges: Vec<String> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
            values.push(("model", Value::String("gpt2".into())));
            values.push(("pre", Value::String(pre.into())));
            values.push(("tokens", tokens.clone().into()));
            values.push(("merges", merges.into()));
        }
        let kinds: Vec<i32> = kinds.iter().map(|&kind| kind as i32).collect();
        values.push(("token_type", kinds.into()));
        let unknown = model["unk_token"].as_str();
        if let Some(id) = unknown.and_then(|unk| tokens.iter().position(|t| t == unk)) {
            values.push(("unknown_token_id", Value::U32(id as u32)));
        }
        let key = |(key, value): (&str, Value)| (format!("tokenizer.ggml.{key}"), value);
        Ok(values.into_iter().map(key).collect())
    }

    /// Pairs in their order; written as lists or, by older versions, as strings with a space.
    fn merges(&self) -> Result<Vec<(String, String)>> {
        let merges = self.json["model"]["merges"].as_array();
        let merges = merges.ok_or_else(|| self.error("model.merges must be a list"))?;
        let pair = |merge: &Json| {
            let (a, b) = match merge {
                Json::String(pair) => pair.split_once(' ')?,
                pair => (pair[0].as_str()?, pair[1].as_str()?),
            };
            Some((a.to_string(), b.to_string()))
        };
        merges
            .iter()
            .map(|merge| pair(merge).ok_or_else(|| self.error(format!("{merge} is no merge"))))
            .collect()
    }

    /// Text and kind of every row of the embedding; rows without a token are filled up as unused.
    fn tokens(&self, byte_fallback: bool) -> Result<(Vec<String>, Vec<TokenKind>)> {
        let rows = self.decoder.config().vocab;
        let mut tokens: Vec<Option<(String, TokenKind)>> = vec![None; rows];
        let unknown = self.json["model"]["unk_token"].as_str();
        let mut put = |text: &str, id: &Json, kind: TokenKind| {
            let row = id.as_u64().and_then(|id| tokens.get_mut(id as usize));
            let row = row.ok_or_else(|| {
                self.error(format!(
                    "token {text:?} has id {id}, but the embedding {rows} rows"
                ))
            })?;
            *row = Some((text.to_string(), kind));
            Ok::<_, Error>(())
        };
        let vocab = self.json["model"]["vocab"].as_object();
        let vocab = vocab.ok_or_else(|| self.error("model.vocab must map tokens to ids"))?;
        for (text, id) in vocab {
            let byte = byte_fallback && is_byte(text);
            put(
                text,
                id,
                if byte {
                    TokenKind::Byte
                } else {
                    TokenKind::Normal
                },
            )?;
        }
        for added in self.json["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str();
            let text = text.ok_or_else(|| self.error("an added token has no content"))?;
            let kind = match added["special"].as_bool() {
                _ if Some(text) == unknown => TokenKind::Unknown,
                Some(true) => TokenKind::Control,
                _ => TokenKind::UserDefined,
            };
            put(text, &added["id"], kind)?;
        }
        let filled = |(row, token): (usize, Option<(String, TokenKind)>)| {
            token.unwrap_or_else(|| (format!("[PAD{row}]"), TokenKind::Unused))
        };
        Ok(tokens.into_iter().enumerate().map(filled).unzip())
    }

    /// Whether a SentencePiece-like tokenizer puts a space in front of a text.
    fn prepends_space(&self) -> Result<bool> {
        let (normalizer, pre) = (&self.json["normalizer"], &self.json["pre_tokenizer"]);
        let steps = steps(normalizer, "normalizers");
        let known = |step: &&Json| matches!(step["type"].as_str(), Some("Prepend" | "Replace"));
        if let Some(step) = steps.iter().find(|step| !known(step)) {
            return Err(self.error(format!("llama.cpp has no normalizer {}", step["type"])));
        }
        let replaces = steps.iter().any(|step| {
            step["pattern"]["String"].as_str() == Some(" ") && step["content"].as_str() == Some("▁")
        });
        let prepends = steps.iter().any(|s| s["type"].as_str() == Some("Prepend"));
        // Gemma splits at spaces, of which the normalizer leaves none.
        let finds_nothing = pre["pattern"]["String"].as_str() == Some(" ");
        match pre["type"].as_str() {
            None if replaces => Ok(prepends),
            Some("Split") if replaces && finds_nothing => Ok(prepends),
            Some("Metaspace") => Ok(pre["prepend_scheme"].as_str() != Some("never")
                && pre["add_prefix_space"].as_bool() != Some(false)),
            _ => Err(self.error(
                "a BPE with byte fallback must write spaces as ▁, by its normalizer or by Metaspace",
            )),
        }
    }

    /// llama.cpp's name of a byte-level pre-tokenizer.
    fn pre_tokenizer(&self) -> Result<&'static str> {
        let unknown = |what: String| {
            self.error(format!(
                "llama.cpp knows pre-tokenizers by name, and this is none of gpt-2, smollm, llama-bpe and qwen2: {what}"
            ))
        };
        let normalizer = self.json["normalizer"]["type"].as_str();
        // llama.cpp leaves NFC out too.
        if !matches!(normalizer, None | Some("NFC")) {
            return Err(unknown(format!("normalizer {}", self.json["normalizer"])));
        }
        let pre = &self.json["pre_tokenizer"];
        let steps = steps(pre, "pretokenizers");
        let Some((bytes, splits)) = steps.split_last() else {
            return Err(unknown("there is none".into()));
        };
        let plain = bytes["type"].as_str() == Some("ByteLevel")
            && bytes["add_prefix_space"].as_bool() != Some(true);
        let regex = bytes["use_regex"].as_bool().unwrap_or(true);
        let pattern = |split: &Json| split["pattern"]["Regex"].as_str().map(str::to_string);
        match splits {
            [] if plain && regex => Ok("gpt-2"),
            [split] if plain && regex && single_digits(split) => Ok("smollm"),
            [split] if plain && !regex && pattern(split).as_deref() == Some(LLAMA3) => {
                Ok("llama-bpe")
            }
            [split] if plain && !regex && pattern(split).as_deref() == Some(QWEN2) => Ok("qwen2"),
            _ => Err(unknown(pre.to_string())),
        }
    }
}

/// The members of a sequence, or the one thing that stands for itself, or nothing.
fn steps<'j>(json: &'j Json, members: &str) -> Vec<&'j Json> {
    match (json, json[members].as_array()) {
        (Json::Null, _) => vec![],
        (_, Some(list)) => list.iter().collect(),
        (one, None) => vec![one],
    }
}

/// Whether a step of a pre-tokenizer makes every digit a piece of its own.
fn single_digits(step: &Json) -> bool {
    step["type"].as_str() == Some("Digits") && step["individual_digits"].as_bool() == Some(true)
}

/// `<0x00>` to `<0xFF>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.chars().all(|c| c.is_ascii_hexdigit()))
}

/// Minus the rank of the first merge that makes a token; 0 for what no merge makes, but for texts of
/// several characters, which must not be merged to.
fn scores(tokens: &[String], kinds: &[TokenKind], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (a, b)) in merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    let score = |(token, kind): (&String, &TokenKind)| match ranks.get(token) {
        Some(&rank) => -(rank as f32),
        None if *kind == TokenKind::Normal && token.chars().count() > 1 => -1e9,
        None => 0.0,
    };
    tokens.iter().zip(kinds).map(score).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_rank_tokens_like_merges() {
        let merges = [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")];
        let merges = merges.map(|(a, b)| (a.to_string(), b.to_string()));
        let tokens = ["a", "abc", "ab", "bc", "xyz", "<s>"].map(str::to_string);
        let mut kinds = [TokenKind::Normal; 6];
        kinds[5] = TokenKind::Control;
        let scores = scores(&tokens, &kinds, &merges);
        assert_eq!(scores, [0.0, -1.0, 0.0, -3.0, -1e9, 0.0]);
    }

    #[test]
    fn byte_tokens_are_told_from_text() {
        assert!(is_byte("<0x0A>") && is_byte("<0xff>"));
        assert!(!is_byte("<0x>") && !is_byte("<0x0G>") && !is_byte("0x0A"));
    }
}
