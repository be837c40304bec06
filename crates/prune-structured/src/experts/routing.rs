//! Routing among the experts that are kept.

use causal_lm::mixture::{Routing, RoutingRule};

/// The gates of a token when only some experts are there: chosen and weighted as the model does, by the same logits.
/// Highest logit first, of equal ones the lower number. With fewer experts than the rule chooses, all of them.
pub(crate) fn restricted(
    rule: RoutingRule,
    logits: &[f32],
    kept: impl Fn(usize) -> bool,
) -> Vec<(usize, f64)> {
    let mut order: Vec<usize> = (0..logits.len()).filter(|&e| kept(e)).collect();
    order.sort_unstable_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    gates(rule, logits, &order)
}

/// The same for experts in the order of their logits.
pub(crate) fn gates(rule: RoutingRule, logits: &[f32], order: &[usize]) -> Vec<(usize, f64)> {
    let Some(&first) = order.first() else {
        return vec![];
    };
    let max = f64::from(logits[first]);
    let weight = |e: usize| (f64::from(logits[e]) - max).exp();
    let chosen = &order[..rule.chosen.min(order.len())];
    let among = if rule.normalise { chosen } else { order };
    let sum: f64 = among.iter().map(|&e| weight(e)).sum();
    chosen.iter().map(|&e| (e, weight(e) / sum)).collect()
}

/// Logits of one token.
pub(crate) fn logits(routing: &Routing, token: usize) -> &[f32] {
    &routing.logits[token * routing.experts..][..routing.experts]
}

/// Experts in the order of a token's logits.
pub(crate) fn order(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_unstable_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order
}

/// Softmax over all experts of a token.
pub(crate) fn softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |&logit: &f32| (f64::from(logit) - f64::from(max)).exp();
    let sum: f64 = logits.iter().map(weight).sum();
    logits.iter().map(|logit| weight(logit) / sum).collect()
}
