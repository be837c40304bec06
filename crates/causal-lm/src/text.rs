//! Texts and the tokenizer that a checkpoint folder carries.

use crate::{Error, Result, gguf, read_text};
use std::path::Path;
use tensor_io::gguf::Gguf;
use tokenizers::Tokenizer;

/// The tokenizer of a checkpoint, and the BOS and EOS tokens that it names.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    bos: Option<u32>,
    adds_bos: bool,
    eos: Option<u32>,
    /// By name; the one that is used without asking for another is called default.
    chat_templates: Vec<(String, String)>,
}

/// Name of the chat template that is used without asking for another.
pub(crate) const DEFAULT_TEMPLATE: &str = "default";

impl TextTokenizer {
    /// Reads `tokenizer.json`, and the BOS and EOS tokens from `tokenizer_config.json` or, where that does not name one,
    /// `special_tokens_map.json`. Where neither names BOS it is what the tokenizer itself puts in front of a text. Of a
    /// GGUF file, rebuilds the tokenizer from its metadata.
    ///
    /// # Errors
    /// [`Error::Text`] with the file that is missing or cannot be used, and for a GGUF file a tokenizer that is not
    /// supported.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if gguf::is_gguf(dir) {
            return Self::of_gguf(&Gguf::open(dir)?);
        }
        let path = dir.join("tokenizer.json");
        let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| error(&path, e))?;
        // A file may ask for padding or truncation, which have no place in running text.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|e| error(&path, e))?;
        let names = special_tokens(dir)?;
        let text = |field: &str| {
            // A null is an answer: there is none.
            let value = names.get(field)?;
            value.as_str().or_else(|| value["content"].as_str())
        };
        let in_front = put_in_front(&tokenizer)?;
        let bos = match text("bos_token") {
            None => in_front,
            Some(text) => Some(tokenizer.token_to_id(text).ok_or_else(|| {
                error(
                    &path,
                    format!(
                        "the BOS token {text:?} of the tokenizer's config is not in the vocabulary"
                    ),
                )
            })?),
        };
        let eos = text("eos_token").and_then(|text| tokenizer.token_to_id(text));
        let asked = names["add_bos_token"].as_bool();
        Ok(Self {
            tokenizer,
            bos,
            adds_bos: bos.is_some() && asked.unwrap_or(in_front == bos),
            eos,
            chat_templates: chat_templates(dir, &names)?,
        })
    }

    fn of_gguf(file: &Gguf) -> Result<Self> {
        match gguf::tokenizer::rebuild(file)? {
            Some(rebuilt) => Ok(Self {
                adds_bos: rebuilt.bos.is_some() && put_in_front(&rebuilt.tokenizer)? == rebuilt.bos,
                tokenizer: rebuilt.tokenizer,
                bos: rebuilt.bos,
                eos: rebuilt.eos,
                chat_templates: gguf::tokenizer::chat_templates(file)?,
            }),
            None => Err(error(file.path(), "the file holds no tokenizer")),
        }
    }

    /// The BOS token, where the tokenizer has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether the tokenizer is to begin texts with BOS where nobody says otherwise: by `add_bos_token` of its config, or
    /// because it puts that token in front itself.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The EOS token, where the tokenizer names one of its vocabulary.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The Jinja template that turns messages into the text that the model was trained on, where it has one.
    pub fn chat_template(&self) -> Option<&str> {
        let mut all = self.chat_templates();
        all.find_map(|(name, template)| (name == DEFAULT_TEMPLATE).then_some(template))
    }

    /// All chat templates by their names; that of [`chat_template`](Self::chat_template) is called `default`.
    pub fn chat_templates(&self) -> impl Iterator<Item = (&str, &str)> {
        let all = self.chat_templates.iter();
        all.map(|(name, template)| (name.as_str(), template.as_str()))
    }

    /// How a token is written; `None` for an id that is not in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Tokenises a text as one piece, without special tokens.
    ///
    /// # Errors
    /// [`Error::Windows`] when the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(refused)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Tokenises a text as one piece with the special tokens that the tokenizer itself adds, such as a BOS token in front.
    ///
    /// # Errors
    /// [`Error::Windows`] when the tokenizer refuses the text.
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, true).map_err(refused)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// [`encode`](Self::encode), and for each token the byte of the text where it ends.
    ///
    /// # Errors
    /// [`Error::Windows`] when the tokenizer refuses the text.
    pub fn encode_with_ends(&self, text: &str) -> Result<(Vec<u32>, Vec<usize>)> {
        let encoding = self.tokenizer.encode(text, false).map_err(refused)?;
        let ends = encoding.get_offsets().iter().map(|&(_, end)| end);
        Ok((encoding.get_ids().to_vec(), ends.collect()))
    }

    /// Tokenises the text of a file, as [`read_text`] reads it.
    ///
    /// # Errors
    /// [`Error::Text`] when it cannot be read, is not UTF-8 or is empty.
    pub fn encode_file(&self, path: impl AsRef<Path>) -> Result<Vec<u32>> {
        self.encode(&read_text(path)?)
    }

    /// Text of a sequence of tokens, special tokens left out.
    ///
    /// # Errors
    /// [`Error::Windows`] when the tokenizer cannot decode them.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(tokens, true)
            .map_err(|e| Error::Windows(format!("the tokenizer cannot decode: {e}")))
    }
}

