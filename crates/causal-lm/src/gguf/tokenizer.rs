//! Tokenizers rebuilt from the metadata of a GGUF file.
//!
//! A file holds a vocabulary and the name of a way to use it, not a program: `gpt2` is byte-level BPE with a named
//! pre-tokenizer ([`pre`]), `llama` is SentencePiece's BPE, whose merges follow from the scores of its tokens ([`merges`]).
//! A name that is not known is an error. A tokenizer that splits text otherwise than in training would be silently worse.

mod kind;
mod merges;
mod pre;

use std::collections::{HashMap, HashSet};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tensor_io::Error;
use tensor_io::gguf::{Gguf, GgufError, Metadata};
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::{AddedToken, Tokenizer};

pub use kind::TokenKind;
use pre::PreTokenizer;

use crate::text::DEFAULT_TEMPLATE;

type Result<T> = tensor_io::Result<T>;

/// A tokenizer and the tokens around a text.
pub(crate) struct Rebuilt {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
}

/// Rebuilds the tokenizer of `file`; `None` if the file says that it has none.
pub(crate) fn rebuild(file: &Gguf) -> Result<Option<Rebuilt>> {
    let metadata = file.metadata();
    let Some(model) = metadata.get_str("tokenizer.ggml.model")? else {
        return Ok(None);
    };
    let keys = Keys::read(metadata, model)?;
    let build = match model {
        "none" | "no_vocab" => return Ok(None),
        "gpt2" => byte_level,
        "llama" => sentence_piece,
        other => {
            return Err(keys.refuse(format!(
                "the tokenizer {other:?} is not supported (supported: gpt2, llama)"
            )));
        }
    };
    let vocabulary = Vocabulary::read(&keys)?;
    let mut rebuilt = build(&keys, &vocabulary)?;
    if let Some(given) = given(&keys, &vocabulary)? {
        rebuilt.tokenizer = given;
    }
    Ok(Some(rebuilt))
}

/// `tokenizer.json` and `tokenizer_config.json` for a folder in the layout of Hugging Face.
pub(crate) fn files(file: &Gguf) -> Result<Vec<(String, Vec<u8>)>> {
    let Some(rebuilt) = rebuild(file)? else {
        return Ok(Vec::new());
    };
    let unavailable = |reason: String| Error::Unavailable {
        file: file.path().to_path_buf(),
        reason: format!("the tokenizer: {reason}"),
    };
    let tokenizer = rebuilt.tokenizer.to_string(true);
    let tokenizer = tokenizer.map_err(|error| unavailable(error.to_string()))?;
    let text = |id: Option<u32>| id.and_then(|id| rebuilt.tokenizer.id_to_token(id));
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(rebuilt.bos),
        "eos_token": text(rebuilt.eos),
    });
    let templates = chat_templates(file)?;
    match &templates[..] {
        [] => {}
        [(name, template)] if name == DEFAULT_TEMPLATE => {
            config["chat_template"] = json!(template);
        }
        several => {
            let entry =
                |(name, template): &(String, String)| json!({"name": name, "template": template});
            config["chat_template"] = several.iter().map(entry).collect();
        }
    }
    let config = serde_json::to_vec_pretty(&config);
    let config = config.map_err(|error| unavailable(error.to_string()))?;
    Ok(vec![
        ("tokenizer.json".into(), tokenizer.into_bytes()),
        ("tokenizer_config.json".into(), config),
    ])
}

/// The chat templates of a file by name, the default one first.
pub(crate) fn chat_templates(file: &Gguf) -> Result<Vec<(String, String)>> {
    let metadata = file.metadata();
    let names = metadata.get_strings("tokenizer.chat_templates")?;
    let mut found = Vec::new();
    if let Some(template) = metadata.get_str("tokenizer.chat_template")? {
        found.push((DEFAULT_TEMPLATE.to_string(), template.to_string()));
    }
    for name in names.unwrap_or_default() {
        let key = format!("tokenizer.chat_template.{name}");
        let template = metadata.required(&key, Metadata::get_str)?;
        found.push((name.to_string(), template.to_string()));
    }
    Ok(found)
}

/// The keys that all kinds of tokenizers share.
struct Keys<'a> {
    metadata: Metadata<'a>,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    add_bos: Option<bool>,
    add_eos: bool,
}

impl<'a> Keys<'a> {
    fn read(metadata: Metadata<'a>, model: &str) -> Result<Self> {
        // SentencePiece files leave the usual numbers out.
        let usual = |id: u32| (model == "llama").then_some(id);
        let token = |key: &str, usual: Option<u32>| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{key}_token_id");
            let found = metadata
                .get_u64(&key)?
                .and_then(|id| u32::try_from(id).ok());
            // Some writers put the largest number where there is no such token.
            Ok(match found {
                Some(u32::MAX) => None,
                found => found.or(usual),
            })
        };
        Ok(Self {
            metadata,
            bos: token("bos", usual(1))?,
            eos: token("eos", usual(2))?,
            unknown: token("unknown", usual(0))?,
            add_bos: metadata.get_bool("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata
                .get_bool("tokenizer.ggml.add_eos_token")?
                .unwrap_or(false),
        })
    }

