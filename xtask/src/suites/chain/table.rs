//! The report of a chain: its table, and the plot of its steps.

use eval_report::{Axis, Budget, Column, DENSE, Plot, Reference, Role, Row, Section, Series};

use super::{Config, speed};
use crate::suites::kv::policy::Choice;

/// The rows of both chains, the dense model's first.
pub(super) fn section(rows: Vec<Row>, config: &Config, cache: &Choice) -> Section {
    let all_bytes = |row: &Row| Some((row.bytes? + row.kv_bytes?) as f64 / f64::from(1 << 20));
    let series = |name: &str, control| {
        let of_chain = rows
            .iter()
            .filter(|row| row.method == DENSE || (row.role == Role::Control) == control);
        let mut points: Vec<_> = of_chain
            .filter_map(|row| Some((all_bytes(row)?, row.perplexity?).into()))
            .collect();
        points.reverse();
        Series {
            name: name.into(),
            points,
            control,
        }
    };
    let plots = vec![Plot {
        title: "Perplexity over bytes, step by step".into(),
        x: Axis::linear("weights and one sequence's cache (MiB)"),
        y: Axis::log("perplexity of decoded tokens"),
        series: vec![series("methods", false), series("baselines", true)],
        reference: rows[0].perplexity.map(|y| Reference {
            name: DENSE.into(),
            y,
        }),
    }];
    Section {
        title: "Chain: prune, quantise, repair, shrink the cache".into(),
        prose: format!(
            "Each row adds a step to the one above it: {} % of the blocks' parameters are pruned with a least-squares refit, the remaining \
             linears are quantised, a correction of rank {} repairs them, and the cache {}. The baselines spend the same \
             budgets: random units, rounding, plain SVD, random eviction to as many bytes. Each row was written, opened again and run with its weights as \
             they are stored: size is what they take in memory. Quality is that of f32 arithmetic, decoding the same text token by token; \
             only decoded tokens count. Speed is that of one sequence in int8 arithmetic, in alternation with the dense model as stored; \
             the prefill's is beside it.",
            100.0 * config.ratio,
            config.rank,
            match (cache.is_full(), config.budget) {
                (true, _) => format!("keeps every token ({})", cache.name),
                (_, Budget::Share(share)) =>
                    format!("is limited to {} % of the window", 100.0 * share),
                (_, Budget::Tokens(tokens)) => format!("is limited to {tokens} tokens"),
            }
        ),
        columns: vec![
            Column::Method,
            Column::Perplexity,
            Column::PerplexityOverDense,
            Column::Bytes,
            Column::BytesOverDense,
            Column::KvBytes,
            Column::KvOverFull,
            Column::TokensPerSecond,
            Column::Speedup,
            Column::Extra(speed::PREFILL.into()),
            Column::Extra(speed::PREFILL_RATIO.into()),
        ],
        rows,
        plots,
        ..Section::default()
    }
}