impl TextTokenizer {
    /// The text of tokens that come one after the other: for each what it completes, special tokens left out. Tokens that
    /// end within a character complete nothing.
    pub fn stream(&self) -> impl FnMut(u32) -> Result<String> {
        let mut stream = self.tokenizer.decode_stream(true);
        move |token| {
            let text = stream.step(token);
            let text =
                text.map_err(|e| Error::Windows(format!("the tokenizer cannot decode: {e}")))?;
            Ok(text.unwrap_or_default())
        }
    }
}

fn refused(source: tokenizers::Error) -> Error {
    Error::Windows(format!("the tokenizer refuses the text: {source}"))
}

fn error(path: &Path, reason: impl ToString) -> Error {
    Error::Text {
        path: path.into(),
        reason: reason.to_string(),
    }
}

/// The token that the tokenizer itself puts in front of a text.
fn put_in_front(tokenizer: &Tokenizer) -> Result<Option<u32>> {
    let ids = |special| -> Result<Vec<u32>> {
        let encoding = tokenizer.encode_fast("a", special).map_err(refused)?;
        Ok(encoding.get_ids().to_vec())
    };
    let (with, without) = (ids(true)?, ids(false)?);
    Ok(match with.split_first() {
        Some((first, rest)) if !without.is_empty() && rest.starts_with(&without) => Some(*first),
        _ => None,
    })
}

/// The fields of the files that name the special tokens, each a string or an object with `content`; where both files have
/// a field the first wins.
fn special_tokens(dir: &Path) -> Result<serde_json::Value> {
    let mut found = serde_json::Map::new();
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = dir.join(file);
        if path.exists() {
            let bytes = std::fs::read(&path).map_err(|e| error(&path, e))?;
            let fields: serde_json::Map<String, serde_json::Value> =
                serde_json::from_slice(tensor_io::without_mark(&bytes))
                    .map_err(|e| error(&path, e))?;
            for (field, value) in fields {
                found.entry(field).or_insert(value);
            }
        }
    }
    Ok(found.into())
}

/// The templates for conversations by name: files of their own, or what the tokenizer's config has, a string or a list.
fn chat_templates(dir: &Path, config: &serde_json::Value) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut read = |name: &str, path: &Path| -> Result<()> {
        let text = tensor_io::read_text(path).map_err(|e| error(path, e))?;
        found.push((name.to_string(), text));
        Ok(())
    };
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        read(DEFAULT_TEMPLATE, &path)?;
    }
    let more = dir.join("additional_chat_templates");
    if more.is_dir() {
        let entries = std::fs::read_dir(&more).map_err(|e| error(&more, e))?;
        let mut paths = Vec::new();
        for entry in entries {
            paths.push(entry.map_err(|e| error(&more, e))?.path());
        }
        paths.sort();
        for path in paths {
            if let (Some("jinja"), Some(name)) = (
                path.extension().and_then(|x| x.to_str()),
                path.file_stem().and_then(|x| x.to_str()),
            ) {
                read(name, &path)?;
            }
        }
    }
    if !found.is_empty() {
        return Ok(found);
    }
    let stored = &config["chat_template"];
    if let Some(template) = stored.as_str() {
        return Ok(vec![(DEFAULT_TEMPLATE.into(), template.into())]);
    }
    let named = stored.as_array().into_iter().flatten().filter_map(|entry| {
        let (name, template) = (entry["name"].as_str()?, entry["template"].as_str()?);
        Some((name.to_string(), template.to_string()))
    });
    Ok(named.collect())
}
