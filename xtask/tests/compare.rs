//! `cargo xtask report`: two reports beside each other.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use xtask::compare::Comparison;
use xtask::report::Report;
use xtask::row::Row;

fn compare(before: &Path, after: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("report")
        .args([before, after])
        .args(more)
        .output()
        .unwrap()
}

fn write(dir: &Path, name: &str, report: &Report) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, report.to_json().unwrap()).unwrap();
    path
}

/// The row of `method`, the first of several.
fn row<'a>(report: &'a mut Report, method: &str) -> &'a mut Row {
    let mut rows = report.sections.iter_mut().flat_map(|s| &mut s.rows);
    rows.find(|row| row.method == method).unwrap()
}

/// Field, before, after and noise of a change.
type Seen = (String, Option<f64>, Option<f64>, Option<String>);

fn changes(before: &Report, after: &Report) -> Vec<Seen> {
    let rows = Comparison::new(before, after).unwrap().rows;
    let changes = rows.into_iter().flat_map(|row| row.changes);
    changes
        .map(|c| (c.field, c.before, c.after, c.noise))
        .collect()
}

#[test]
fn a_report_does_not_differ_from_itself() {
    let report = common::report();
    let comparison = Comparison::new(&report, &report).unwrap();
    assert!(comparison.rows.is_empty() && comparison.circumstances.is_empty());
    assert!(comparison.only_before.is_empty() && comparison.only_after.is_empty());
    assert_eq!(comparison.matched, report.rows().count());
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a.json", &report);
    let output = compare(&path, &path, &[]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("0 numbers changed"), "{text}");
}

#[test]
fn rows_are_matched_by_what_they_are_and_not_by_their_place() {
    let (before, mut after) = (common::report(), common::report());
    after.sections[0].rows.reverse();
    assert_eq!(changes(&before, &after), []);
    row(&mut after, "flap").ratio = Some(0.9);
    let comparison = Comparison::new(&before, &after).unwrap();
    let key = |ratio: f64| json!({"suite": "structured", "method": "flap", "ratio": ratio});
    // The rows were reversed: the first flap is the one of the largest ratio.
    assert_eq!(
        comparison.only_before,
        [key(0.5).as_object().unwrap().clone()]
    );
    assert_eq!(
        comparison.only_after,
        [key(0.9).as_object().unwrap().clone()]
    );
}

#[test]
fn quality_is_exact_and_timings_are_allowed_their_noise() {
    let (before, mut after) = (common::report(), common::report());
    let changed = row(&mut after, "flap");
    changed.seconds = 440.0;
    changed.tokens_per_second = Some(2.0 * changed.tokens_per_second.unwrap());
    changed.perplexity = Some(16.0);
    let then = before.rows().find(|row| row.method == "flap").unwrap();
    let noisy = Some("single runs differ by 10 %".to_owned());
    let expected = [
        ("perplexity", then.perplexity, Some(16.0), None),
        (
            "tokens_per_second",
            then.tokens_per_second,
            then.tokens_per_second.map(|x| 2.0 * x),
            None,
        ),
        ("seconds", Some(431.7), Some(440.0), noisy),
    ];
    let expected =
        expected.map(|(name, before, after, noise)| (name.to_owned(), before, after, noise));
    assert_eq!(changes(&before, &after), expected);
    after.machine.cores = 2;
    let other = Some("under other circumstances".to_owned());
    assert!(
        changes(&before, &after)[1..]
            .iter()
            .all(|change| change.3 == other)
    );
}

#[test]
fn seeds_and_standard_errors_say_what_is_chance() {
    let (before, mut after) = (common::report(), common::report());
    let seeds = row(&mut after, "random");
    let mean = seeds.perplexity.unwrap();
    seeds.perplexity = Some(1.1 * mean);
    let noise = |before: &Report, after: &Report| changes(before, after).remove(0).3;
    assert_eq!(
        noise(&before, &after).as_deref(),
        Some("ranges of the seeds overlap")
    );
    let far = row(&mut after, "random")
        .spread
        .get_mut("perplexity")
        .unwrap();
    (far.min, far.max) = (2.0 * mean, 3.0 * mean);
    assert_eq!(noise(&before, &after), None);

    let share = |accuracy: f64| {
        let mut report = common::report();
        let row = row(&mut report, "flap");
        row.accuracy = Some(accuracy);
        row.extra.insert("accuracy_stderr".into(), json!(0.03));
        report
    };
    let within = Some("within 2 standard errors".to_owned());
    // 2 · sqrt(0.03² + 0.03²) = 0.0849.
    assert_eq!(noise(&share(0.5), &share(0.58)), within);
    assert_eq!(noise(&share(0.5), &share(0.59)), None);
}

#[test]
fn other_machines_and_protocols_are_named() {
    let (before, mut after) = (common::report(), common::report());
    after.machine.cpu = "Other CPU".into();
    after.seed = 1;
    after.sections[0]
        .protocol
        .insert("window".into(), json!(512));
    after.sections[0].protocol.remove("BOS");
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (
        write(dir.path(), "a.json", &before),
        write(dir.path(), "b.json", &after),
    );
    let text = String::from_utf8(compare(&before, &after, &[]).stdout).unwrap();
    for line in [
        "machine, cpu: Example CPU 3000 <8-core> → Other CPU",
        "run, seed: 42 → 1",
        "Structured pruning, window: 256 → 512",
        "Structured pruning, BOS: yes, in every window → –",
        "Measures of different protocols cannot be compared.",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let json = compare(&before, &after, &["--json"]);
    assert!(json.status.success());
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["circumstances"].as_array().unwrap().len(), 4);
    assert_eq!(json["circumstances"][0]["after"], "Other CPU");
}

#[test]
fn the_terminal_shows_before_after_and_change_within_its_width() {
    let (before, mut after) = (common::report(), common::report());
    let changed = row(&mut after, "flap");
    changed.perplexity = changed.perplexity.map(|x| 1.5 * x);
    changed.params = None;
    changed.peak_rss_bytes = Some(1 << 30);
    after.sections.pop();
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (
        write(dir.path(), "a.json", &before),
        write(dir.path(), "b.json", &after),
    );
    let text = String::from_utf8(compare(&before, &after, &[]).stdout).unwrap();
    for part in [
        "+50.0 %",
        "Quality and size",
        "Time and memory",
        "1.00 GiB",
        "Rows before alone",
        "kv · lazy",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let longest = text
        .lines()
        .filter(|l| !l.starts_with("Before") && !l.starts_with("After"));
    assert!(
        longest.map(|line| line.chars().count()).max() <= Some(100),
        "{text}"
    );
}

#[test]
fn what_is_no_report_is_one_line_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let good = write(dir.path(), "good.json", &common::report());
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    for bad in [
        file("text.json", "text"),
        file("other.json", "{\"schema\": 1}"),
        file("newer.json", "{\"schema\": 2}"),
        dir.path().join("absent.json"),
    ] {
        for (before, after) in [(&good, &bad), (&bad, &good)] {
            let output = compare(before, after, &[]);
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1));
            let name = bad.file_name().unwrap().to_str().unwrap();
            assert!(
                stderr.lines().count() == 1 && stderr.contains(name),
                "{stderr}"
            );
            assert!(output.stdout.is_empty());
        }
    }
}
