//! KV-cache eviction and quantisation: what policies and storage cost at equal budgets or bytes, in perplexity, in attention on recorded traces, in recall and in
//! questions about long contexts; and what they save in time.

mod bootstrap;
pub(crate) mod calibration;
mod controls;
pub mod long_context;
mod peak;
pub mod perplexity;
pub mod policy;
pub mod recall;
mod recording;
mod rows;
mod several;
pub mod speed;
pub mod trace;
mod verdict;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use causal_lm::Model;
use serde_json::json;

use crate::settings::{Settings, once};
pub use calibration::Calibration;
use eval_report::{Budget, Row, Section, format};
use policy::{Choice, PromptRule};
pub use rows::FULL;
use rows::SUITE;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Policies, each with its storage, in the order of the table; the full cache in other storage than the first's is one of them.
    pub policies: Vec<Choice>,
    /// The full cache that all are compared with.
    pub full: Choice,
    /// Budgets are of the full cache's bytes, not of its tokens.
    pub by_bytes: bool,
    /// Budgets, in the order of the table.
    pub budgets: Vec<Budget>,
    /// Runs of whatever draws.
    pub seeds: usize,
    /// What happens to prompts.
    pub prompt_rule: PromptRule,
    /// α: the weight from which LazyEviction, RaaS and the statistics of recurrence take a token as active.
    pub alpha: f32,
    /// Where statistics of the model's queries come from; the sequence's own queries where nothing is said.
    pub calibration: Option<Calibration>,
    /// On what.
    pub task: Task,
}

/// What policies are put to.
#[derive(Debug, Clone)]
pub enum Task {
    /// Decode-time perplexity of a text, one entry a model.
    Perplexity(Vec<perplexity::Text>),
    /// The attention kept on traces.
    Trace(trace::Traces),
    /// The answers of a model trained to recall.
    Recall(recall::Recall),
    /// The answers of a chat model to questions about a long context.
    LongContext(long_context::LongContext),
    /// The speed of generation after a long context.
    Speed(speed::Speed),
}

impl Config {
    /// Decode-time perplexity of a text, without policies and budgets, all else by default.
    pub fn on_text(text: super::perplexity::Config) -> Self {
        Self {
            policies: Vec::new(),
            full: Choice::full(),
            by_bytes: false,
            budgets: Vec::new(),
            seeds: 3,
            prompt_rule: PromptRule::Own,
            alpha: policy::ALPHA,
            calibration: None,
            task: Task::Perplexity(vec![perplexity::Text {
                text,
                prompt: None,
                batch: None,
            }]),
        }
    }

    /// The models it reads, which may be names on a hub.
    pub(crate) fn models(&mut self) -> Vec<&mut PathBuf> {
        match &mut self.task {
            Task::Perplexity(texts) => texts.iter_mut().map(|t| &mut t.text.model).collect(),
            Task::Trace(traces) => traces.recorded.iter_mut().map(|t| &mut t.model).collect(),
            Task::Recall(recall) => recall.model.iter_mut().collect(),
            Task::LongContext(task) => vec![&mut task.model],
            Task::Speed(speed) => speed.model.iter_mut().collect(),
        }
    }

    /// The texts that are evaluated on.
    fn texts(&self) -> Vec<&Path> {
        match &self.task {
            Task::Perplexity(texts) => texts.iter().map(|t| t.text.text.as_path()).collect(),
            Task::Trace(traces) => traces.recorded.iter().map(|t| t.text.as_path()).collect(),
            Task::Recall(_) | Task::LongContext(_) | Task::Speed(_) => Vec::new(),
        }
    }

    /// Runs of a policy on data that are given: several only where the policy itself draws.
    fn runs(&self, choice: &Choice) -> usize {
        if choice.draws() { self.seeds } else { 1 }
    }

    /// Runs of all cells, draws included.
    pub(crate) fn all_runs(&self) -> usize {
        self.cells()
            .iter()
            .map(|(choice, _)| self.runs(choice))
            .sum()
    }

    /// Every cell but the full cache's own: what evicts at each budget, what keeps all in another storage or has a budget of its own once.
    fn cells(&self) -> Vec<(&Choice, Option<Budget>)> {
        let own = |choice: &&Choice| choice.name != FULL;
        let budgets = |choice| -> Vec<(&Choice, Option<Budget>)> {
            if Choice::is_full(choice) || Choice::is_fixed(choice) {
                return vec![(choice, choice.own_budget())];
            }
            self.budgets.iter().map(|&b| (choice, Some(b))).collect()
        };
        self.policies.iter().filter(own).flat_map(budgets).collect()
    }

    /// What the full cache stores keys and values as, where the model computes in `dtype`.
    fn stored(&self, dtype: candle_core::DType) -> String {
        self.full.stored(dtype)
    }

    /// Tokens of a cell in windows of `window`.
    fn tokens(
        &self,
        choice: &Choice,
        budget: Option<Budget>,
        window: usize,
        model: &Model<'_>,
    ) -> Result<usize> {
        let Some(budget) = budget else {
            return Ok(window);
        };
        if self.by_bytes && !choice.is_fixed() {
            choice.tokens_in_bytes_of(&self.full, budget, window, model)
        } else {
            Ok(policy::tokens(budget, window))
        }
    }

    /// The empty row of a cell in windows of `window` tokens, of which `prompt` are prefilled.
    fn row(&self, choice: &Choice, budget: Option<Budget>, window: usize, prompt: usize) -> Row {
        let mut row = Row {
            budget,
            ..Row::new(SUITE, &choice.name)
        };
        if choice.is_random() {
            row = row.control();
        }
        row.extra.insert("evicts".into(), json!(choice.evicts()));
        let tokens = budget.map_or(window, |budget| policy::tokens(budget, window));
        if choice.keeps_prompt() && tokens <= prompt && tokens < window {
            row.notes.push(format!(
                "keeps the prompt of {}, which leaves its budget of {tokens} no room for any other",
                format::counted(prompt, "token")
            ));
        }
        row
    }
}

/// What an error calls the prompt: the flag where it was given.
pub(crate) fn prompt_name(asked: Option<usize>, prompt: usize) -> String {
    match asked {
        Some(asked) => format!("--prompt {asked}"),
        None => format!(
            "a prompt of {}, as many as by default",
            format::counted(prompt, "token")
        ),
    }
}

/// Measure.
///
/// # Errors
/// A policy that cannot run within a budget, a model, text or trace that cannot be read or run.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    once(
        "--policy",
        config.policies.iter().map(|choice| &choice.name),
    )?;
    let budgets = config.budgets.iter().copied();
    once("--budget", budgets.map(policy::label))?;
    let oracle = config.policies.iter().any(Choice::is_oracle);
    if oracle && !matches!(config.task, Task::Trace(_) | Task::Recall(_)) {
        bail!(
            "--policy oracle needs the attention of the future: it runs under --task trace and --task recall alone"
        );
    }
    let mut sections = match &config.task {
        Task::Perplexity(texts) => perplexity::run(settings, config, texts),
        Task::Trace(traces) => trace::run(settings, config, traces),
        Task::Recall(recall) => settings.whole("recall", || recall::run(settings, config, recall)),
        Task::LongContext(task) => long_context::run(settings, config, task),
        // Lanes run in turn, a step each, so that their speeds can be compared.
        Task::Speed(speed) => settings.whole("speed", || speed::run(settings, config, speed)),
    }?;
    if let Some(first) = sections.first_mut() {
        for model in config.clone().models() {
            first.remarks.extend(settings.weights.other_base(model));
        }
    }
    Ok(sections)
}
