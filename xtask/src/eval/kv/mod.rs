//! KV-cache eviction: what policies cost at equal budgets, in perplexity, in attention on recorded traces, and in recall; and what they
//! save in time.

mod held;
pub mod perplexity;
pub mod policy;
pub mod recall;
mod several;
pub mod speed;
pub mod trace;
mod verdict;

use anyhow::{Result, bail};

use crate::cli::Common;
use eval_report::{Axis, Budget, Plot, Reference, Role, Row, Section, Series};
use policy::{Choice, PromptRule};
use verdict::Metric;

/// Name of the suite in rows.
const SUITE: &str = "kv";
/// Method of the row that keeps everything.
const FULL: &str = "full";

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
pub fn run(common: &Common, config: &Config) -> Result<Vec<Section>> {
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

/// The share of the window that a row's budget is.
fn share(row: &Row, window: usize) -> Option<f64> {
    Some(match row.budget? {
        Budget::Share(share) => share,
        Budget::Tokens(tokens) => tokens as f64 / window as f64,
    })
}

/// `metric` over the budget as a share of a window of `window`.
fn over_budget(
    title: &str,
    axis: Axis,
    rows: &[Row],
    window: usize,
    metric: &Metric,
    reference: Option<Reference>,
) -> Plot {
    let budget = |row: &Row| share(row, window).map(|share| 100.0 * share);
    Plot {
        title: format!("{title} over budget"),
        x: Axis::linear("budget (% of the window)"),
        y: axis,
        series: Series::by_method(rows, budget, metric.field, metric.value),
        reference,
    }
}

/// `metric` over the bytes that were held, which is what policies are to be compared at.
fn over_bytes(
    title: &str,
    axis: Axis,
    rows: &[Row],
    metric: &Metric,
    reference: Option<Reference>,
) -> Plot {
    // To a tenth, which is what an axis has room for.
    let held = |row: &Row| {
        let share = row.kv_bytes? as f64 / row.kv_bytes_full? as f64;
        Some((1e3 * share).round() / 10.0)
    };
    Plot {
        title: format!("{title} over bytes held"),
        x: Axis::linear("keys and values held (% of the full cache's)"),
        y: axis,
        series: Series::by_method(rows, held, metric.field, metric.value),
        reference,
    }
}

/// Makes the full cache's row, which Row::new only does for the name of the dense model, the reference.
fn reference(row: Row) -> Row {
    Row {
        role: Role::Reference,
        ..row
    }
}
