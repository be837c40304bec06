//! How the rows of `eval frontier` are shown.

use eval_report::{
    Axis, Budget, Column, DENSE, Plot, Point, Reference, Role, Row, Section, Series, format,
};
use frontier::{Frontier, Plan, SitePlan};
use serde_json::{Value, json};

use super::{JOINT, strip};

const MIB: f64 = 1048576.0;
/// Budgets of the line of predictions.
const PREDICTED: usize = 48;

/// The table with its explanation, plots and pictures.
pub(super) fn section(
    frontier: &Frontier<'_>,
    rows: Vec<Row>,
    (plans, bf16): (&[Plan], u64),
) -> Section {
    let mut columns = vec![
        Column::Budget,
        Column::Method,
        Column::Bytes,
        Column::BytesOverDense,
        Column::KvBytes,
        Column::ExtraShare("cache_share".into()),
    ];
    let extra = ["kl", "kl_error", "joint_kl", "kl_predicted"];
    columns.extend(extra.map(|name| Column::Extra(name.into())));
    columns.extend([Column::Perplexity, Column::ExtraShare("pruned".into())]);
    let extra = [
        "bits",
        "mean_rank",
        "prefill_tokens_per_second",
        "predicted_tokens_per_second",
        "passes",
    ];
    columns.extend(extra.map(|name| Column::Extra(name.into())));
    columns.extend([Column::TokensPerSecond, Column::Seconds, Column::PeakRss]);
    Section {
        title: "The best model that fits".into(),
        prose: "A budget in bytes is divided over pruned width, bits and low-rank repair of each attention, MLP or block's experts, and embedding, and with \
                --context over the caches of the layers, by \
                what each treatment does to the predictions of the whole model. Every plan was written, opened again and measured \
                with its weights as they are stored: size is that of the files of weights, kl the mean divergence from the dense \
                model's predictions in nats per token on windows that neither calibration nor evaluation used, with its standard \
                error. Caches are part of both: windows are decoded through them, and their size is what they allocate for the \
                context. A plan saved with --save has them in cache.json, which generate takes with --cache. The other rows are the best \
                along one axis that fits the budget; joint_kl is what the joint plan has with the bytes that they spend, before rounds \
                of measuring around it. Speed is that of decoding one token at a time, the median of three interleaved rounds; the \
                prefill's is beside it, and with --tokens-per-second the one by the table of what each treatment takes on this \
                machine. kl_predicted is the sum over the plan's sites, each measured alone; \
                the last plot compares it with whole plans."
            .into(),
        columns,
        remarks: remarks(&rows),
        figures: plans.iter().map(|plan| strip::figure(plan, bf16)).collect(),
        plots: plots(frontier, &rows),
        rows,
        ..Section::default()
    }
}

/// What a plan does with a site.
pub(super) fn site(plan: &SitePlan) -> Value {
    let treatment = plan.treatment;
    let mut row = json!({
        "site": plan.site.to_string(),
        "kept": plan.share,
        "units": treatment.width,
        "format": treatment.format.to_string(),
        "rank": treatment.rank,
        "bytes": plan.bytes,
        "parameters": plan.parameters,
        "bits": plan.bits,
    });
    if let Some(cache) = treatment.cache {
        row["cache"] = cache.to_string().into();
        row["cache_bytes"] = plan.cache_bytes.into();
    }
    row
}

/// Fills in what the dense row has.
pub(super) fn compare_with_dense(rows: &mut [Row], model: &str) {
    let Some(dense) = rows.iter().find(|row| row.method == DENSE).cloned() else {
        return;
    };
    for row in rows {
        row.model = Some(model.to_owned());
        row.bytes_dense = dense.bytes;
        row.params_dense = dense.params;
        row.perplexity_dense = dense.perplexity;
    }
}

/// Bytes of weights and caches.
fn taken(row: &Row) -> Option<u64> {
    Some(row.bytes? + row.kv_bytes.unwrap_or(0))
}

fn kl(row: &Row) -> Option<f64> {
    row.extra.get("kl")?.as_f64()
}

