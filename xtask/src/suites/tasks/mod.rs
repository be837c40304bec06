//! Zero-shot and few-shot tasks: multiple choice by log-likelihood, and generation with exact match.
//!
//! Prompts, choices and measures are those of EleutherAI's lm-evaluation-harness 0.4: arc_easy and arc_challenge 1.0,
//! piqa 1.0, hellaswag 1.0, boolq 2.0, mathqa 1.0 and gsm8k 3.0. `acc` takes the choice of the largest summed log-likelihood, `acc_norm` that of the largest one per character of
//! the choice, without the space that joins it to the question; both take the first of equals. Their standard error is
//! sqrt(p (1 − p) / (n − 1)). The harness leaves out BOS unless it is told `add_bos_token=True`; here BOS stands in front
//! where the tokenizer has one, as for perplexity.

mod choice;
mod exact_match;
mod examples;
mod generation;
mod layout;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use causal_lm::{Decoder, TextTokenizer};
use eval_report::{Column, DENSE, Row, Section, Stopwatch};
use serde_json::{Value, json};
use tensor_io::Checkpoint;

use self::examples::Examples;
pub use self::examples::Shots;
use self::layout::Data;
use super::perplexity::{file_name, open};
use crate::settings::Settings;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Checkpoint folders; the others are compared with the first.
    pub models: Vec<PathBuf>,
    /// Files of questions.
    pub data: Vec<PathBuf>,
    /// Whether BOS stands in front where the tokenizer has it.
    pub bos: bool,
    /// Examples before each question.
    pub shots: Shots,
    /// Tokens generated at most for an answer.
    pub max_new_tokens: usize,
    /// Folder for what was scored or generated for each question.
    pub log_samples: Option<PathBuf>,
}

/// A model with its tokenizer, ready to be asked.
pub(crate) struct Subject<'a> {
    decoder: &'a Decoder<'a>,
    tokenizer: TextTokenizer,
    bos: Option<u32>,
    /// Positions that a sequence may take.
    positions: usize,
}

impl Subject<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = self.tokenizer.encode(text)?;
        Ok(self.bos.into_iter().chain(tokens).collect())
    }
}

/// What a model made of the questions of a file.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// Whether each question was answered right, by the task's first measure.
    first: Vec<bool>,
    /// The same by its second measure.
    second: Vec<bool>,
    /// Prompts that were cut on the left.
    truncated: usize,
    tokens_per_second: f64,
    /// What was scored or generated for each question.
    samples: Vec<Value>,
}

/// Asks every model every question.
///
/// # Errors
/// A model or file that cannot be read or run, named.
pub fn run(common: &Settings, config: &Config) -> Result<Vec<Section>> {
    let data: Vec<Data> = config
        .data
        .iter()
        .map(|path| Data::read(path))
        .collect::<Result<_>>()?;
    let from = config.shots.from.as_deref().map(Data::read).transpose()?;
    let examples: Vec<Examples<'_>> = data
        .iter()
        .map(|data| Examples::new(&config.shots, data, from.as_ref()))
        .collect::<Result<_>>()?;
    if let Some(dir) = &config.log_samples {
        eval_report::prepare(dir).context("--log-samples")?;
    }
    let names = labels(&config.models);
    let mut dense: Vec<(Row, Answers)> = Vec::new();
    let mut rows = Vec::new();
    let mut bos = false;
    for (path, name) in config.models.iter().zip(&names) {
        let named = || path.display().to_string();
        let checkpoint = Checkpoint::open(path)?;
        let decoder = open(common, &checkpoint)?;
        let reach = decoder.config().max_positions;
        let positions = common.window.unwrap_or(reach);
        ensure!(
            positions <= reach,
            "--window {positions}: {} was made for {reach} positions",
            named()
        );
        let tokenizer = TextTokenizer::open(path)?;
        let subject = Subject {
            decoder: &decoder,
            bos: tokenizer.bos().filter(|_| config.bos),
            tokenizer,
            positions,
        };
        bos |= subject.bos.is_some();
        for (i, (data, examples)) in data.iter().zip(&examples).enumerate() {
            let method = if rows.len() < config.data.len() {
                DENSE
            } else {
                name
            };
            let mut row = Row::new("tasks", method);
            row.model = Some(name.clone());
            let answers =
                ask(common, config, &subject, data, examples, &mut row).with_context(named)?;
            if let Some(dir) = &config.log_samples {
                save(dir, name, data, &answers).context("--log-samples")?;
            }
            match dense.get(i) {
                Some((then, of_dense)) => compare(&mut row, &answers, then, of_dense),
                None => dense.push((row.clone(), answers)),
            }
            rows.push((data.layout, row));
        }
    }
    let names: Vec<String> = config.data.iter().map(|path| file_name(path)).collect();
    let facts = |section: Section| {
        let section = section
            .fact("questions", names.join(", "))
            .fact("BOS", bos)
            .fact("shots", config.shots.count);
        match &config.shots.from {
            Some(path) => section.fact("shots from", file_name(path)),
            None => section,
        }
    };
    let of_kind = |generated: bool| -> Vec<Row> {
        let of_kind = rows
            .iter()
            .filter(|(layout, _)| layout.is_generated() == generated);
        of_kind.map(|(_, row)| row.clone()).collect()
    };
    let sections = [
        choice_section(of_kind(false)),
        generation_section(of_kind(true)).fact("tokens at most", config.max_new_tokens),
    ];
    let asked = |section: &Section| !section.rows.is_empty();
    Ok(sections.into_iter().filter(asked).map(facts).collect())
}

