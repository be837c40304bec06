//! `eval structured` on dense models.

use crate::scene::{error, rows};
use crate::{llama, methods, mixtral, structured, weights};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tensor_io::Checkpoint;
use tensor_io::gguf::Gguf;

#[test]
fn every_method_and_ratio_has_a_row_that_agrees_with_its_checkpoint() {
    let scene = llama();
    let save = scene.path("pruned");
    let methods = "flap,flap-compat,wanda-sp,magnitude,random";
    let rows = rows(&structured(
        &scene,
        &[
            "--method",
            methods,
            "--ratio",
            "0.2,0.4",
            "--save",
            save.to_str().unwrap(),
        ],
    ));
    assert_eq!(rows.len(), 1 + 5 * 2);
    assert_eq!(rows[0]["method"], "dense");
    for row in &rows[1..] {
        assert!(row["perplexity"].as_f64().unwrap() > 1.0);
        assert_eq!(row["perplexity_dense"], rows[0]["perplexity"]);
        assert!(row["params"].as_u64() < row["params_dense"].as_u64());
        let (method, ratio) = (
            row["method"].as_str().unwrap(),
            row["ratio"].as_f64().unwrap(),
        );
        if method == "random" {
            assert_eq!(row["spread"]["perplexity"]["runs"], 3);
            continue;
        }
        let pruned = Checkpoint::open(save.join(format!("{method}-{ratio}"))).unwrap();
        assert_eq!(row["params"].as_u64(), Some(pruned.parameters()));
        assert_eq!(row["bytes"].as_u64(), Some(pruned.total_bytes()));
    }
}

#[test]
fn without_a_method_the_recommended_one_runs() {
    for (scene, method) in [(llama(), "rd-dp"), (mixtral(), "neurons")] {
        let more = ["--ratio", "0.25", "--search-samples", "4"];
        let rows = rows(&structured(&scene, &more));
        assert_eq!(methods(&rows), ["dense", method]);
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let scene = llama();
    for compensate in ["bias", "least-squares"] {
        let saved = |threads: &str| {
            let dir = scene.path(&format!("{compensate}-{threads}"));
            let save = dir.to_str().unwrap();
            let arguments = [
                "--method",
                "flap",
                "--ratio",
                "0.3",
                "--compensate",
                compensate,
                "--threads",
                threads,
                "--save",
                save,
            ];
            rows(&structured(&scene, &arguments));
            weights(&dir)
        };
        let one = saved("1");
        assert_eq!(one, saved("2"), "{compensate}");
        assert_eq!(one, saved("5"), "{compensate}");
    }
}

#[test]
fn a_dry_run_counts_what_a_run_writes() {
    let scene = llama();
    let arguments = ["--method", "flap,wanda-sp", "--ratio", "0.3"];
    let dry = rows(&structured(
        &scene,
        &[&arguments[..], &["--dry-run"]].concat(),
    ));
    let wet = rows(&structured(&scene, &arguments));
    assert_eq!(dry.len(), 2);
    for (dry, wet) in dry.iter().zip(&wet[1..]) {
        assert!(dry.get("perplexity").is_none());
        for field in ["method", "ratio", "params", "bytes", "layers"] {
            assert_eq!(dry[field], wet[field], "{field}");
        }
    }
}

/// Sizes of a search that takes a moment.
const SEARCH: [&str; 10] = [
    "--iterations",
    "1",
    "--generations",
    "2",
    "--offspring",
    "4",
    "--stages",
    "32:2,64:1",
    "--search-samples",
    "8",
];

#[test]
fn allocations_by_curves_energies_and_searches_are_measured_like_the_others() {
    let scene = llama();
    let arguments = ["--ratio", "0.3", "--compensate", "least-squares"];
    let run = |more: &[&str]| {
        // Flags of a search are for methods that search.
        let searches = more.iter().any(|word| word.contains("tyr"));
        let search: &[&str] = if searches { &SEARCH } else { &[] };
        rows(&structured(
            &scene,
            &[&arguments[..], search, more].concat(),
        ))
    };
    let found = run(&[
        "--method",
        "tyr,rd-dp,structprune,structprune-softmax",
        "--settle",
    ]);
    let names: Vec<_> = found.iter().map(|row| row["method"].clone()).collect();
    assert_eq!(
        names,
        [
            "dense",
            "tyr",
            "rd-dp",
            "structprune",
            "structprune-softmax"
        ]
    );
    for row in &found[1..] {
        // Widths are whole: no more is removed than asked, and about as much.
        let removed = row["removed"].as_f64().unwrap();
        assert!((0.2..=0.31).contains(&removed), "{row}");
        assert!(row["perplexity"].as_f64().unwrap() > 1.0);
    }
    assert_eq!(found[1]["spread"]["perplexity"]["runs"], 3);
    assert!(found[1]["kl"].as_f64().unwrap() > 0.0);
    for (start, more) in [("flap", &[][..]), ("rd-dp", &["--distortion", "kl"])] {
        let save = scene.path(start);
        let own = [
            "--method",
            "tyr",
            "--search-start",
            start,
            "--seeds",
            "1",
            "--save",
            save.to_str().unwrap(),
        ];
        let found = run(&[&own[..], more].concat());
        assert!(found[1]["kl"].as_f64().unwrap() > 0.0, "{start}");
        // One result lies in the folder itself.
        assert_eq!(
            found[1]["params"].as_u64(),
            Some(Checkpoint::open(save).unwrap().parameters())
        );
    }
    let estimated = run(&["--method", "rd-dp", "--distortion", "hidden"]);
    assert!(estimated[1]["perplexity"].as_f64().unwrap() > 1.0);
}

#[test]
fn a_search_that_is_there_is_taken_up() {
    let scene = llama();
    let state = scene.path("state");
    let resumed = || {
        let arguments = ["--method", "tyr", "--ratio", "0.3", "--resume"];
        rows(&structured(
            &scene,
            &[&arguments[..], &[state.to_str().unwrap()], &SEARCH].concat(),
        ))
    };
    let (first, second) = (resumed(), resumed());
    for field in ["perplexity", "kl", "params"] {
        assert_eq!(first[1][field], second[1][field], "{field}");
        let spread = |rows: &[serde_json::Value]| rows[1]["spread"][field].clone();
        assert_eq!(spread(&first), spread(&second), "{field}");
    }
    // Nothing is compared again.
    assert!(first[1]["candidate_tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(second[1].get("candidate_tokens_per_second").is_none());
    assert_eq!(std::fs::read_dir(&state).unwrap().count(), 3);
}

#[test]
fn one_width_in_all_layers_and_every_export_are_a_flag_each() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    let dir = tempfile::tempdir().unwrap();
    let save = dir.path().join("pruned");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "structured", "--json", "--model"])
        .arg(&model)
        .arg("--text")
        .arg(model.join("evaluation.txt"))
        .arg("--calib")
        .arg(model.join("calibration.txt"))
        .args(["--window", "32", "--samples", "2", "--calib-samples", "4"])
        .args(["--method", "flap", "--ratio", "0.25", "--uniform"])
        .args([
            "--align",
            "32",
            "--export",
            "gguf:q8_0,gguf:f16,nemotron-nas",
        ])
        .arg("--save")
        .arg(&save)
        .output()
        .unwrap();
    let row = &rows(&output)[1];
    assert_eq!(row["loads_in"], "stock");
    let layers = row["layers"].as_array().unwrap();
    for layer in layers {
        assert_eq!(layer["heads"], layers[0]["heads"]);
        assert_eq!(layer["neurons"], layers[0]["neurons"]);
        assert_eq!(layer["neurons"].as_u64().unwrap() % 32, 0);
    }
    for (name, ty) in [("model-q8_0.gguf", "Q8_0"), ("model-f16.gguf", "F16")] {
        let file = Gguf::open(save.join(name)).unwrap();
        let sizes = file.tensors().iter().map(|tensor| {
            let elements: usize = tensor.shape.iter().product();
            match (tensor.layout.name, tensor.shape.len()) {
                ("F32", 1) => 4 * elements,
                ("F16", 2) if ty == "F16" => 2 * elements,
                // 32 codes and a scale of 16 bits.
                ("Q8_0", 2) if ty == "Q8_0" => elements / 32 * 34,
                other => panic!("{}: {other:?}", tensor.name),
            }
        });
        let bytes: usize = sizes.sum();
        assert_eq!(row[format!("bytes_{name}")], bytes, "{name}");
    }
    let exported = Checkpoint::open(save.join("nemotron-nas")).unwrap();
    assert_eq!(row["params"].as_u64(), Some(exported.parameters()));
}

