//! Two reports compared, as their readers see it.

mod common;

use std::path::Path;

use eval_report::{Comparison, Report, Row};
use serde_json::{Value, json};

fn text(before: &Report, after: &Report) -> String {
    let comparison = Comparison::new(before, after).unwrap();
    comparison.to_text(Path::new("a.json"), Path::new("b.json"))
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
    let text = text(&report, &report);
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
    let other = Some("other machine or settings".to_owned());
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
        Some("the ranges overlap")
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
    let text = text(&before, &after);
    for line in [
        "machine, cpu: Example CPU 3000 <8-core> → Other CPU",
        "run, seed: 42 → 1",
        "Structured pruning, window: 256 → 512",
        "Structured pruning, BOS: yes, in every window → –",
        "Results of different protocols cannot be compared.",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let json: Value = serde_json::to_value(Comparison::new(&before, &after).unwrap()).unwrap();
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
    let text = text(&before, &after);
    for part in [
        "+50.0 %",
        "Quality and size",
        "Time and memory",
        "1.00 GiB",
        "Rows only before",
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
fn a_file_that_is_not_a_report_is_named() {
    let dir = tempfile::tempdir().unwrap();
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
        let error = Report::read(&bad).unwrap_err().to_string();
        let name = bad.file_name().unwrap().to_str().unwrap();
        assert!(
            error.lines().count() == 1 && error.contains(name),
            "{error}"
        );
    }
}

#[test]
fn speeds_with_ranges_are_noise_where_the_ranges_overlap() {
    let with = |speed: f64| {
        let mut report = common::report();
        let row = row(&mut report, "flap");
        row.tokens_per_second = Some(speed);
        let spread = json!({"runs": 3, "min": 0.9 * speed, "max": 1.1 * speed, "over": "repeats"});
        let spread = serde_json::from_value(spread).unwrap();
        row.spread.insert("tokens_per_second".into(), spread);
        report
    };
    let noise = |after: f64| changes(&with(100.0), &with(after)).remove(0).3;
    assert_eq!(noise(118.0).as_deref(), Some("the ranges overlap"));
    assert_eq!(noise(130.0), None);
}
