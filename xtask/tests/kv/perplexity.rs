//! Perplexity of decoded tokens under eviction and in quantised storage.

use crate::scene::{error, rows};
use crate::{asked, kv, model, number, on, on_scene};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

fn plain_nll(model: &Path, text: &Path, more: &[&str]) -> f64 {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "perplexity", "--json", "--model"])
        .arg(model)
        .arg("--text")
        .arg(text)
        .args(more)
        .output()
        .unwrap();
    number(&asked(&output)[0], "nll")
}

#[test]
fn the_full_cache_has_the_perplexity_of_whole_windows() {
    let scene = model();
    let rows = asked(&on_scene(
        &scene,
        &["--policy", "full", "--budget", "1.0", "--prompt", "1"],
    ));
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (&rows[0]["method"], &rows[0]["role"]),
        (&json!("full"), &json!("reference"))
    );
    let whole = plain_nll(
        &scene.path("model"),
        &scene.path("text.txt"),
        &["--samples", "5"],
    );
    let found = number(&rows[0], "nll");
    assert!((found - whole).abs() < 1e-5, "{found} {whole}");
}

#[test]
fn every_policy_has_a_row_at_every_budget_and_a_budget_of_the_window_costs_nothing() {
    let rows = asked(&on_scene(&model(), &["--budget", "24,1.0"]));
    let policies = [
        "streaming",
        "h2o",
        "tova",
        "scissorhands",
        "raas",
        "snapkv",
        "r-kv",
        "random",
        "knorm",
        "keydiff",
        "tri-attention",
        "lagkv",
        "dropkv",
        "vase-attnv",
        "vase-dkv",
        "lazy",
        "lazy-reference",
        "lazy-guarded",
        "lagged-h2o",
        "lagged-raas",
        "lagged-random",
        "lagged-snapkv",
    ];
    for policy in policies {
        let own: Vec<&Value> = rows.iter().filter(|row| row["method"] == policy).collect();
        assert_eq!(own.len(), 2, "{policy}");
        assert_eq!(own[0]["budget"], 24);
        assert_eq!(own[1]["perplexity"], rows[0]["perplexity"], "{policy}");
        for row in own {
            assert_eq!(row["perplexity_dense"], rows[0]["perplexity"]);
            assert!(
                row["kv_bytes"].as_u64() <= row["kv_bytes_full"].as_u64(),
                "{policy}"
            );
            let fields = [
                "state_bytes",
                "tokens_per_second",
                "tokens_per_second_dense",
                "tokens_held",
            ];
            assert!(fields.iter().all(|field| row[field].is_number()), "{row}");
        }
    }
    let random = rows.iter().find(|row| row["method"] == "random").unwrap();
    assert_eq!(
        (&random["role"], &random["spread"]["perplexity"]["runs"]),
        (&json!("control"), &json!(3))
    );
    let h2o = rows.iter().find(|row| row["method"] == "h2o").unwrap();
    assert!(number(h2o, "kv_bytes") < 0.6 * number(h2o, "kv_bytes_full"));
}

#[test]
fn every_policy_runs_in_every_storage_and_the_first_full_cache_is_the_reference() {
    let scene = model();
    let run = |more: &[&str]| {
        let flags = ["--policy", "knorm,snapkv", "--budget", "40"];
        rows(&on_scene(&scene, &[&flags, more].concat()))
    };
    let all = run(&["--kv-dtype", "f16,int8,k8v4,int4"]);
    let methods: Vec<&str> = all
        .iter()
        .map(|row| row["method"].as_str().unwrap())
        .collect();
    let of = |method: &str| {
        let at = methods.iter().position(|name| *name == method);
        &all[at.unwrap_or_else(|| panic!("{method} of {methods:?}"))]
    };
    assert_eq!(methods[0], "full");
    assert_eq!(methods.len(), 4 + 4 * 2);
    for storage in ["int8", "k8v4", "int4"] {
        assert!(of(&format!("full+{storage}"))["budget"].is_null());
        let packed = of(&format!("knorm+{storage}"));
        assert!(packed["kv_bytes"].as_u64() <= of("full")["kv_bytes"].as_u64());
        assert_eq!(packed["kv_bytes_full"], of("full")["kv_bytes"]);
        assert_eq!(packed["evicts"], "while decoding");
    }
    assert_eq!(of("snapkv")["evicts"], "after the prompt");
    let exact = run(&["--kv-dtype", "f32"]);
    let gap = number(&exact[0], "nll") - number(&all[0], "nll");
    assert!(gap.abs() < 1e-3 && number(&exact[0], "kv_bytes") > number(&all[0], "kv_bytes"));
}