#[test]
fn a_cell_that_fails_leaves_the_report_of_the_others() {
    let scene = llama();
    let run = |methods: &str, ratios: &str, name: &str, more: &[&str]| {
        let save = scene.path(name);
        let own = ["--method", methods, "--ratio", ratios];
        let to = ["--save", save.to_str().unwrap()];
        structured(&scene, &[&own[..], &to, more].concat())
    };
    // Attention of different widths has no place in this format, which is known once a plan has them.
    let export = ["--export", "nemotron-nas"];
    let whole = rows(&run("magnitude,flap,random", "0.4", "whole", &[]));
    let output = run("magnitude,flap,random", "0.4", "some", &export);
    let line = error(&output);
    assert!(
        line.contains("flap at ratio 0.4: --export") && line.contains("the report has the rest"),
        "{line}"
    );
    for other in ["magnitude at", "random at", "more failed"] {
        assert!(!line.contains(other), "{line}");
    }
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = report["rows"].as_array().unwrap();
    assert_eq!(methods(found), ["dense", "magnitude", "random"]);
    for (found, expected) in found.iter().zip([&whole[0], &whole[1], &whole[3]]) {
        for field in ["method", "ratio", "perplexity", "params", "bytes", "layers"] {
            assert_eq!(found.get(field), expected.get(field), "{field}");
        }
    }
    let failures = report["sections"][0]["failures"].as_array().unwrap();
    assert_eq!(failures.len(), 1);
    let failure = failures[0].as_str().unwrap();
    assert!(failure.starts_with("flap at ratio 0.4: "), "{failure}");
    assert!(scene.path("some/magnitude-0.4/nemotron-nas").is_dir());
    assert!(!scene.path("some/flap-0.4").exists());
    // Of two that fail the line has the first, and the report both.
    let output = run("flap,magnitude", "0.1,0.4", "two", &export);
    let line = error(&output);
    assert!(
        line.contains("flap at ratio 0.1: ") && line.contains("1 more failed"),
        "{line}"
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let failures = report["sections"][0]["failures"].as_array().unwrap();
    let starts = ["flap at ratio 0.1: ", "flap at ratio 0.4: "];
    assert_eq!(failures.len(), 2);
    for (failure, start) in failures.iter().zip(starts) {
        assert!(failure.as_str().unwrap().starts_with(start), "{failure}");
    }
    // Where none is left there is no report.
    let output = run("flap", "0.4", "none", &export);
    assert!(error(&output).contains("nemotron-nas"));
    assert!(output.stdout.is_empty());
}
