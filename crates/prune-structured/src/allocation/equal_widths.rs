//! Equal widths in every layer, for runtimes that read one number for all of them.
//!
//! The allocation decides how much of the budget attention keeps and how much the MLPs; every layer
//! then keeps the same number of steps of its own ranking. Neurons, the finer unit, make up for
//! what attention's rounding missed, so that the ratio is met within one step of every layer.
//!
//! Where an architecture has attention of two kinds, with heads of two widths, no number of heads is one for both: attention stays
//! whole there, and the MLPs take the whole ratio.

use super::Budget;
use crate::ranking::Ranking;
use crate::stats::Part;
use crate::{Error, Result};
use causal_lm::config::StockHeads;
use causal_lm::{Decoder, ModelConfig, Widths};

/// Steps that each ranking keeps with equal widths everywhere, as near to `keep` as the budget
/// allows.
///
/// # Errors
/// [`Error::NotUniform`] when the dense layers differ already; [`Error::Uniform`] when no equal
/// widths come within one step of every layer of the budget.
pub(crate) fn equalise(
    decoder: &Decoder<'_>,
    rankings: &[Ranking],
    keep: &[usize],
    budget: Budget,
) -> Result<Vec<usize>> {
    let config = decoder.config();
    let dense = &config.widths;
    if (0..dense.len()).any(|layer| kind(config, layer) != kind(config, 0)) {
        return equal_mlps(config, rankings, budget);
    }
    // Layers with a delta net have no heads.
    let has_heads = |layer: usize| config.delta_nets[layer].is_none();
    let whole = (0..dense.len()).find(|&layer| has_heads(layer));
    let whole = whole.map_or(dense[0], |layer| dense[layer]);
    let differs = |&layer: &usize| {
        let like = match has_heads(layer) {
            true => whole,
            false => Widths {
                neurons: whole.neurons,
                ..dense[layer]
            },
        };
        dense[layer] != like
    };
    if let Some(layer) = (0..dense.len()).find(differs) {
        return Err(Error::NotUniform { layer });
    }
    let of_part = |part| rankings.iter().filter(move |r| r.part == part);
    let first = |part| of_part(part).next();
    let Some(mlp) = first(Part::Mlp) else {
        return Err(Error::NotUniform { layer: 0 });
    };
    let layers = dense.len() as f64;
    // Attention sublayers for each MLP.
    let share = of_part(Part::Attention).count() as f64 / layers;
    // Where heads cannot be removed, all of them are kept.
    let Some(attention) = first(Part::Attention) else {
        let steps = mlp.nearest(budget.parameters / layers).max(1);
        return Ok(vec![steps; rankings.len()]);
    };
    let heads = |steps: usize| match attention.order().len() == whole.kv_heads {
        true => steps * whole.heads / whole.kv_heads,
        false => steps * whole.kv_heads,
    };
    let opens = |&steps: &usize| accepts_heads(decoder, heads(steps));
    let mean = rankings
        .iter()
        .zip(keep)
        .filter(|(r, _)| r.part == Part::Attention)
        .map(|(_, &steps)| steps as f64)
        .sum::<f64>()
        / (share * layers);
    let mut choices: Vec<usize> = (attention.protected.max(1)..=attention.steps().len())
        .filter(opens)
        .collect();
    choices.sort_by(|&a, &b| {
        let distance = |steps: usize| (steps as f64 - mean).abs();
        distance(a).total_cmp(&distance(b)).then(b.cmp(&a))
    });
    let each = budget.parameters / layers;
    let neurons = |steps: usize| -> usize {
        let left = each - share * attention.cost(steps) as f64;
        mlp.nearest(left).max(1)
    };
    let step = mlp.steps().iter().map(|s| s.cost).max().unwrap_or(0) as f64;
    let cost = |a: usize, n: usize| share * attention.cost(a) as f64 + mlp.cost(n) as f64;
    let gap = |&(a, n): &(usize, usize)| (cost(a, n) - each).abs();
    let pairs: Vec<(usize, usize)> = choices.into_iter().map(|a| (a, neurons(a))).collect();
    let chosen = pairs.iter().find(|pair| gap(pair) <= step);
    let Some(&(attention_steps, mlp_steps)) = chosen else {
        let nearest = pairs.iter().min_by(|a, b| gap(a).total_cmp(&gap(b)));
        let (a, n) = nearest
            .copied()
            .unwrap_or((attention.steps().len(), mlp.steps().len()));
        let all = cost(attention.steps().len(), mlp.steps().len());
        return Err(Error::Uniform {
            ratio: budget.ratio,
            reached: 1.0 - cost(a, n) / all,
            heads: heads(a),
            neurons: mlp.units_in(n),
        });
    };
    let steps = |r: &Ranking| match r.part {
        Part::Attention => attention_steps,
        Part::Mlp => mlp_steps,
    };
    Ok(rankings.iter().map(steps).collect())
}

/// What makes attention of one kind.
fn kind(config: &ModelConfig, layer: usize) -> (usize, bool) {
    let attention = &config.attention[layer];
    (attention.head_dim, attention.value_is_key)
}

/// Steps of rankings with attention as it is and as many neurons in every layer.
fn equal_mlps(config: &ModelConfig, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>> {
    let widths = &config.widths;
    // Layers of one kind have to be alike, and all in their MLPs.
    let differs = |&layer: &usize| {
        let like = (0..layer).find(|&other| kind(config, other) == kind(config, layer));
        let like = like.map_or(widths[layer], |other| widths[other]);
        widths[layer] != like || widths[layer].neurons != widths[0].neurons
    };
    if let Some(layer) = (0..widths.len()).find(differs) {
        return Err(Error::NotUniform { layer });
    }
    let of_part = |part| rankings.iter().filter(move |r| r.part == part);
    let Some(mlp) = of_part(Part::Mlp).next() else {
        return Err(Error::NotUniform { layer: 0 });
    };
    let mlps = of_part(Part::Mlp).count() as f64;
    let attention: u64 = of_part(Part::Attention).map(Ranking::total).sum();
    let each = (budget.parameters - attention as f64) / mlps;
    let steps = mlp.nearest(each).max(1);
    let step = mlp.steps().iter().map(|s| s.cost).max().unwrap_or(0) as f64;
    if (mlp.cost(steps) as f64 - each).abs() > step {
        let cost = |steps| attention as f64 + mlps * mlp.cost(steps) as f64;
        return Err(Error::Uniform {
            ratio: budget.ratio,
            reached: 1.0 - cost(steps) / cost(mlp.steps().len()),
            heads: config.widths[0].heads,
            neurons: mlp.units_in(steps),
        });
    }
    let kept = rankings.iter().map(|ranking| match ranking.part {
        Part::Attention => ranking.steps().len(),
        Part::Mlp => steps,
    });
    Ok(kept.collect())
}

/// Whether the config class of stock transformers accepts this number of heads in every layer.
pub(crate) fn accepts_heads(decoder: &Decoder<'_>, heads: usize) -> bool {
    let config = decoder.config();
    match config.stock.heads {
        StockHeads::Any => true,
        StockHeads::Divisors => config.hidden.is_multiple_of(heads),
        StockHeads::Fixed => config.widths.iter().all(|w| w.heads == heads),
    }
}
