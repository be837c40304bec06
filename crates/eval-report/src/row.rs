//! One measured row: a method at one setting, and everything measured there.
//!
//! Field names are the schema of `report.json`. What was not measured is absent, never 0: every measurement is an
//! `Option`, and a number that is not finite is removed with a note instead of being written as `null`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::Result;

/// The method name of a row that measures the original model.
pub const DENSE: &str = "dense";

/// Fields that identify a row; everything else of a row is measured or a remark.
pub(crate) const KEYS: [&str; 8] = [
    "suite", "method", "model", "compress", "ratio", "sparsity", "rank", "budget",
];

/// What a row is for among the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The original model, which the other rows are compared with.
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

/// What repeated measurements of a field differ in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpreadOver {
    /// Runs with different seeds or inputs; the field is their mean.
    #[default]
    Seeds,
    /// The same measurement taken again, such as a speed; the field is the median.
    Repeats,
}

impl SpreadOver {
    fn is_seeds(&self) -> bool {
        *self == SpreadOver::Seeds
    }
}

/// Smallest and largest value of a field over several measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Number of measurements.
    pub runs: usize,
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
    /// What the measurements differ in.
    #[serde(default, skip_serializing_if = "SpreadOver::is_seeds")]
    pub over: SpreadOver,
}

impl Spread {
    /// The spread of `values`; `None` for no values.
    pub fn of(values: &[f64], over: SpreadOver) -> Option<Self> {
        (!values.is_empty()).then(|| Spread {
            runs: values.len(),
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            over,
        })
    }
}

/// What the peak memory of a row covers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryScope {
    /// The work of this row alone.
    #[default]
    Row,
    /// The process from its start to the end of this row, which is at least as much: the system does not let a process
    /// reset its peak.
    Process,
}

impl MemoryScope {
    fn is_row(&self) -> bool {
        *self == MemoryScope::Row
    }
}

/// One row of the report. Fields ending in `_dense` or `_full` are the same quantity of the original model or full cache.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Suite that measured the row: `perplexity`, `structured`, ...
    pub suite: String,
    /// Method or policy; [`DENSE`] for the original model.
    pub method: String,
    /// What the row is for.
    #[serde(default, skip_serializing_if = "Role::is_method")]
    pub role: Role,
    /// Model folder or name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Compression that the method repairs, such as `wanda-2:4`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress: Option<String>,
    /// Fraction of the prunable parameters to remove, in [0, 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Fraction of zero weights, in [0, 1].
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
    /// Fraction of correct answers, in [0, 1].
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
    /// Relative output error over all repaired linears, sqrt(Σ‖(W − W_c − BA)X‖² / Σ‖WX‖²), on tokens not used for calibration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// `loss` with BA = 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_uncompensated: Option<f64>,
    /// Peak bytes of keys and values during the run, all layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes: Option<u64>,
    /// The same for the full cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes_full: Option<u64>,
    /// Bytes of the policy's own state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_bytes: Option<u64>,
    /// Fraction of the attention mass on tokens still cached, in [0, 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retained_mass: Option<f64>,
    /// Fraction of recurring tokens still cached when they recurred, in [0, 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recurring_hit_rate: Option<f64>,
    /// Tokens per second; the median where it was measured several times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Tokens per second of the dense model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second_dense: Option<f64>,
    /// Speed divided by the dense model's, measured in pairs; the median of the pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speedup: Option<f64>,
    /// Epochs of training after compression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finetune_epochs: Option<u64>,
    /// Wall time in seconds.
    pub seconds: f64,
    /// Peak resident memory, pages of mapped files included; absent where the operating system does not report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// What `peak_rss_bytes` covers.
    #[serde(default, skip_serializing_if = "MemoryScope::is_row")]
    pub peak_rss_scope: MemoryScope,
    /// Spread of fields that were measured several times, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub spread: BTreeMap<String, Spread>,
    /// Per-layer detail, one object per layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Value>,
    /// Remarks on this row.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Measurements that only this suite has, by name; shown by [`Column::Extra`](crate::Column::Extra).
    #[serde(flatten)]
    pub extra: Map<String, Value>,
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

    /// This row as a baseline at the same budget.
    pub fn control(self) -> Self {
        Row {
            role: Role::Control,
            ..self
        }
    }

    /// The row as a JSON object. Numbers that are not finite are null.
    pub(crate) fn to_fields(&self) -> Result<Map<String, Value>> {
        match serde_json::to_value(self)? {
            Value::Object(fields) => Ok(fields),
            // A struct is always an object.
            _ => Ok(Map::new()),
        }
    }

    /// The row of a JSON object.
    pub(crate) fn from_fields(fields: Map<String, Value>) -> Result<Self> {
        Ok(serde_json::from_value(Value::Object(fields))?)
    }

    /// The row without numbers that are not finite; `notes` name them.
    ///
    /// # Errors
    /// None in practice: the row is converted to JSON and back.
    pub(crate) fn without_non_finite(mut self) -> Result<Self> {
        self.spread
            .retain(|_, spread| spread.min.is_finite() && spread.max.is_finite());
        let mut fields = self.to_fields()?;
        // serde_json writes NaN and infinities as null, and no other value of a row is null.
        let lost: Vec<String> = fields
            .iter()
            .filter(|(_, value)| value.is_null())
            .map(|(name, _)| name.clone())
            .collect();
        if lost.is_empty() {
            return Ok(self);
        }
        fields.retain(|_, value| !value.is_null());
        let mut row = Row::from_fields(fields)?;
        row.notes
            .push(format!("not a finite number: {}", lost.join(", ")));
        Ok(row)
    }
}