/// Of every plan, joint or not, the sum of its sites' divergences and that of the whole.
fn sums_and_wholes(rows: &[Row]) -> Vec<(f64, f64)> {
    let sum = |row: &Row| row.extra.get("kl_predicted")?.as_f64();
    let of = |row: &Row| Some((sum(row)?, kl(row)?));
    let mut all: Vec<(f64, f64)> = rows.iter().filter_map(of).collect();
    // One plan may be the best along several axes.
    all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    all.dedup();
    all
}

/// How well sums of single sites say what whole plans lose, in words.
pub(super) fn additivity(rows: &[Row]) -> String {
    let (sums, wholes): (Vec<f64>, Vec<f64>) = sums_and_wholes(rows).into_iter().unzip();
    let mut ratios: Vec<f64> = sums.iter().zip(&wholes).map(|(s, w)| s / w).collect();
    ratios.sort_by(f64::total_cmp);
    match ratios.get(ratios.len() / 2) {
        None => "no plan is measured".into(),
        Some(median) => format!(
            "{}: Spearman {:.2}, sum / whole {median:.2} in the middle",
            format::counted(sums.len(), "plan"),
            frontier::spearman(&sums, &wholes)
        ),
    }
}

/// Where the joint plan is best, and where it is not.
fn remarks(rows: &[Row]) -> Vec<String> {
    let joint: Vec<&Row> = rows.iter().filter(|row| row.method == JOINT).collect();
    let mut lost = Vec::new();
    for row in &joint {
        let others = rows
            .iter()
            .filter(|other| other.role == Role::Control && other.budget == row.budget);
        let best = others.filter_map(|other| Some((kl(other)?, other)));
        let best = best.min_by(|a, b| a.0.total_cmp(&b.0));
        if let (Some(ours), Some((theirs, other))) = (kl(row), best)
            && theirs < ours
        {
            let budget = match row.budget {
                Some(Budget::Share(share)) => format::percent(share),
                _ => format::bytes(taken(row).unwrap_or(0)),
            };
            lost.push(format!(
                "at {} {} has {} nats, the joint plan {}",
                budget,
                other.method,
                format::real(theirs, 4),
                format::real(ours, 4)
            ));
        }
    }
    if !rows.iter().any(|row| row.role == Role::Control) || joint.is_empty() {
        return Vec::new();
    }
    let mut remarks = vec![format!(
        "The joint plan has the least divergence at {} of {} budgets.",
        joint.len() - lost.len(),
        joint.len()
    )];
    remarks.extend((!lost.is_empty()).then(|| format!("It has not: {}.", lost.join("; "))));
    remarks
}

fn plots(frontier: &Frontier<'_>, rows: &[Row]) -> Vec<Plot> {
    let size = |row: &Row| Some(taken(row)? as f64 / MIB);
    let by_size = |title: &str, y: &dyn Fn(&Row) -> Option<f64>, field: &str| Plot {
        title: title.into(),
        x: Axis::linear("weights, and caches where they count (MiB)"),
        y: Axis::log(title),
        series: Series::by_method(rows, size, field, y),
        reference: None,
    };
    let mut divergence = by_size("divergence (nats / token)", &kl, "kl");
    let predicted = frontier
        .predicted(PREDICTED)
        .into_iter()
        .filter(|(_, kl)| *kl > 0.0);
    divergence.series.push(Series {
        name: "sum of single sites".into(),
        points: predicted
            .map(|(bytes, kl)| Point::from((bytes as f64 / MIB, kl)))
            .collect(),
        control: true,
    });
    let mut perplexity = by_size("perplexity", &|row| row.perplexity, "perplexity");
    let dense = rows.iter().find(|row| row.method == DENSE);
    perplexity.reference = dense.and_then(|row| row.perplexity).map(|y| Reference {
        name: DENSE.into(),
        y,
    });
    let additive = Plot {
        title: "sum of single sites against the whole plan".into(),
        x: Axis::log("sum of single sites (nats / token)"),
        y: Axis::log("whole plan (nats / token)"),
        series: vec![Series {
            name: "plans".into(),
            points: sums_and_wholes(rows).into_iter().map(Point::from).collect(),
            control: false,
        }],
        reference: None,
    };
    vec![divergence, perplexity, additive]
}