/// What the rows call each model: the folder's name, or all of its path where another is named alike.
fn labels(models: &[PathBuf]) -> Vec<String> {
    let names: Vec<String> = models.iter().map(|path| file_name(path)).collect();
    let is_alone = |name: &String| names.iter().filter(|other| *other == name).count() == 1;
    let label = |(name, path): (&String, &PathBuf)| match is_alone(name) {
        true => name.clone(),
        false => path.display().to_string(),
    };
    names.iter().zip(models).map(label).collect()
}

/// Asks one model the questions of one file.
fn ask(
    common: &Settings,
    config: &Config,
    subject: &Subject<'_>,
    data: &Data,
    examples: &Examples<'_>,
    row: &mut Row,
) -> Result<Answers> {
    let count = common.samples.unwrap_or(usize::MAX).min(data.items.len());
    let progress = common.bar(data.name(), count as u64);
    let watch = Stopwatch::start();
    let answers = if data.layout.is_generated() {
        let max = config.max_new_tokens;
        generation::answer(subject, data, examples, count, max, &progress)?
    } else {
        choice::answer(subject, data, examples, count, &progress)?
    };
    watch.stop(row);
    let second = data.layout.second_measure();
    let extra = &mut row.extra;
    extra.insert("task".into(), json!(data.name()));
    extra.insert("items".into(), json!(count));
    extra.insert(second.into(), json!(share(&answers.second)));
    for (name, right) in [("accuracy", &answers.first), (second, &answers.second)] {
        if let Some(error) = standard_error(right) {
            extra.insert(format!("{name}_stderr"), json!(error));
        }
    }
    row.accuracy = Some(share(&answers.first));
    row.tokens_per_second = Some(answers.tokens_per_second);
    row.params = Some(subject.decoder.checkpoint().parameters());
    row.bytes = Some(subject.decoder.checkpoint().total_bytes());
    if answers.truncated > 0 {
        row.notes.push(format!(
            "{}: {} prompts were cut on the left to fit into {} positions",
            data.name(),
            answers.truncated,
            subject.positions
        ));
    }
    Ok(answers)
}

/// Fills in what the same questions gave with the first model.
fn compare(row: &mut Row, answers: &Answers, dense: &Row, of_dense: &Answers) {
    row.accuracy_dense = dense.accuracy;
    row.params_dense = dense.params;
    row.bytes_dense = dense.bytes;
    row.tokens_per_second_dense = dense.tokens_per_second;
    let pairs = answers.first.iter().zip(&of_dense.first);
    let flips: Vec<bool> = pairs.map(|(now, then)| now != then).collect();
    row.extra.insert("flips".into(), json!(share(&flips)));
}

/// Writes what was scored or generated, a JSON object a line, to `MODEL-TASK.jsonl`.
fn save(dir: &Path, model: &str, data: &Data, answers: &Answers) -> Result<()> {
    let model = model
        .trim_start_matches(['.', '/'])
        .replace(['/', '\\'], "-");
    let path = dir.join(format!("{model}-{}.jsonl", data.name()));
    let lines: String = answers
        .samples
        .iter()
        .map(|line| format!("{line}\n"))
        .collect();
    Ok(tensor_io::atomic::write(path, lines.as_bytes())?)
}

fn share(right: &[bool]) -> f64 {
    right.iter().filter(|right| **right).count() as f64 / right.len() as f64
}

/// Standard error of a share; none for a single question.
fn standard_error(right: &[bool]) -> Option<f64> {
    let (p, n) = (share(right), right.len() as f64);
    (right.len() > 1).then(|| (p * (1.0 - p) / (n - 1.0)).sqrt())
}

fn columns(second: &str) -> Vec<Column> {
    let share = |name: &str| Column::ExtraShare(name.into());
    vec![
        Column::Model,
        Column::Extra("task".into()),
        Column::Extra("items".into()),
        Column::Accuracy,
        share("accuracy_stderr"),
        share(second),
        share(&format!("{second}_stderr")),
        share("flips"),
        Column::Params,
        Column::BytesOverDense,
        Column::TokensPerSecond,
        Column::Seconds,
        Column::PeakRss,
    ]
}

fn choice_section(rows: Vec<Row>) -> Section {
    Section {
        title: "Multiple choice".into(),
        prose: "Accuracy takes the choice with the largest summed log-likelihood after the question, acc norm the one \
                with the largest log-likelihood per character; prompts as in lm-evaluation-harness 0.4. The standard \
                errors are those of the draw of questions. Flips are the questions on which a model and the first one \
                are not both right or both wrong (arXiv 2407.09141). Tokens are positions that went through the model; \
                the choices of a question share its context."
            .into(),
        columns: columns("acc_norm"),
        rows,
        ..Section::default()
    }
}

fn generation_section(rows: Vec<Row>) -> Section {
    Section {
        title: "Generated answers".into(),
        prose: "Answers are generated greedily. Accuracy wants the right number after the first ####, flexible extract as \
                the last number (gsm8k 3.0 of lm-evaluation-harness). The standard errors are those of the draw of \
                questions. Flips are the questions on which a model and the first one are not both right or both wrong \
                (arXiv 2407.09141). Tokens are those generated; their time includes the prompts."
            .into(),
        columns: columns("flexible_extract"),
        rows,
        ..Section::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_error_is_that_of_a_mean() {
        // Values 1, 1, 1, 0: sample variance 1/4, over 4 questions.
        assert_eq!(standard_error(&[true, true, true, false]), Some(0.25));
        assert_eq!(standard_error(&[true]), None);
    }
}