#[test]
fn budgets_of_bytes_give_each_policy_the_tokens_that_fit() {
    let scene = model();
    let flags = [
        "--policy",
        "knorm,h2o",
        "--budget",
        "0.5",
        "--budget-of",
        "bytes",
        "--kv-dtype",
        "f16,int4",
    ];
    let rows = asked(&on_scene(&scene, &flags));
    let held = |method: &str| {
        let row = rows.iter().find(|row| row["method"] == method).unwrap();
        number(row, "tokens_held")
    };
    // State takes room. In so short a window nothing has been quantised yet.
    assert!(
        held("h2o") < held("knorm"),
        "{} {}",
        held("h2o"),
        held("knorm")
    );
    assert_eq!(held("knorm"), held("knorm+int4"));
}

#[test]
fn results_do_not_depend_on_how_windows_are_batched() {
    let scene = model();
    let flags = [
        "--policy",
        "random,h2o,lazy,r-kv",
        "--budget",
        "20",
        "--batch",
    ];
    let run = |batch: &'static str| asked(&on_scene(&scene, &[&flags[..], &[batch]].concat()));
    for (one, three) in run("1").iter().zip(run("3")) {
        let gap = number(one, "nll") - number(&three, "nll");
        assert!(gap.abs() < 1e-5, "{} {gap}", one["method"]);
        assert_eq!(one["kv_bytes"], three["kv_bytes"]);
        assert_eq!(one["state_bytes"], three["state_bytes"]);
    }
}

#[test]
fn bad_input_is_one_line_that_names_it() {
    let scene = model();
    let with = |more: &[&str]| error(&on_scene(&scene, more));
    let small = with(&["--policy", "h2o,streaming", "--budget", "32,4"]);
    assert!(
        small.contains("--policy streaming --budget 4") && small.contains("sinks 4"),
        "{small}"
    );
    assert!(with(&["--policy", "oracle"]).contains("--policy oracle"));
    assert!(with(&["--prompt", "64"]).contains("--prompt 64"));
    assert!(with(&["--window", "65"]).contains("--window 65"));
    let other = scene.path("model");
    let other = error(&kv(&[
        "--task",
        "recall",
        "--model",
        other.to_str().unwrap(),
    ]));
    assert!(
        other.contains("--model") && other.contains("recall"),
        "{other}"
    );
    assert!(error(&kv(&["--task", "trace", "--window", "20"])).contains("--window 20"));
    assert!(error(&kv(&["--task", "recall", "--prompt", "120"])).contains("--prompt 120"));
    for usage in [
        &["--budget", "1.5"][..],
        &["--budget", "0"],
        &["--policy", "lru"],
        &["--policy", "h2o"],
        &["--task", "recall", "--trace", "drift"],
        &["--task", "trace", "--save", "x"],
        &["--task", "trace", "--trace", "nowhere"],
    ] {
        let output = kv(usage);
        assert_eq!(output.status.code(), Some(2), "{usage:?}");
        assert!(output.stdout.is_empty());
    }
}

#[shared_data::needed("models/stories260K", "data/text")]
#[test]
fn a_trained_model_has_its_known_perplexity_and_loses_under_eviction() {
    let model = Path::new(shared_data::path!("models/stories260K"));
    let text = Path::new(shared_data::path!("data/text/tinystories_valid_30KB.txt"));
    let flags = [
        "--window",
        "256",
        "--prompt",
        "1",
        "--policy",
        "streaming",
        "--budget",
        "32",
    ];
    let rows = asked(&on(model, text, &flags));
    let (full, streaming) = (
        number(&rows[0], "perplexity"),
        number(&rows[1], "perplexity"),
    );
    assert!((full / 6.316452 - 1.0).abs() < 1e-5, "{full}");
    assert!(streaming > 1.02 * full, "{streaming}");
}
