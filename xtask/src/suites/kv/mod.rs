//! KV-cache eviction: what policies cost at equal budgets, in perplexity, in attention on recorded traces, and in recall; and what they
//! save in time.

mod held;
pub mod perplexity;
pub mod policy;
pub mod recall;
mod rows;
mod several;
pub mod speed;
pub mod trace;
mod verdict;

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::settings::Settings;
use eval_report::{Budget, Row, Section};
use policy::{Choice, PromptRule};
pub use rows::FULL;
use rows::SUITE;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Policies, in the order of the table.
    pub policies: Vec<Choice>,
    /// Budgets, in the order of the table.
    pub budgets: Vec<Budget>,
    /// Runs of whatever draws.
    pub seeds: usize,
    /// What happens to prompts.
    pub prompt_rule: PromptRule,
    /// α: the weight from which LazyEviction, RaaS and the statistics of recurrence take a token as active.
    pub alpha: f32,
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
    /// The speed of generation after a long context.
    Speed(speed::Speed),
}

impl Config {
    /// Decode-time perplexity of a text, without policies and budgets, all else by default.
    pub fn on_text(text: super::perplexity::Config) -> Self {
        Self {
            policies: Vec::new(),
            budgets: Vec::new(),
            seeds: 3,
            prompt_rule: PromptRule::Own,
            alpha: policy::ALPHA,
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
            Task::Speed(speed) => speed.model.iter_mut().collect(),
        }
    }

    /// Runs of a policy on data that are given: several only where the policy itself draws.
    fn runs(&self, choice: &Choice) -> usize {
        if choice.is_random() { self.seeds } else { 1 }
    }

    /// The empty row of a cell in windows of `window` tokens, of which `prompt` are prefilled.
    fn row(&self, choice: &Choice, budget: Budget, window: usize, prompt: usize) -> Row {
        let mut row = Row {
            budget: Some(budget),
            ..Row::new(SUITE, &choice.name)
        };
        if choice.is_random() {
            row = row.control();
        }
        let tokens = policy::tokens(budget, window);
        if choice.keeps_prompt() && tokens <= prompt && tokens < window {
            row.notes.push(format!(
                "keeps the prompt of {prompt} tokens, which leaves its budget of {tokens} no room for any other"
            ));
        }
        row
    }
}

/// Measure.
///
/// # Errors
/// A policy that cannot run within a budget, a model, text or trace that cannot be read or run.
pub fn run(common: &Settings, config: &Config) -> Result<Vec<Section>> {
    let oracle = config.policies.iter().any(Choice::is_oracle);
    if oracle && matches!(config.task, Task::Perplexity(_) | Task::Speed(_)) {
        bail!(
            "--policy oracle needs the attention of the future: it runs under --task trace and --task recall alone"
        );
    }
    match &config.task {
        Task::Perplexity(texts) => perplexity::run(common, config, texts),
        Task::Trace(traces) => trace::run(common, config, traces),
        Task::Recall(recall) => recall::run(common, config, recall),
        Task::Speed(speed) => speed::run(common, config, speed),
    }
}