    fn refuse(&self, what: impl Into<String>) -> Error {
        self.metadata.error(GgufError::Content(what.into()))
    }
}

/// Tokens of a Phi-3 that take in no white space.
pub const STRIP_NOTHING: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// Whether llama.cpp lets the special tokens of a model with this `general.name` take in the white space behind them, all but
/// [`STRIP_NOTHING`].
pub fn strips_behind_tokens(name: &str) -> bool {
    let name = name.to_lowercase();
    name.contains("phi-3") || name.contains("phi3")
}

/// Texts, kinds and, for SentencePiece, scores of all tokens.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<TokenKind>,
}

impl<'a> Vocabulary<'a> {
    fn read(keys: &Keys<'a>) -> Result<Self> {
        let tokens = keys
            .metadata
            .required("tokenizer.ggml.tokens", Metadata::get_strings)?;
        let kinds = keys.metadata.get_i32s("tokenizer.ggml.token_type")?;
        let kinds = kinds.unwrap_or_else(|| vec![TokenKind::Normal as i32; tokens.len()]);
        if kinds.len() < tokens.len() {
            return Err(keys.refuse(format!(
                "tokenizer.ggml.token_type has {} entries for {} tokens",
                kinds.len(),
                tokens.len()
            )));
        }
        let kind = |number: i32| {
            let known = TokenKind::of(number);
            known.ok_or_else(|| {
                keys.refuse(format!(
                    "tokenizer.ggml.token_type: no kind of token is {number}"
                ))
            })
        };
        let kinds = kinds.into_iter().map(kind).collect::<Result<Vec<_>>>()?;
        let mut seen = HashSet::with_capacity(tokens.len());
        if let Some(twice) = tokens.iter().find(|token| !seen.insert(**token)) {
            return Err(keys.refuse(format!("the token {twice:?} is in the vocabulary twice")));
        }
        for (what, id) in [
            ("bos", keys.bos),
            ("eos", keys.eos),
            ("unknown", keys.unknown),
        ] {
            if let Some(id) = id.filter(|&id| id as usize >= tokens.len()) {
                return Err(keys.refuse(format!(
                    "tokenizer.ggml.{what}_token_id is {id}, but there are {} tokens",
                    tokens.len()
                )));
            }
        }
        Ok(Self { tokens, kinds })
    }

    fn ids(&self) -> HashMap<&'a str, u32> {
        self.tokens
            .iter()
            .zip(0..)
            .map(|(token, id)| (*token, id))
            .collect()
    }

    fn to_vocab(&self) -> Vocab {
        self.tokens
            .iter()
            .zip(0..)
            .map(|(token, id)| (token.to_string(), id))
            .collect()
    }

    /// Tokens that are found in a text before the model sees it. As in llama.cpp, those of a Phi-3 take in the white space
    /// behind them.
    fn added(&self, strips: bool) -> Vec<AddedToken> {
        let whole = |&(_, kind): &(&&str, &TokenKind)| {
            matches!(kind, TokenKind::Control | TokenKind::UserDefined)
        };
        let tokens = self.tokens.iter().zip(&self.kinds).filter(whole);
        tokens
            .filter(|(token, _)| !token.is_empty())
            .map(|(token, kind)| {
                AddedToken::from(*token, *kind == TokenKind::Control)
                    .normalized(false)
                    .rstrip(strips && !STRIP_NOTHING.contains(token))
            })
            .collect()
    }
}

fn byte_level(keys: &Keys<'_>, vocabulary: &Vocabulary<'_>) -> Result<Rebuilt> {
    let name = keys.metadata.get_str("tokenizer.ggml.pre")?;
    let pre = name.and_then(PreTokenizer::named).ok_or_else(|| {
        keys.refuse(match name {
            None => "tokenizer.ggml.pre, the name of the pre-tokenizer, is missing".to_string(),
            Some(name) => format!("the pre-tokenizer {name:?} is not supported"),
        })
    })?;
    let merges = keys
        .metadata
        .required("tokenizer.ggml.merges", Metadata::get_strings)?;
    let pair = |merge: &&str| {
        // A token may begin with a space, so the first character never separates.
        let second = merge.char_indices().nth(1)?.0;
        let at = second + merge[second..].find(' ')?;
        Some((merge[..at].to_string(), merge[at + 1..].to_string()))
    };
    let merges: Vec<(String, String)> = merges
        .iter()
        .map(|merge| pair(merge).ok_or_else(|| keys.refuse(format!("{merge:?} is no merge"))))
        .collect::<Result<_>>()?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.to_vocab(), merges)
        .ignore_merges(pre.ignores_merges());
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
    });
    let parts = Parts {
        normalizer: Value::Null,
        pre_tokenizer: pre.to_json(),
        decoder: byte_level,
    };
    assemble(keys, vocabulary, model, parts, pre.adds_bos())
}

