//! Zero-shot and few-shot tasks: what `lm_eval::tasks` measures, as rows beside the first model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use causal_lm::{BATCH_TOKENS, Decoder, TextTokenizer, Windows};
use eval_report::{Column, DENSE, Row, Section, Stopwatch, format};
use lm_eval::tasks::{Answers, Evaluator, Examples, Layout, Share, Task, TaskOptions};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::perplexity::{WINDOW, file_name};
use crate::estimate::Probe;
use crate::model;
use crate::settings::{Settings, once, one_line, part};

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

/// Where examples come from and how many there are before each question.
#[derive(Debug, Clone, Default)]
pub struct Shots {
    /// Examples before each question.
    pub count: usize,
    /// File they are taken from, its first ones; otherwise the first other questions of the question's own file.
    pub from: Option<PathBuf>,
}

/// Asks every model every question.
///
/// # Errors
/// A file that cannot be read, named, and the failure of the first model where none can be asked.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    once("--model", config.models.iter().map(|path| path.display()))?;
    once("--data", config.data.iter().map(|path| path.display()))?;
    let data = config.data.iter().map(Task::read);
    let data: Vec<Task> = data.collect::<Result<_, _>>()?;
    let from = config.shots.from.as_ref().map(Task::read).transpose()?;
    let count = config.shots.count;
    // Examples of the question's own file would have the question and its answer among them.
    let is_own = |task: &Task, from: &Task| {
        let there = from.path.canonicalize();
        there.is_ok_and(|there| task.path.canonicalize().is_ok_and(|path| path == there))
    };
    let examples = data.iter().map(|task| match &from {
        Some(from) if !is_own(task, from) => Examples::of_file(count, task, from),
        _ => Examples::of_task(count, task),
    });
    let examples: Vec<Examples<'_>> = examples
        .collect::<Result<_, _>>()
        .with_context(|| format!("--shots {count}"))?;
    if let Some(dir) = &config.log_samples {
        eval_report::prepare(dir).context("--log-samples")?;
    }
    let names = labels(&config.models);
    let tasks: Vec<(&Task, &Examples<'_>)> = data.iter().zip(&examples).collect();
    let mut asked = AllAsked::default();
    let mut failures = Vec::new();
    for (number, (path, name)) in config.models.iter().zip(&names).enumerate() {
        // A model that cannot be asked leaves the others.
        let done = asked.add(settings, config, (number, path, name), &tasks);
        if let Err(error) = done {
            failures.push(error.context(path.display().to_string()));
        }
    }
    let AllAsked { rows, bos, .. } = asked;
    if rows.is_empty() && !failures.is_empty() {
        return Err(failures.swap_remove(0));
    }
    let failures: Vec<String> = failures.iter().map(one_line).collect();
    if settings.is_part() {
        return Ok(part(failures));
    }
    let names: Vec<String> = config.data.iter().map(|path| file_name(path)).collect();
    let facts = |section: Section| {
        let section = settings
            .weights
            .facts(section, None)
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
    let others = config.models.iter();
    let others = others.filter_map(|model| settings.weights.other_base(model));
    let others: Vec<String> = others.collect();
    let sections = [
        choice_section(of_kind(false)),
        generation_section(of_kind(true)).fact("tokens at most", config.max_new_tokens),
    ];
    let asked = |section: &Section| !section.rows.is_empty();
    let mut sections: Vec<Section> = sections.into_iter().filter(asked).map(facts).collect();
    if let Some(first) = sections.first_mut() {
        first.failures = failures;
        first.remarks.extend(others);
    }
    Ok(sections)
}

/// What all models have answered.
#[derive(Default)]
struct AllAsked {
    rows: Vec<(Layout, Row)>,
    /// Of the first model that could be asked, by task.
    dense: Vec<Option<Asked>>,
    bos: bool,
}

impl AllAsked {
    /// Asks a model every question.
    fn add(
        &mut self,
        settings: &Settings,
        config: &Config,
        (number, path, name): (usize, &Path, &String),
        tasks: &[(&Task, &Examples<'_>)],
    ) -> Result<()> {
        let checkpoint = settings.weights.open(path)?;
        let decoder = model::decoder(settings, &checkpoint)?;
        let weights = decoder.weights()?;
        let evaluator = evaluator(settings, config, path, &decoder)?;
        self.bos |= evaluator.bos();
        self.dense.resize(tasks.len(), None);
        settings.expect(name, || seconds(settings, config, (path, &decoder), tasks));
        for (i, &(data, examples)) in tasks.iter().enumerate() {
            let cell = format!("{}: {} {i}", path.display(), data.name());
            if let Some(dir) = &config.log_samples {
                settings.written(&cell, "--log-samples", &samples(dir, name, data))?;
            }
            let asked = settings.cells.get(&cell, || {
                let method = if number == 0 { DENSE } else { name };
                let mut row = Row::new("tasks", method);
                row.model = Some(name.clone());
                let answers = ask(settings, config, &evaluator, data, examples, &mut row)?;
                row.params = Some(checkpoint.parameters());
                row.bytes = Some(checkpoint.total_bytes());
                settings.weights.fill(&mut row, &weights);
                if let Some(dir) = &config.log_samples {
                    save(&samples(dir, name, data), &answers).context("--log-samples")?;
                }
                let correct = answers.correct;
                anyhow::Ok(Asked { row, correct })
            })?;
            let Some(mut asked) = asked else { continue };
            match &self.dense[i] {
                Some(dense) => compare(&mut asked, dense),
                None if number == 0 => self.dense[i] = Some(asked.clone()),
                None => {}
            }
            self.rows.push((data.layout, asked.row));
        }
        Ok(())
    }
}

/// About how long a model takes: its questions with their examples are read, and answers generated, half of the most tokens.
fn seconds(
    settings: &Settings,
    config: &Config,
    (path, decoder): (&Path, &Decoder<'_>),
    tasks: &[(&Task, &Examples<'_>)],
) -> Result<f64> {
    let tokenizer = TextTokenizer::open(path)?;
    let (mut read, mut written, mut sample) = (0, 0, Vec::new());
    for (data, _) in tasks {
        let all = data.items.len();
        let count = settings.samples.unwrap_or(all).min(all);
        let tokens = tokenizer.encode_file(&data.path)?;
        read += tokens.len() * count / all * (1 + config.shots.count);
        if data.layout.is_generated() {
            written +=
                count.saturating_mul(config.max_new_tokens.min(decoder.config().max_positions)) / 2;
        }
        sample.extend_from_slice(&tokens[..tokens.len().min(BATCH_TOKENS)]);
    }
    if sample.len() < 2 {
        return Ok(0.0);
    }
    let window = WINDOW.min(decoder.config().max_positions).min(sample.len());
    let probe = Probe::of(decoder, &Windows::cut(&sample, window, None)?)?;
    Ok(probe.pass(read) + probe.decode(written))
}

/// A row, and which questions were answered right.
#[derive(Clone, Serialize, Deserialize)]
struct Asked {
    row: Row,
    correct: Vec<bool>,
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

fn evaluator<'a>(
    settings: &Settings,
    config: &Config,
    path: &Path,
    decoder: &'a Decoder<'a>,
) -> Result<Evaluator<'a>> {
    let evaluator = Evaluator::new(decoder, TextTokenizer::open(path)?);
    let evaluator = match config.bos {
        true => evaluator,
        false => evaluator.without_bos(),
    };
    match settings.window {
        None => Ok(evaluator),
        Some(window) => evaluator
            .with_positions(window)
            .with_context(|| format!("--window {window}")),
    }
}

/// Asks one model the questions of one file.
fn ask(
    settings: &Settings,
    config: &Config,
    evaluator: &Evaluator<'_>,
    data: &Task,
    examples: &Examples<'_>,
    row: &mut Row,
) -> Result<Answers> {
    let mut options = TaskOptions::default();
    options.questions = settings.samples;
    options.max_new_tokens = config.max_new_tokens;
    let progress = settings.bar(data.name(), 0);
    let watch = Stopwatch::start();
    let answers = evaluator.answer(data, examples, &options, &progress);
    let answers = answers.map_err(|error| {
        let no_room = matches!(error, lm_eval::Error::NoRoom { .. });
        let error = anyhow::Error::new(error);
        match no_room {
            true => error.context(format!("--max-new-tokens {}", config.max_new_tokens)),
            false => error,
        }
    })?;
    watch.stop(row);
    let (accuracy, second) = (answers.accuracy(), answers.second_accuracy());
    let second_name = second_measure(data.layout);
    let extra = &mut row.extra;
    extra.insert("task".into(), json!(data.name()));
    extra.insert("items".into(), json!(answers.correct.len()));
    extra.insert(second_name.into(), json!(second.value));
    for (name, share) in [("accuracy", accuracy), (second_name, second)] {
        if let Some(error) = share.standard_error {
            extra.insert(format!("{name}_stderr"), json!(error));
        }
    }
    row.accuracy = Some(accuracy.value);
    row.tokens_per_second = Some(answers.tokens_per_second);
    if answers.truncated > 0 {
        row.notes.push(format!(
            "{}: cut on the left to fit into {} positions: {}",
            data.name(),
            evaluator.positions(),
            format::counted(answers.truncated, "prompt")
        ));
    }
    Ok(answers)
}

/// What is measured beside accuracy.
fn second_measure(layout: Layout) -> &'static str {
    match layout.is_generated() {
        true => "flexible_extract",
        false => "acc_norm",
    }
}

/// Fills in what the same questions gave with the first model. Speeds were measured one after the other, whatever else the
/// machine did meanwhile, and are not compared.
fn compare(asked: &mut Asked, dense: &Asked) {
    let row = &mut asked.row;
    row.accuracy_dense = dense.row.accuracy;
    row.params_dense = dense.row.params;
    row.bytes_dense = dense.row.bytes;
    let flips = Share::flips(&asked.correct, &dense.correct);
    row.extra.insert("flips".into(), json!(flips.value));
}

/// The file of what was scored or generated: `MODEL-TASK.jsonl`.
fn samples(dir: &Path, model: &str, data: &Task) -> PathBuf {
    let model = model
        .trim_start_matches(['.', '/'])
        .replace(['/', '\\'], "-");
    dir.join(format!("{model}-{}.jsonl", data.name()))
}

/// Writes what was scored or generated, a JSON object a line.
fn save(path: &Path, answers: &Answers) -> Result<()> {
    let mut lines = String::new();
    for sample in &answers.samples {
        lines += &serde_json::to_string(sample)?;
        lines.push('\n');
    }
    Ok(tensor_io::atomic::write(path, lines.as_bytes())?)
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
        Column::Extra("weight_bytes".into()),
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
