//! The command line as scripts see it: exit codes, stdout and stderr.

use std::process::{Command, Output};

fn xtask(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .output()
        .unwrap()
}

fn assert_usage(args: &[&str], names: &str) {
    let output = xtask(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(stderr.contains(names), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty());
}

#[test]
fn wrong_usage_ends_with_2_and_names_what_is_wrong() {
    let structured = [
        "eval",
        "structured",
        "--model",
        "m",
        "--text",
        "t",
        "--calib",
        "c",
    ];
    let with = |more: &[&'static str]| [&structured[..], more].concat();
    assert_usage(&[], "Usage");
    assert_usage(&["eval", "nonsense"], "nonsense");
    assert_usage(&["eval", "perplexity", "--text", "t"], "--model");
    assert_usage(
        &[
            "eval",
            "perplexity",
            "--model",
            "m",
            "--text",
            "t",
            "--window",
            "1",
        ],
        "--window",
    );
    assert_usage(
        &[
            "eval",
            "perplexity",
            "--model",
            "m",
            "--text",
            "t",
            "--threads",
            "0",
        ],
        "--threads",
    );
    assert_usage(&with(&["--max-shard-bytes", "1"]), "--save");
    assert_usage(&with(&["--method", "flap,flop", "--ratio", "0.1"]), "flop");
    assert_usage(&with(&["--method", "flap", "--ratio", "0.1,1.0"]), "1.0");
    assert_usage(&with(&["--method", "flap", "--ratio", "NaN"]), "NaN");
    // By default nothing is evicted.
    let chain = ["eval", "chain", "--model", "m", "--budget", "0.5"];
    assert_usage(&chain, "--budget: --policy full keeps all tokens");
    let generate = ["generate", "--model", "m", "--prompt", "a", "--budget", "9"];
    assert_usage(&generate, "--budget: --policy full keeps all tokens");
}

/// The values of `flag` that `eval SUITE --help` lists.
fn listed(suite: &str, flag: &str) -> Vec<String> {
    let help = String::from_utf8(xtask(&["eval", suite, "--help"]).stdout).unwrap();
    let (_, of_flag) = help.split_once(&format!("      {flag} <")).unwrap();
    let (of_flag, _) = of_flag.split_once("\n      --").unwrap_or((of_flag, ""));
    let (_, values) = of_flag.split_once("[possible values: ").unwrap();
    let (values, _) = values.split_once(']').unwrap();
    values.split(", ").map(String::from).collect()
}

#[test]
fn every_method_that_help_lists_is_accepted_and_described_in_the_readme_of_its_crate() {
    let structured = include_str!("../../crates/prune-structured/README.md");
    let kv = include_str!("../../crates/kv-lazy/README.md");
    for (suite, flag, more, readme) in [
        (
            "structured",
            "--method",
            &["--ratio", "0.5"][..],
            structured,
        ),
        ("kv", "--policy", &["--task", "trace", "--text", "t"], kv),
    ] {
        let names = listed(suite, flag);
        assert!(names.len() > 20, "{names:?}");
        let all = names.join(",");
        let start = ["eval", suite, "--model", "no-such-model", flag, &all];
        let output = xtask(&[&start[..], more].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        // Not 2, wrong usage: the names are read before the model is opened.
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("no-such-model"), "{stderr}");
        let is_of_name = |c: char| c.is_alphanumeric() || c == '-';
        let described: Vec<&str> = readme.split(|c| !is_of_name(c)).collect();
        for name in &names {
            let name = name.strip_prefix("lagged-").unwrap_or(name);
            assert!(described.contains(&name), "{name}: not in the README");
        }
    }
}

#[test]
fn a_failed_run_ends_with_1_and_one_line_that_names_the_cause() {
    let taken = tempfile::NamedTempFile::new().unwrap();
    let out = taken.path().to_str().unwrap();
    let output = xtask(&[
        "eval",
        "perplexity",
        "--model",
        "m",
        "--text",
        "t",
        "--json",
        "--out",
        out,
    ]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.starts_with("error: --out: ") && stderr.contains(out),
        "{stderr}"
    );
    assert!(output.stdout.is_empty());
}

fn hub_error(model: &str) -> String {
    let output = xtask(&["eval", "perplexity", "--model", model, "--text", "t"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), stderr.lines().count()),
        (Some(1), 1),
        "{stderr}"
    );
    stderr
}

#[test]
fn a_name_that_is_no_models_says_what_is_expected() {
    let error = hub_error("hf:gpt2");
    assert!(
        error.contains("--model hf:gpt2: expected a folder, or hf:OWNER/NAME"),
        "{error}"
    );
}

#[cfg(not(feature = "hub"))]
#[test]
fn a_build_that_cannot_fetch_models_says_so() {
    let error = hub_error("hf:owner/name");
    assert!(
        error.contains("--model hf:owner/name: ") && error.contains("without the feature `hub`"),
        "{error}"
    );
}

/// A report of one row.
fn report(perplexity: f64) -> eval_report::Report {
    let mut report = eval_report::Report::default();
    let row = eval_report::Row {
        perplexity: Some(perplexity),
        ..eval_report::Row::new("perplexity", eval_report::DENSE)
    };
    let section = eval_report::Section {
        title: "Perplexity".into(),
        rows: vec![row],
        ..Default::default()
    };
    report.push(section).unwrap();
    report
}

#[test]
fn two_reports_are_compared_as_text_and_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, perplexity: f64| {
        let path = dir.path().join(name);
        std::fs::write(&path, report(perplexity).to_json().unwrap()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (before, after) = (write("a.json", 2.0), write("b.json", 3.0));
    let output = xtask(&["report", &before, &after]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("+50.0 %"), "{text}");
    let output = xtask(&["report", &before, &after, "--json"]);
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["rows"][0]["changes"][0]["relative"], 0.5);
    for (before, after) in [
        (&before, "absent.json"),
        (&"absent.json".into(), after.as_str()),
    ] {
        let output = xtask(&["report", before, after]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(
            stderr.lines().count() == 1 && stderr.contains("absent.json"),
            "{stderr}"
        );
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn the_version_is_that_of_the_build_wherever_the_program_runs() {
    let elsewhere = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("--version")
        .current_dir(&elsewhere)
        .env("PATH", "")
        .output()
        .unwrap();
    let version = env!("XTASK_VERSION");
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said.split_whitespace().last(), Some(version), "{said}");
    let commit = version.strip_prefix(env!("CARGO_PKG_VERSION")).unwrap();
    let git = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output();
    match git {
        Ok(head) if head.status.success() => {
            let head = String::from_utf8(head.stdout).unwrap();
            assert_eq!(commit, format!("+{}", head.trim()));
        }
        _ => assert!(commit.is_empty() || commit.starts_with('+'), "{version}"),
    }
}
