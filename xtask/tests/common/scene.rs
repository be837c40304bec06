//! A folder with a small random model, its tokenizer and two texts, and what runs on it answered.

use std::path::PathBuf;
use std::process::Output;

use candle_core::DType;
use causal_lm::testing::TestModel;
use serde_json::Value;
use tensor_io::Config;

/// Words of the test's language; its tokenizer has one token for each.
const WORDS: [&str; 8] = ["<s>", "a", "b", "c", "d", "e", "f", "."];

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

pub(crate) fn error(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}
