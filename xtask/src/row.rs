//! One measured row: a method at one setting, and everything its suite measured there.
//!
//! Field names are the schema of `report.json`. Whatever was not measured is absent, never 0, so every measurement is an
//! `Option` and a number that is not finite is set aside with a note instead of being written as `null`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The method name of a row that measures the model as it came.
pub const DENSE: &str = "dense";

/// How a row is meant to be read beside the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The model as it came: what everything else is compared with.
    Reference,
    /// A baseline at the same budget, such as random selection.
    Control,
    /// A method under evaluation.
    #[default]
    Method,
}

impl Role {
    fn is_method(&self) -> bool {
        *self == Role::Method
    }
}

/// A KV-cache budget: a share of the window or a number of tokens. In JSON a number with or without a decimal point.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Budget {
    /// Number of tokens.
    Tokens(u64),
    /// Share of the window, above 0 and at most 1.
    Share(f64),
}

/// Smallest and largest value of one field over repeated runs; the field itself holds their mean.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Number of runs (seeds).
    pub runs: usize,
    /// Smallest value seen.
    pub min: f64,
    /// Largest value seen.
    pub max: f64,
}

/// One row of the report. Fields ending in `_dense` or `_full` are the same quantity of the model as it came.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Suite that measured the row: `perplexity`, `structured`, ...
    pub suite: String,
    /// Method or policy; [`DENSE`] for the model as it came.
    pub method: String,
    /// How the row is meant to be read.
    #[serde(default, skip_serializing_if = "Role::is_method")]
    pub role: Role,
    /// Model folder or name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Compression that the method starts from or repairs, such as `wanda-2:4`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress: Option<String>,
    /// Share of the prunable parameters to remove, in [0, 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Share of weights that are zero, in [0, 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// Rank of the compensation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u64>,
    /// KV-cache budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// exp of `nll`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Perplexity of the dense model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity_dense: Option<f64>,
    /// Mean cross-entropy over all targets, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nll: Option<f64>,
    /// Share of right answers, in [0, 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Accuracy of the dense model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy_dense: Option<f64>,
    /// Number of parameters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub params: Option<u64>,
    /// Number of parameters of the dense model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub params_dense: Option<u64>,
    /// Size of the weights in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Size of the dense weights in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_dense: Option<u64>,
    /// Relative output error over all repaired linears, sqrt(Σ‖(W − W_c − BA)X‖² / Σ‖WX‖²), on tokens that calibration never saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// `loss` with BA = 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_uncompensated: Option<f64>,
    /// Most bytes of keys and values held during the run, all layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes: Option<u64>,
    /// The same for the full cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes_full: Option<u64>,
    /// Bytes that the policy keeps beside keys and values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_bytes: Option<u64>,
    /// Share of the attention mass on tokens that were kept, in [0, 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retained_mass: Option<f64>,
    /// Share of recurring tokens still cached when they recurred, in [0, 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recurring_hit_rate: Option<f64>,
    /// Tokens per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Tokens per second of the dense model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second_dense: Option<f64>,
    /// Epochs of training after compression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finetune_epochs: Option<u64>,
    /// Wall time that the row took, in seconds.
    pub seconds: f64,
    /// Largest resident memory of the process while the row ran (mapped checkpoint pages included); absent where the
    /// operating system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// Spread of the named fields over repeated runs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub spread: BTreeMap<String, Spread>,
    /// Per-layer detail, one object per layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Value>,
    /// Remarks that a reader of this row must know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What only this suite measures, by name; shown through [`crate::column::Column::Extra`].
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A field that is averaged over repeated runs.
pub(crate) struct Measure {
    /// Name of the field in the report.
    pub(crate) name: &'static str,
    /// Reads it.
    pub(crate) get: fn(&Row) -> Option<f64>,
    /// Writes it.
    pub(crate) set: fn(&mut Row, f64),
}

/// The mean of rows that differ in their seed alone, with the spread of `measures`; their time is the sum. Everything else is
/// the first row's, without the detail of its layers. `None` for no rows.
pub(crate) fn mean_over_seeds(rows: Vec<Row>, measures: &[Measure]) -> Option<Row> {
    let mut mean = rows.first()?.clone();
    if rows.len() == 1 {
        return Some(mean);
    }
    mean.layers.clear();
    mean.seconds = rows.iter().map(|row| row.seconds).sum();
    for Measure { name, get, set } in measures {
        let values: Vec<f64> = rows.iter().filter_map(get).collect();
        if values.len() < rows.len() {
            continue;
        }
        let spread = Spread {
            runs: values.len(),
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        };
        mean.spread.insert((*name).into(), spread);
        set(&mut mean, values.iter().sum::<f64>() / values.len() as f64);
    }
    Some(mean)
}

impl Row {
    /// An empty row of `suite`; a method called [`DENSE`] is the reference.
    pub fn new(suite: impl Into<String>, method: impl Into<String>) -> Self {
        let method = method.into();
        let role = if method == DENSE {
            Role::Reference
        } else {
            Role::Method
        };
        Row {
            suite: suite.into(),
            method,
            role,
            ..Row::default()
        }
    }

    /// This row as a control at the same budget.
    pub fn control(self) -> Self {
        Row {
            role: Role::Control,
            ..self
        }
    }

    /// The row with every number that is not finite made absent and named in `notes`.
    ///
    /// # Errors
    /// None in practice: the row is converted to JSON and back.
    pub(crate) fn without_non_finite(mut self) -> Result<Self> {
        self.spread
            .retain(|_, spread| spread.min.is_finite() && spread.max.is_finite());
        let Value::Object(mut fields) = serde_json::to_value(&self).context("row to JSON")? else {
            return Ok(self);
        };
        // serde_json writes NaN and infinities as null, and nothing else here can be null.
        let lost: Vec<String> = fields
            .iter()
            .filter(|(_, value)| value.is_null())
            .map(|(name, _)| name.clone())
            .collect();
        if lost.is_empty() {
            return Ok(self);
        }
        fields.retain(|_, value| !value.is_null());
        let mut row: Row =
            serde_json::from_value(Value::Object(fields)).context("row from JSON")?;
        row.notes
            .push(format!("not a finite number: {}", lost.join(", ")));
        Ok(row)
    }
}
