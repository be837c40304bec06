//! What a row says of the damping that SparseGPT and GPTQ ended with.

use eval_report::Row;
use lowrank_eora::repair::Damping;
use serde_json::json;

/// Fills in the damping of `linears` swept by the compressor `name`, with a note where it had to grow.
pub(super) fn report(row: &mut Row, name: &str, linears: usize, damping: Option<Damping>) {
    let Some(damping) = damping else {
        return;
    };
    row.extra.insert("damping".into(), json!(damping.largest));
    row.extra
        .insert("damping_raised".into(), json!(damping.raised));
    if damping.raised > 0 {
        // Growing tenfold rounds.
        let largest = format!("{:.3e}", damping.largest).parse();
        let largest: f64 = largest.unwrap_or(damping.largest);
        row.notes.push(format!(
            "{name}: damping had to grow in {} of {linears} linears, up to {largest} of the mean diagonal: the calibration tokens are too few",
            damping.raised,
        ));
    }
}
