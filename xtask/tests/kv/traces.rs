//! Replayed traces, and a model that is trained to recall.

use crate::scene::{error, rows};
use crate::{kv, model, number, on};

#[test]
fn traces_are_replayed_in_every_storage() {
    let flags = [
        "--task", "trace", "--trace", "planted", "--window", "192", "--seeds", "1",
    ];
    let more = [
        "--policy",
        "keydiff",
        "--budget",
        "96",
        "--kv-dtype",
        "f32,int8,int4",
    ];
    let rows = rows(&kv(&[&flags[..], &more].concat()));
    let of = |method: &str| rows.iter().find(|row| row["method"] == method).unwrap();
    let error = |method: &str| number(of(method), "output_error");
    assert_eq!(rows.len(), 3 + 3);
    assert!(error("full") < 1e-5 && error("full") < error("full+int8"));
    assert!(error("full+int8") < error("full+int4") / 4.0, "{rows:?}");
    assert!(error("full+int4") < error("keydiff+int4"));
    for row in &rows {
        assert_eq!(row["kv_bytes_full"], of("full")["kv_bytes"]);
    }
    assert!(number(of("full+int8"), "kv_bytes") < 0.6 * number(of("full"), "kv_bytes"));
    assert_eq!(
        number(of("full+int4"), "retained_mass"),
        number(of("full"), "retained_mass")
    );
}

#[test]
fn on_traces_no_policy_keeps_more_than_the_oracle() {
    let flags = [
        "--task", "trace", "--window", "192", "--seeds", "2", "--budget", "48", "--policy",
    ];
    let rows = rows(&kv(&[
        &flags[..],
        &["h2o,tova,raas,random,lazy,lagged-random,oracle"],
    ]
    .concat()));
    assert_eq!(rows.len(), 3 * 8);
    for row in &rows {
        assert!(
            row["mri_above_1"].is_number() && row["mri_p80"].is_number(),
            "{row}"
        );
        assert!((0.0..=1.0 + 1e-6).contains(&number(row, "retained_mass")));
        if row["method"] == "full" {
            assert!(number(row, "output_error") < 1e-5 && number(row, "regret") == 0.0);
        } else if row["method"] != "oracle" {
            assert!(number(row, "oracle_gap") > -1e-3, "{row}");
            let lost = 1.0 - number(row, "retained_mass");
            assert!((lost - number(row, "regret")).abs() < 1e-3, "{row}");
        }
    }
}

#[test]
fn a_saved_trace_replays_as_the_recorded_one() {
    let scene = model();
    let save = scene.path("traces");
    let flags = ["--task", "trace", "--policy", "h2o,lazy", "--budget", "20"];
    let more = ["--samples", "1", "--save", save.to_str().unwrap()];
    let (model, text) = (scene.path("model"), scene.path("text.txt"));
    let recorded = rows(&on(&model, &text, &[&flags[..], &more].concat()));
    let file = save.join("trace-0.safetensors");
    let stored = rows(&kv(
        &[&flags[..], &["--trace", file.to_str().unwrap()]].concat()
    ));
    assert_eq!((recorded.len(), stored.len()), (3, 3));
    for (recorded, stored) in recorded.iter().zip(&stored) {
        for field in [
            "retained_mass",
            "recall_at_k",
            "output_error",
            "kv_bytes",
            "mri_above_1",
        ] {
            assert_eq!(recorded[field], stored[field], "{field}");
        }
    }
}

#[test]
fn a_model_trained_to_recall_is_saved_and_answers_again_as_before() {
    let scene = tempfile::tempdir().unwrap();
    let save = scene.path().join("model");
    let save = save.to_str().unwrap();
    let flags = [
        "--task",
        "recall",
        "--policy",
        "streaming,random,h2o",
        "--budget",
        "0.25,0.5",
        "--samples",
        "12",
        "--seeds",
        "2",
    ];
    let trained = rows(&kv(
        &[&flags[..], &["--save", save, "--train-steps", "80"]].concat()
    ));
    let again = rows(&kv(&[&flags[..], &["--model", save]].concat()));
    assert_eq!((trained.len(), again.len()), (4 * 7 + 3, 4 * 7 + 3));
    for (trained, again) in trained.iter().zip(&again) {
        for field in [
            "method",
            "task",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "kv_bytes",
            "area_mqar",
        ] {
            assert_eq!(trained[field], again[field], "{field}");
        }
    }
    for row in trained.iter().filter(|row| row["method"] == "full") {
        assert!(number(row, "accuracy") > 0.9, "{row}");
    }
    let streaming = trained
        .iter()
        .filter(|row| row["method"] == "streaming" && row["budget"] == 0.25);
    for row in streaming.filter(|row| row["task"].is_string()) {
        assert!(
            number(row, "accuracy") < 0.8 * number(row, "accuracy_dense"),
            "{row}"
        );
    }
    assert!(error(&kv(&["--task", "recall", "--save", save])).contains("--save"));
    // What the oracle knows of the future takes no bytes of its budget.
    let bytes = rows(&kv(&[
        "--task",
        "recall",
        "--model",
        save,
        "--policy",
        "oracle,random",
        "--budget",
        "0.5",
        "--budget-of",
        "bytes",
        "--samples",
        "4",
        "--seeds",
        "1",
    ]));
    let held = |method: &str| {
        let row = bytes.iter().find(|row| row["method"] == method);
        number(row.unwrap(), "tokens_held")
    };
    assert!(held("oracle") > 0.0 && held("oracle") <= held("full"));
}
