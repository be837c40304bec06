//! Columns of a table: which quantity of a [`Row`] is shown, under which heading and with which digits.

use serde::{Deserialize, Serialize};

use crate::format;
use crate::row::{Budget, MemoryScope, Row, Spread};

/// A quantity that a table can show. A column without any value is left out of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Column {
    /// Method or policy.
    Method,
    /// Model.
    Model,
    /// Compression under the method.
    Compress,
    /// Pruning ratio.
    Ratio,
    /// Fraction of zeros.
    Sparsity,
    /// Rank of the compensation.
    Rank,
    /// KV-cache budget.
    Budget,
    /// Perplexity.
    Perplexity,
    /// Perplexity of the dense model.
    PerplexityDense,
    /// Perplexity divided by the dense one.
    PerplexityOverDense,
    /// Mean cross-entropy in nats per token.
    Nll,
    /// Accuracy.
    Accuracy,
    /// Accuracy of the dense model.
    AccuracyDense,
    /// Number of parameters.
    Params,
    /// Parameters divided by the dense model's.
    ParamsOverDense,
    /// Size of the weights.
    Bytes,
    /// Size of the weights divided by the dense model's.
    BytesOverDense,
    /// Relative output error.
    Loss,
    /// Relative output error before compensation.
    LossUncompensated,
    /// Bytes of keys and values.
    KvBytes,
    /// Bytes of keys and values of the full cache.
    KvBytesFull,
    /// Bytes of keys and values divided by the full cache's.
    KvOverFull,
    /// Bytes of the policy's own state.
    StateBytes,
    /// Retained attention mass.
    RetainedMass,
    /// Hit rate on recurring tokens.
    RecurringHitRate,
    /// Tokens per second.
    TokensPerSecond,
    /// Tokens per second divided by the dense model's.
    Speedup,
    /// Epochs of training after compression.
    FinetuneEpochs,
    /// Wall time.
    Seconds,
    /// Peak resident memory.
    PeakRss,
    /// A value of `Row::extra`, by its name.
    Extra(String),
    /// A fraction in `Row::extra`, by its name, shown in percent.
    ExtraShare(String),
}

