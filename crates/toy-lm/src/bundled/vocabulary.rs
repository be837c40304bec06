//! The tokenizer: byte-level BPE trained on generated text, with one token per digit.

use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use crate::{Error, Result};

/// Entries of the vocabulary.
pub(super) const SIZE: usize = 1024;
/// The token at the beginning of every window.
pub(super) const BOS: &str = "<s>";
/// The token at the end of a text.
pub(super) const EOS: &str = "</s>";

/// Trains a tokenizer on `text`.
pub(super) fn train(text: &str) -> Result<Tokenizer> {
    let special = [BOS, EOS]
        .map(|token| AddedToken::from(token, true))
        .to_vec();
    let mut trainer = TrainerWrapper::from(
        BpeTrainer::builder()
            .vocab_size(SIZE)
            .show_progress(false)
            .special_tokens(special)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build(),
    );
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        Digits::new(true).into(),
        ByteLevel::new(false, true, true).into(),
    ])));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let documents = text.split_inclusive("\n\n");
    tokenizer.train(&mut trainer, documents).map_err(error)?;
    Ok(tokenizer)
}

/// `tokenizer.json` and `tokenizer_config.json`, for windows of up to `context` tokens.
pub(super) fn files(tokenizer: &Tokenizer, context: usize) -> Result<[(&'static str, Vec<u8>); 2]> {
    let json = tokenizer.to_string(true).map_err(error)?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
        "model_max_length": context, "clean_up_tokenization_spaces": false,
    });
    let config = serde_json::to_vec_pretty(&config).map_err(|e| Error::Tokenizer(e.to_string()))?;
    Ok([
        ("tokenizer.json", json.into_bytes()),
        ("tokenizer_config.json", config),
    ])
}

pub(super) fn error(source: tokenizers::Error) -> Error {
    Error::Tokenizer(source.to_string())
}
