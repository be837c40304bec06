//! `eval lattice` as its users run it.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn lattice(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "lattice", "--json"])
        .args(args)
        .output()
        .unwrap()
}

fn report(output: &Output) -> Value {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_run_has_the_controls_and_tells_one_shot_from_fine_tuned() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().to_str().unwrap();
    let task = [
        "--task",
        "mod2",
        "--method",
        "lattice-context,strength",
        "--sparsity",
        "0.5",
    ];
    let report = report(&lattice(
        &[&task[..], &["--seeds", "2", "--out", folder]].concat(),
    ));
    let rows = report["rows"].as_array().unwrap();
    for method in [
        "lattice-context",
        "strength",
        "random",
        "threshold",
        "zero-whh",
    ] {
        for stage in ["one-shot", "fine-tuned"] {
            let row = rows
                .iter()
                .find(|row| row["method"] == method && row["stage"] == stage)
                .unwrap_or_else(|| panic!("no row of {method}, {stage}"));
            assert!(row["accuracy"].as_f64().is_some(), "{method} {stage}");
            assert_eq!(row["spread"]["accuracy"]["runs"], 2);
            assert_eq!(
                row["finetune_epochs"].as_u64(),
                Some(u64::from(stage == "fine-tuned"))
            );
        }
    }
    assert!(
        rows.iter().any(|row| row["method"] == "neurons removed"
            && row["tokens_per_second"].as_f64() > Some(0.0))
    );
    let page = std::fs::read_to_string(out.path().join("report.html")).unwrap();
    assert!(page.contains("Hasse diagram"));
}

#[test]
fn wrong_settings_and_files_are_named() {
    for (args, code, names) in [
        (&["--sparsity", "1"][..], 2, "--sparsity"),
        (&["--task", "mod4"], 2, "mod4"),
        (&["--method", "flap"], 2, "flap"),
        (
            &[
                "--weights",
                "absent.safetensors",
                "--vocab",
                "v.json",
                "--text",
                "t.txt",
            ],
            1,
            "absent.safetensors",
        ),
        (&["--weights", "absent.safetensors"], 2, "--vocab"),
        (&["--device", "cuda"], 2, "--device cuda"),
        (&["--window", "64"], 2, "--window"),
        (&["--samples", "8"], 2, "--samples"),
        (
            &["--method", "span,block-8x4", "--wiring", "feedback:8+8"],
            2,
            "block-8x4",
        ),
    ] {
        let output = lattice(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(names), "{args:?}: {stderr}");
    }
}

#[shared_data::needed("models/tfcharrnn_shakespeare", "data/text")]
#[test]
fn the_loss_of_a_trained_character_network_is_in_bits() {
    let shared = Path::new(shared_data::path!(""));
    let model = shared.join("models/tfcharrnn_shakespeare");
    let path = |file: &str| model.join(file).to_str().unwrap().to_owned();
    // A piece of the text keeps the test short.
    let text = std::fs::read_to_string(shared.join("data/text/tinyshakespeare.txt")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let piece = dir.path().join("text.txt");
    std::fs::write(&piece, &text[..40_000]).unwrap();
    let (weights, vocab) = (path("model.safetensors"), path("vocab.json"));
    let files = [
        "--weights",
        &weights,
        "--vocab",
        &vocab,
        "--text",
        piece.to_str().unwrap(),
    ];
    let run = [
        "--method",
        "magnitude",
        "--sparsity",
        "0.5",
        "--seeds",
        "1",
        "--finetune-epochs",
        "0",
    ];
    let report = report(&lattice(&[&files[..], &run].concat()));
    let bits = |method: &str| {
        let rows = report["rows"].as_array().unwrap();
        rows.iter().find(|row| row["method"] == method).unwrap()["bits"]
            .as_f64()
            .unwrap()
    };
    assert!(bits("dense") > 1.0 && bits("dense") < 3.0);
    assert!(bits("dense") < bits("magnitude") && bits("magnitude") < bits("zero-whh"));
}
