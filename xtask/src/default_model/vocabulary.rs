//! The tokenizer: byte-level BPE, learnt from the stories, every digit a token.

use anyhow::{Context, Result};
use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

/// Entries of the vocabulary.
pub(super) const SIZE: usize = 1024;
/// The token that begins every window.
pub(super) const BOS: &str = "<s>";
/// The token that ends a text.
pub(super) const EOS: &str = "</s>";

/// Learns a vocabulary from `text`.
pub(super) fn learn(text: &str) -> Result<Tokenizer> {
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
    let lines = text.split_inclusive("\n\n");
    tokenizer
        .train(&mut trainer, lines)
        .map_err(anyhow::Error::from_boxed)
        .context("learning the vocabulary")?;
    Ok(tokenizer)
}

/// `tokenizer.json` and `tokenizer_config.json`.
pub(super) fn files(tokenizer: &Tokenizer) -> Result<[(&'static str, Vec<u8>); 2]> {
    let json = tokenizer
        .to_string(true)
        .map_err(anyhow::Error::from_boxed)?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
        "model_max_length": super::train::CONTEXT, "clean_up_tokenization_spaces": false,
    });
    let config = serde_json::to_vec_pretty(&config)?;
    Ok([
        ("tokenizer.json", json.into_bytes()),
        ("tokenizer_config.json", config),
    ])
}