enum Cell<'a> {
    Text(Option<&'a str>),
    Value(Option<&'a serde_json::Value>),
    Real(Option<f64>, fn(f64) -> String),
    Count(Option<u64>),
    Bytes(Option<u64>),
    Budget(Option<Budget>),
}

fn digits1(value: f64) -> String {
    format::real(value, 1)
}

fn digits3(value: f64) -> String {
    format::real(value, 3)
}

fn digits4(value: f64) -> String {
    format::real(value, 4)
}

/// A setting, such as a ratio, without trailing zeros.
fn setting(value: f64) -> String {
    format::tick(value)
}

fn quotient(part: Option<f64>, whole: Option<f64>) -> Option<f64> {
    Some(part? / whole.filter(|w| *w > 0.0)?)
}

fn share(part: Option<u64>, whole: Option<u64>) -> Option<f64> {
    quotient(part.map(|v| v as f64), whole.map(|v| v as f64))
}

impl Column {
    /// Field of [`Row`], heading, and what `row` has there.
    fn describe<'a>(&'a self, row: &'a Row) -> (&'a str, &'a str, Cell<'a>) {
        use Cell::*;
        match self {
            Column::Method => ("method", "method", Text(Some(&row.method))),
            Column::Model => ("model", "model", Text(row.model.as_deref())),
            Column::Compress => ("compress", "compression", Text(row.compress.as_deref())),
            Column::Ratio => ("ratio", "ratio", Real(row.ratio, setting)),
            Column::Sparsity => ("sparsity", "sparsity", Real(row.sparsity, format::percent)),
            Column::Rank => ("rank", "rank", Count(row.rank)),
            Column::Budget => ("budget", "budget", Budget(row.budget)),
            Column::Perplexity => ("perplexity", "perplexity", Real(row.perplexity, digits3)),
            Column::PerplexityDense => (
                "perplexity_dense",
                "dense perplexity",
                Real(row.perplexity_dense, digits3),
            ),
            Column::PerplexityOverDense => (
                "",
                "perplexity / dense",
                Real(
                    quotient(row.perplexity, row.perplexity_dense),
                    format::times,
                ),
            ),
            Column::Nll => ("nll", "nats / token", Real(row.nll, digits4)),
            Column::Accuracy => ("accuracy", "accuracy", Real(row.accuracy, format::percent)),
            Column::AccuracyDense => (
                "accuracy_dense",
                "dense accuracy",
                Real(row.accuracy_dense, format::percent),
            ),
            Column::Params => ("params", "parameters", Count(row.params)),
            Column::ParamsOverDense => (
                "",
                "parameters / dense",
                Real(share(row.params, row.params_dense), format::percent),
            ),
            Column::Bytes => ("bytes", "size", Bytes(row.bytes)),
            Column::BytesOverDense => (
                "",
                "size / dense",
                Real(share(row.bytes, row.bytes_dense), format::percent),
            ),
            Column::Loss => ("loss", "output error", Real(row.loss, digits4)),
            Column::LossUncompensated => (
                "loss_uncompensated",
                "output error before",
                Real(row.loss_uncompensated, digits4),
            ),
            Column::KvBytes => ("kv_bytes", "KV cache", Bytes(row.kv_bytes)),
            Column::KvBytesFull => ("kv_bytes_full", "full KV cache", Bytes(row.kv_bytes_full)),
            Column::KvOverFull => (
                "",
                "KV cache / full",
                Real(share(row.kv_bytes, row.kv_bytes_full), format::percent),
            ),
            Column::StateBytes => ("state_bytes", "policy state", Bytes(row.state_bytes)),
            Column::RetainedMass => (
                "retained_mass",
                "retained mass",
                Real(row.retained_mass, format::percent),
            ),
            Column::RecurringHitRate => (
                "recurring_hit_rate",
                "recurring hits",
                Real(row.recurring_hit_rate, format::percent),
            ),
            Column::TokensPerSecond => (
                "tokens_per_second",
                "tokens / s",
                Real(row.tokens_per_second, digits1),
            ),
            Column::Speedup => (
                "speedup",
                "speed / dense",
                Real(
                    row.speedup
                        .or_else(|| quotient(row.tokens_per_second, row.tokens_per_second_dense)),
                    format::times,
                ),
            ),
            Column::FinetuneEpochs => (
                "finetune_epochs",
                "epochs of training",
                Count(row.finetune_epochs),
            ),
            Column::Seconds => ("seconds", "time", Real(Some(row.seconds), format::seconds)),
            Column::PeakRss => ("peak_rss_bytes", "peak memory", Bytes(row.peak_rss_bytes)),
            Column::Extra(name) => (name, name, Value(row.extra.get(name))),
            Column::ExtraShare(name) => {
                let share = row.extra.get(name).and_then(serde_json::Value::as_f64);
                (name, name, Real(share, format::percent))
            }
        }
    }

    /// Heading of the column.
    pub fn title(&self) -> String {
        self.describe(&Row::default()).1.replace('_', " ")
    }

    /// Whether the column identifies the row, rather than a measurement.
    pub(crate) fn is_key(&self) -> bool {
        use Column::*;
        match self {
            Method | Model | Compress | Ratio | Sparsity | Rank | Budget => true,
            Extra(name) => name == "task" || name == "crate",
            _ => false,
        }
    }

    /// Whether the column holds numbers in these rows and is aligned to the right.
    pub(crate) fn is_numeric(&self, rows: &[Row]) -> bool {
        rows.iter().all(|row| match self.describe(row).2 {
            Cell::Text(_) => false,
            Cell::Value(value) => value.is_none_or(serde_json::Value::is_number),
            _ => true,
        })
    }

    /// The value of `row` with its spread over repeated measurements; `None` if it was not measured.
    pub fn cell(&self, row: &Row) -> Option<String> {
        let text = match self.describe(row).2 {
            Cell::Text(text) => text?.to_owned(),
            Cell::Value(value) => json(value?),
            Cell::Real(value, show) => {
                let text = show(value?);
                match self.spread(row) {
                    Some(Spread { min, max, .. }) => {
                        format!("{text} [{}, {}]", show(*min), show(*max))
                    }
                    None => text,
                }
            }
            Cell::Count(value) => format::count(value?),
            Cell::Bytes(value) => format::bytes(value?),
            Cell::Budget(value) => match value? {
                Budget::Share(share) => format::percent(share),
                Budget::Tokens(tokens) => format::count(tokens),
            },
        };
        Some(match self.is_bound(row) {
            true => format!("≤ {text}"),
            false => text,
        })
    }

    /// The spread that the cell of `row` shows.
    pub(crate) fn spread<'a>(&self, row: &'a Row) -> Option<&'a Spread> {
        let (name, _, cell) = self.describe(row);
        match cell {
            Cell::Real(Some(_), _) => row.spread.get(name),
            _ => None,
        }
    }

    /// Whether the cell of `row` is an upper bound: the peak memory of the whole process.
    pub(crate) fn is_bound(&self, row: &Row) -> bool {
        *self == Column::PeakRss
            && row.peak_rss_bytes.is_some()
            && row.peak_rss_scope == MemoryScope::Process
    }
}

/// A value of free-form detail as text.
pub(crate) fn json(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Number(number) => match (number.as_u64(), number.as_f64()) {
            (Some(count), _) => format::count(count),
            (None, Some(real)) => format::real(real, 4),
            _ => number.to_string(),
        },
        serde_json::Value::Null => format::ABSENT.to_owned(),
        other => other.to_string(),
    }
}
