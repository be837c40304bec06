//! Questions about long contexts.

use crate::scene::{error, rows};
use crate::{kv, number};
use serde_json::Value;
use std::process::Command;

#[test]
fn long_contexts_are_cells_that_can_be_shared_and_saved() {
    let scene = tempfile::tempdir().unwrap();
    let (cells, save) = (scene.path().join("cells"), scene.path().join("texts"));
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/model");
    let flags = [
        "--task",
        "long-context",
        "--model",
        model,
        "--questions",
        "copy,gather",
        "--context",
        "400",
        "--samples",
        "2",
        "--seeds",
        "1",
        "--policy",
        "keydiff",
        "--budget",
        "0.5",
    ];
    let whole = rows(&kv(
        &[&flags[..], &["--save", save.to_str().unwrap()]].concat()
    ));
    let controls = ["full+int8", "full+k8v4", "full+int4"];
    assert!(
        controls
            .iter()
            .all(|name| whole.iter().any(|row| row["method"] == *name))
    );
    let saved = std::fs::read_to_string(save.join("gather-400.jsonl")).unwrap();
    let lines: Vec<Value> = saved
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(
        lines[0]["questions"][0]["others"][0]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let folder = ["--cells", cells.to_str().unwrap()];
    for part in ["1/3", "2/3", "3/3"] {
        let output = kv(&[&flags[..], &folder, &["--shard", part]].concat());
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let count = std::fs::read_dir(&cells).unwrap().count();
    assert_eq!(
        count,
        4 + 1,
        "a cell for each context of each question, and run.json"
    );
    let again = rows(&kv(&[&flags[..], &folder].concat()));
    assert_eq!(again.len(), whole.len());
    for (whole, again) in whole.iter().zip(&again) {
        for field in [
            "method",
            "accuracy",
            "choice",
            "nll",
            "recovery_low",
            "bytes_over_full",
        ] {
            assert_eq!(whole[field], again[field], "{field}");
        }
    }
    let short = kv(&[&flags[..7], &["100,400"], &flags[8..]].concat());
    let short = error(&short);
    assert!(
        short.contains("--context 100") && short.contains("too short"),
        "{short}"
    );
}

#[test]
fn flags_that_long_contexts_do_not_read_are_refused_by_name() {
    let run = |more: &[&str]| {
        let model = ["eval", "kv", "--task", "long-context", "--model", "nowhere"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        let output = command.args(model).args(more).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    for (more, says) in [
        (&["--text", "text.txt"][..], "--text"),
        (&["--prompt", "4"], "--prompt"),
        (&["--no-bos"], "--no-bos"),
        (&["--window", "64"], "--window"),
        (&["--trace", "drift"], "--trace"),
        (
            &["--policy", "keydiff", "--calib", "calib.txt"],
            "--calib calib.txt: none of the policies",
        ),
    ] {
        let refused = run(more);
        assert!(refused.contains(says), "{refused}");
    }
}

#[test]
fn questions_about_long_contexts_have_rows_for_policies_and_storage() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/model");
    let flags = [
        "--task",
        "long-context",
        "--model",
        dir,
        "--questions",
        "copy,gather",
        "--context",
        "400",
        "--samples",
        "2",
        "--seeds",
        "1",
        "--policy",
        "keydiff,random",
        "--budget",
        "0.5",
        "--kv-dtype",
        "f16,int8",
        "--budget-of",
        "bytes",
    ];
    for feed in ["whole", "steps"] {
        let all = rows(&kv(&[&flags[..], &["--feed", feed]].concat()));
        let of = |method: &str| -> Vec<&Value> {
            all.iter().filter(|row| row["method"] == method).collect()
        };
        for method in [
            "first token",
            "full",
            "full+int8",
            "keydiff",
            "keydiff+int8",
            "random",
            "random+int8",
        ] {
            assert!(of(method).len() >= 2, "{method} {feed}");
        }
        let detailed = |method: &str| {
            of(method)
                .into_iter()
                .find(|row| row["nll"].is_number())
                .unwrap()
        };
        let (full, int8, half) = (detailed("full"), detailed("full+int8"), detailed("keydiff"));
        assert!((number(full, "recovery") - 1.0).abs() < 1e-9, "{full}");
        assert!(
            (number(full, "nll") - number(int8, "nll")).abs() < 0.05,
            "{full} {int8}"
        );
        assert!(number(int8, "bytes_over_full") < 0.75, "{int8}");
        assert!(number(half, "bytes_over_full") < 0.65, "{half}");
        assert!(number(half, "recovery_low") <= number(half, "recovery"));
        assert!(half["over_random_low"].is_number());
        assert!(half["peak_over_full"].is_number());
        let summary = of("keydiff").into_iter().find(|row| row["nll"].is_null());
        assert!(summary.is_none_or(|row| row["over_random_low"].is_number()));
    }
    let elsewhere = kv(&["--task", "trace", "--context", "400"]);
    assert!(String::from_utf8_lossy(&elsewhere.stderr).contains("--context"));
}
