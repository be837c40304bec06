//! Reports as their readers see them: files, terminal, page.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use eval_report::{Budget, Column, MemoryScope, Report, Row, Spread, SpreadOver};
use serde_json::Value;

#[test]
fn a_report_survives_the_way_through_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let report = common::report();
    report.write(dir.path()).unwrap();
    let read = Report::read(&dir.path().join("report.json")).unwrap();
    assert_eq!(read, report);
    let again = tempfile::tempdir().unwrap();
    read.write(again.path()).unwrap();
    for name in ["report.json", "report.md", "report.html"] {
        assert_eq!(
            fs::read(dir.path().join(name)).unwrap(),
            fs::read(again.path().join(name)).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn every_field_of_the_schema_has_its_name_and_survives() {
    let names = [
        "suite",
        "method",
        "model",
        "ratio",
        "sparsity",
        "rank",
        "budget",
        "compress",
        "perplexity",
        "perplexity_dense",
        "nll",
        "accuracy",
        "accuracy_dense",
        "params",
        "params_dense",
        "bytes",
        "bytes_dense",
        "loss",
        "loss_uncompensated",
        "kv_bytes",
        "kv_bytes_full",
        "state_bytes",
        "retained_mass",
        "recurring_hit_rate",
        "tokens_per_second",
        "tokens_per_second_dense",
        "speedup",
        "finetune_epochs",
        "seconds",
        "peak_rss_bytes",
        "peak_rss_scope",
        "layers",
        "notes",
        "spread",
        "role",
    ];
    let row = Row {
        model: Some("m".into()),
        ratio: Some(0.1),
        sparsity: Some(0.5),
        rank: Some(8),
        budget: Some(Budget::Share(1.0)),
        compress: Some("wanda-2:4".into()),
        perplexity: Some(1.1),
        perplexity_dense: Some(1.2),
        nll: Some(1.3),
        accuracy: Some(0.9),
        accuracy_dense: Some(0.8),
        params: Some(10),
        params_dense: Some(11),
        bytes: Some(12),
        bytes_dense: Some(13),
        loss: Some(0.1),
        loss_uncompensated: Some(0.2),
        kv_bytes: Some(14),
        kv_bytes_full: Some(15),
        state_bytes: Some(16),
        retained_mass: Some(0.7),
        recurring_hit_rate: Some(0.6),
        tokens_per_second: Some(17.5),
        tokens_per_second_dense: Some(18.5),
        speedup: Some(0.9),
        finetune_epochs: Some(0),
        seconds: 0.1 + 0.2,
        peak_rss_bytes: Some(19),
        peak_rss_scope: MemoryScope::Process,
        spread: [(
            "nll".to_owned(),
            Spread {
                runs: 3,
                min: 1.2,
                max: 1.4,
                over: SpreadOver::Repeats,
            },
        )]
        .into(),
        layers: vec![serde_json::json!({ "layer": 0 })],
        notes: vec!["note".into()],
        ..Row::new("kv", "random").control()
    };
    let value = serde_json::to_value(&row).unwrap();
    let found: BTreeSet<&str> = value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(found, BTreeSet::from(names));
    assert_eq!(serde_json::from_value::<Row>(value).unwrap(), row);
}

#[test]
fn a_budget_with_a_decimal_point_is_a_share_and_one_without_is_tokens() {
    for (budget, json) in [
        (Budget::Share(1.0), "1.0"),
        (Budget::Tokens(1), "1"),
        (Budget::Share(0.25), "0.25"),
    ] {
        assert_eq!(serde_json::to_string(&budget).unwrap(), json);
        assert_eq!(serde_json::from_str::<Budget>(json).unwrap(), budget);
    }
}

#[test]
fn scripts_find_all_rows_in_one_list() {
    let report = common::report();
    let value: Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
    let rows = value["rows"].as_array().unwrap();
    assert_eq!(rows.len(), report.rows().count());
    assert!(rows.iter().all(|row| row["suite"].is_string()
        && row["method"].is_string()
        && row["seconds"].is_number()));
    assert_eq!(value["sections"][1]["rows"]["end"], rows.len());
}

#[test]
fn tables_keep_within_a_hundred_columns_with_the_dense_row_apart() {
    let text = common::report().to_text();
    let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest <= 100, "{widest} columns:\n{text}");
    let lines: Vec<&str> = text.lines().collect();
    let is_rule = |line: &str| !line.is_empty() && line.chars().all(|c| c == '─');
    let dense = lines
        .iter()
        .position(|line| line.trim_start().starts_with("dense"))
        .unwrap();
    assert!(
        is_rule(lines[dense - 1]) && is_rule(lines[dense + 1]),
        "{text}"
    );
    assert!(
        text.contains("134,515,008") && text.contains("1.78 GiB") && text.contains("12.346"),
        "{text}"
    );
    assert!(
        text.contains("320.986 [256.788, 417.281]") && text.contains("structprune-softmax"),
        "cells are not broken:\n{text}"
    );
    assert!(
        !text.contains("accuracy"),
        "a column that nothing measured is left out"
    );
}

#[test]
fn a_name_that_is_too_long_is_broken_and_not_the_table() {
    let mut report = common::report();
    report.sections[0].columns.insert(1, Column::Model);
    for row in &mut report.sections[0].rows {
        row.model = Some("organisation/".repeat(12));
    }
    let text = report.to_text();
    assert!(
        text.lines().all(|line| line.chars().count() <= 100),
        "{text}"
    );
    assert!(text.contains("134,515,008"), "{text}");
}

#[test]
fn markdown_rows_have_as_many_cells_as_their_heading() {
    let dir = tempfile::tempdir().unwrap();
    common::report().write(dir.path()).unwrap();
    let markdown = fs::read_to_string(dir.path().join("report.md")).unwrap();
    let widths: BTreeSet<usize> = markdown
        .lines()
        .filter(|l| l.starts_with('|'))
        .map(|l| l.matches(" | ").count())
        .collect();
    assert_eq!(
        widths.len(),
        2,
        "two tables, two widths: {widths:?}\n{markdown}"
    );
    assert!(markdown.contains("--model 'checkpoints/my model'"));
}

#[test]
fn the_page_needs_nothing_but_itself_and_escapes_names() {
    let dir = tempfile::tempdir().unwrap();
    common::report().write(dir.path()).unwrap();
    let html = fs::read_to_string(dir.path().join("report.html")).unwrap();
    for reference in [
        "://", "src=", "href=", "url(", "@import", "<script", "<link",
    ] {
        assert!(!html.contains(reference), "{reference}");
    }
    assert_eq!(html.matches("<svg").count(), 3);
    assert!(html.contains("Example CPU 3000 &lt;8-core&gt;"));
    let light = html.split("prefers-color-scheme: dark").next().unwrap();
    for i in 0..8 {
        assert_eq!(light.matches(&format!("--series-{i}:")).count(), 1);
        assert_eq!(
            html.matches(&format!("--series-{i}:")).count(),
            2,
            "light and dark"
        );
    }
}

#[test]
fn a_folder_that_cannot_be_written_gives_one_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("taken");
    fs::write(&file, "here first").unwrap();
    let error = format!("{}", common::report().write(&file).unwrap_err());
    assert!(
        error.contains("taken") && error.lines().count() == 1,
        "{error}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "here first");

    let locked = dir.path().join("locked");
    fs::create_dir(&locked).unwrap();
    let mut permissions = fs::metadata(&locked).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&locked, permissions).unwrap();
    if fs::write(locked.join("probe"), "").is_ok() {
        eprintln!("skipped: this user may write into read-only folders");
        return;
    }
    let error = format!("{}", common::report().write(&locked).unwrap_err());
    assert!(
        error.contains("locked") && error.lines().count() == 1,
        "{error}"
    );
    assert_eq!(names(&locked), Vec::<String>::new());
}

#[test]
fn a_file_that_cannot_be_replaced_leaves_nothing_half_written() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("report.json")).unwrap();
    let error = format!("{}", common::report().write(dir.path()).unwrap_err());
    assert!(
        error.contains("report.json") && error.lines().count() == 1,
        "{error}"
    );
    assert_eq!(names(dir.path()), ["report.json"]);
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}