fn sentence_piece(keys: &Keys<'_>, vocabulary: &Vocabulary<'_>) -> Result<Rebuilt> {
    let scores = keys
        .metadata
        .required("tokenizer.ggml.scores", Metadata::get_f32s)?;
    if scores.len() < vocabulary.tokens.len() {
        return Err(keys.refuse(format!(
            "tokenizer.ggml.scores has {} entries for {} tokens",
            scores.len(),
            vocabulary.tokens.len()
        )));
    }
    let mut model = BPE::builder()
        .vocab_and_merges(vocabulary.to_vocab(), merges::merges(vocabulary, &scores))
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unknown) = keys.unknown {
        model = model.unk_token(vocabulary.tokens[unknown as usize].to_string());
    }
    let space = keys
        .metadata
        .get_bool("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizer = match space {
        true => json!({
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
        }),
        false => replace,
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let parts = Parts {
        normalizer,
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
    };
    assemble(keys, vocabulary, model, parts, true)
}

/// What stands around the model, as `tokenizer.json` has it.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
}

fn assemble(
    keys: &Keys<'_>,
    vocabulary: &Vocabulary<'_>,
    model: BpeBuilder,
    parts: Parts,
    adds_bos: bool,
) -> Result<Rebuilt> {
    let unusable = |error: Box<dyn std::error::Error + Send + Sync>| {
        keys.refuse(format!("the tokenizer cannot be rebuilt: {error}"))
    };
    let mut tokenizer = Tokenizer::new(model.build().map_err(unusable)?);
    fn read<T: DeserializeOwned>(part: Value) -> Option<T> {
        // The parts are written above.
        serde_json::from_value(part).ok()
    }
    tokenizer
        .with_normalizer(read::<tokenizers::NormalizerWrapper>(parts.normalizer))
        .map_err(unusable)?;
    tokenizer.with_pre_tokenizer(read::<tokenizers::PreTokenizerWrapper>(parts.pre_tokenizer));
    tokenizer.with_decoder(read::<tokenizers::DecoderWrapper>(parts.decoder));
    let name = keys.metadata.get_str("general.name")?.unwrap_or_default();
    let added = vocabulary.added(strips_behind_tokens(name));
    tokenizer.add_tokens(added).map_err(unusable)?;
    let bos = keys.bos.filter(|_| keys.add_bos.unwrap_or(adds_bos));
    let eos = keys.eos.filter(|_| keys.add_eos);
    if bos.is_some() || eos.is_some() {
        let template = template(vocabulary, bos, eos);
        tokenizer.with_post_processor(read::<tokenizers::PostProcessorWrapper>(template));
    }
    Ok(Rebuilt {
        tokenizer,
        bos: keys.bos,
        eos: keys.eos,
    })
}

/// A processor that puts BOS in front of a text and EOS behind it.
fn template(vocabulary: &Vocabulary<'_>, bos: Option<u32>, eos: Option<u32>) -> Value {
    let text = |id: u32| vocabulary.tokens[id as usize];
    let special = |id: u32| json!({"SpecialToken": {"id": text(id), "type_id": 0}});
    let sequence = |name: &str| {
        let mut items: Vec<Value> = bos.map(special).into_iter().collect();
        items.push(json!({"Sequence": {"id": name, "type_id": 0}}));
        items.extend(eos.map(special));
        items
    };
    let tokens = bos.into_iter().chain(eos).map(|id| {
        let token = json!({"id": text(id), "ids": [id], "tokens": [text(id)]});
        (text(id).to_string(), token)
    });
    let pair = [sequence("A"), sequence("B")].concat();
    json!({
        "type": "TemplateProcessing",
        "single": sequence("A"),
        "pair": pair,
        "special_tokens": tokens.collect::<serde_json::Map<_, _>>(),
    })
}

/// The `tokenizer.json` that a few files carry, if its vocabulary is that of the file.
fn given(keys: &Keys<'_>, vocabulary: &Vocabulary<'_>) -> Result<Option<Tokenizer>> {
    let Some(json) = keys.metadata.get_str("tokenizer.huggingface.json")? else {
        return Ok(None);
    };
    let Ok(given) = Tokenizer::from_bytes(json) else {
        return Ok(None);
    };
    let ids = vocabulary.ids();
    let same = |(token, id): (String, u32)| ids.get(token.as_str()) == Some(&id);
    let whole = given.get_vocab_size(true) <= vocabulary.tokens.len();
    Ok((whole && given.get_vocab(true).into_iter().all(same)).then_some(given))
}
