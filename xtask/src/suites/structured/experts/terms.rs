//! Linear terms beside the experts of layers, which are held in memory alone.

use anyhow::Result;
use causal_lm::Decoder;
use eval_report::Row;
use prune_structured::experts::{FittedTerm, Outcome};
use serde_json::{Value, json};

/// The model that a plan leaves with what no checkpoint of it holds.
pub(super) fn attached<'a>(pruned: Decoder<'a>, outcome: &Outcome) -> Result<Decoder<'a>> {
    let term = |fitted: &Option<FittedTerm>| fitted.as_ref().map(|fitted| fitted.term.clone());
    let terms: Vec<_> = outcome.terms.iter().map(term).collect();
    Ok(match terms.is_empty() {
        true => pruned,
        false => pruned.with_terms(&terms)?,
    })
}

/// Counts what is held beside the experts of a checkpoint, and tells what it is good for.
pub(super) fn count(row: &mut Row, outcome: &Outcome) {
    let terms: Vec<&FittedTerm> = outcome.terms.iter().flatten().collect();
    if terms.is_empty() {
        return;
    }
    let sum = |of: fn(&FittedTerm) -> f64| terms.iter().map(|&term| of(term)).sum::<f64>();
    let parameters: usize = terms.iter().map(|fitted| fitted.term.parameters()).sum();
    let bytes: usize = terms.iter().map(|fitted| fitted.term.bytes()).sum();
    row.params = row.params.map(|all| all + parameters as u64);
    row.bytes = row.bytes.map(|all| all + bytes as u64);
    let active = row.extra.get("params_active").and_then(Value::as_u64);
    let active = active.map(|active| active + parameters as u64);
    row.extra.insert("params_active".into(), json!(active));
    let left = sum(|fitted| fitted.left) / sum(|fitted| fitted.scaled).max(f64::MIN_POSITIVE);
    row.extra.insert("residual_left".into(), json!(left));
}
