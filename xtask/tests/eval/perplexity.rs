//! `eval perplexity` and its protocols.

use crate::llama;
use crate::scene::rows;
use std::path::Path;
use std::process::Command;

#[test]
fn protocols_differ_in_windows_and_targets_and_rolling_scores_every_token() {
    let scene = llama();
    let report = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["eval", "perplexity", "--json", "--model"])
            .arg(scene.path("model"))
            .arg("--text")
            .arg(scene.path("text.txt"))
            .args(more)
            .output()
            .unwrap();
        rows(&output).remove(0)
    };
    // The text has 800 words of one letter, and 799 spaces.
    let rolling = report(&["--protocol", "rolling"]);
    let number = |row: &serde_json::Value, field: &str| row[field].as_f64().unwrap();
    assert!(
        (number(&rolling, "word_perplexity") / number(&rolling, "perplexity") - 1.0).abs() < 1e-9
    );
    let bits = number(&rolling, "nll") * 800.0 / 1599.0 / 2f64.ln();
    assert!((number(&rolling, "bits_per_byte") / bits - 1.0).abs() < 1e-9);
    assert!((number(&rolling, "byte_perplexity").log2() / bits - 1.0).abs() < 1e-9);
    // The tokenizer of the scene adds no special tokens.
    let (gptq, no_bos) = (report(&["--protocol", "gptq"]), report(&["--no-bos"]));
    assert_eq!(gptq["perplexity"], no_bos["perplexity"]);
    let windows = report(&[]);
    assert_ne!(gptq["perplexity"], windows["perplexity"]);
    assert_eq!(
        windows["perplexity"],
        report(&["--protocol", "windows"])["perplexity"]
    );
    assert!(windows.get("bits_per_byte").is_none());
}

#[shared_data::needed("models", "data/text")]
#[test]
fn perplexities_of_trained_models_are_those_of_transformers() {
    let shared = Path::new(shared_data::path!(""));
    for (model, text, more, expected) in [
        (
            "stories260K",
            "tinystories_valid_30KB",
            &["--window", "256"][..],
            6.316452,
        ),
        (
            "stories260K",
            "tinystories_valid_30KB",
            &["--window", "256", "--no-bos"],
            5.723490,
        ),
        (
            "aidreams260K",
            "tinystories_valid_30KB",
            &["--window", "128"],
            230.885091,
        ),
        (
            "aidreams260K",
            "tinystories_valid_30KB",
            &["--window", "128", "--no-bos"],
            216.223067,
        ),
        (
            "small-lm",
            "tinystories_valid_30KB",
            &["--window", "256"],
            49.146425,
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["eval", "perplexity", "--json", "--model"])
            .arg(shared.join("models").join(model))
            .arg("--text")
            .arg(shared.join("data/text").join(text).with_extension("txt"))
            .args(more)
            .output()
            .unwrap();
        let found = rows(&output)[0]["perplexity"].as_f64().unwrap();
        assert!(
            (found / expected - 1.0).abs() < 1e-5,
            "{model}: {found} is not {expected}"
        );
    }
}
