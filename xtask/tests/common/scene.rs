//! A folder with a small random model, its tokenizer and two texts, and what runs on it answered.

use std::path::PathBuf;
use std::process::Output;

use candle_core::DType;
use causal_lm::testing::{TestModel, write_byte_tokenizer};
use serde_json::{Map, Value, json};
use tensor_io::Config;

/// Words of the test's language; its tokenizer has one token for each.
const WORDS: [&str; 8] = ["<s>", "a", "b", "c", "d", "e", "f", "."];

/// Characters of the texts, as a byte-level tokenizer writes them.
const CHARACTERS: [&str; 8] = ["Ġ", "a", "b", "c", "d", "e", "f", "."];

/// A folder with a small random model, its tokenizer and two texts.
pub(crate) struct Scene(TestModel);

impl Scene {
    pub(crate) fn new(config: Value) -> Self {
        let config = Config::new(config.as_object().unwrap().clone());
        let scene =
            Self(TestModel::with(&config, DType::BF16, |_, tensor| tensor).with_words(&WORDS));
        for (name, step) in [("text.txt", 3), ("calib.txt", 5)] {
            let text: Vec<&str> = (0..800)
                .map(|i| WORDS[1 + (i * step + i / 7) % 7])
                .collect();
            std::fs::write(scene.path(name), text.join(" ")).unwrap();
        }
        scene
    }

    /// The same with a tokenizer that GGUF files can hold: a token for each character of the texts, as a byte-level tokenizer writes
    /// it, and BOS. The model has nine tokens then.
    #[allow(dead_code, reason = "each file of tests takes what it needs")]
    pub(crate) fn with_characters(self) -> Self {
        let dir = self.path("model");
        write_byte_tokenizer(&dir, CHARACTERS.len() + 1);
        let path = dir.join("tokenizer.json");
        let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let vocab: Map<String, Value> = CHARACTERS
            .iter()
            .enumerate()
            .map(|(id, text)| (text.to_string(), json!(id)))
            .collect();
        tokenizer["model"]["vocab"] = vocab.into();
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }
}

pub(crate) fn rows(output: &Output) -> Vec<Value> {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["rows"].as_array().unwrap().clone()
}

#[allow(dead_code, reason = "each file of tests takes what it needs")]
pub(crate) fn error(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}
