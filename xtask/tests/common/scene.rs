//! A folder with a small random model, its tokenizer and two texts, and what runs on it answered.

use std::path::PathBuf;
use std::process::Output;

use causal_lm::synthetic;
use serde_json::{Value, json};
use tensor_io::{Config, WriteOptions};

/// Words of the test's language; its tokenizer has one token for each.
const WORDS: [&str; 8] = ["<s>", "a", "b", "c", "d", "e", "f", "."];

/// A folder with a small random model, its tokenizer and two texts.
pub(crate) struct Scene(tempfile::TempDir);

impl Scene {
    pub(crate) fn new(config: Value) -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        let fields = Config::new(config.as_object().unwrap().clone());
        let (model, options) = (scene.path("model"), WriteOptions::default());
        let dtype = candle_core::DType::BF16;
        synthetic::write(&fields, dtype, &model, &options, synthetic::random(1)).unwrap();
        let vocab: serde_json::Map<String, Value> = WORDS
            .iter()
            .enumerate()
            .map(|(id, word)| (word.to_string(), json!(id)))
            .collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "."},
        });
        std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(
            model.join("tokenizer_config.json"),
            json!({"bos_token": "<s>"}).to_string(),
        )
        .unwrap();
        for (name, step) in [("text.txt", 3), ("calib.txt", 5)] {
            let text: Vec<&str> = (0..800)
                .map(|i| WORDS[1 + (i * step + i / 7) % 7])
                .collect();
            std::fs::write(scene.path(name), text.join(" ")).unwrap();
        }
        scene
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
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

pub(crate) fn error(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}
