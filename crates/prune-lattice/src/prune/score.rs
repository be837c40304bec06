//! Scores of neurons: order and centrality, strength, chance.

use super::{LayerWeights, Method, PruneConfig, config::LatticeConfig};
use crate::{
    cell::Cell,
    centrality::strength,
    error::{Error, Result},
    influence::{Influence, StackLayer},
    order::{Connected, Criterion, CutReport, OrderMode, persistence, verdicts},
    seed,
};
use rand::Rng;
use serde::{Deserialize, Serialize};

/// Scores of all neurons, layer after layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// The larger, the longer a neuron is kept; in `[0, 1 + beta]` for the lattice methods.
    pub values: Vec<f64>,
    /// Second key: the centrality, or the strength.
    pub ties: Vec<f64>,
    /// The cuts behind a lattice score.
    pub cuts: Vec<CutReport>,
}

impl Scores {
    /// The neurons `range`, best first: by score, then the second key, then the lower index.
    pub fn ranking(&self, range: std::ops::Range<usize>) -> Vec<usize> {
        let mut order: Vec<usize> = range.clone().collect();
        order.sort_by(|&a, &b| {
            self.values[b]
                .total_cmp(&self.values[a])
                .then(self.ties[b].total_cmp(&self.ties[a]))
                .then(a.cmp(&b))
        });
        order.iter_mut().for_each(|x| *x -= range.start);
        order
    }
}

/// The influence graph of a stack.
///
/// # Errors
/// Sizes that do not fit, or weights that are not finite.
pub fn influence_of(
    layers: &[LayerWeights<'_>],
    cell: Cell,
    config: &LatticeConfig,
) -> Result<Influence> {
    if let [only] = layers {
        return Influence::from_gates(only.w_hh, cell.gates(), only.hidden, config.aggregate);
    }
    let stack: Vec<StackLayer<'_>> = layers
        .iter()
        .map(|l| StackLayer {
            recurrent: l.w_hh,
            from_below: l.w_ih,
            from_above: l.feedback,
            hidden: l.hidden,
        })
        .collect();
    Influence::of_stack(&stack, cell.gates(), config.aggregate, config.edges)
}

/// Scores by a method that ranks neurons.
///
/// # Errors
/// [`Error::DegenerateOrder`] where the order does not tell neurons apart; a method that ranks no neurons.
pub fn neuron_scores(influence: &Influence, config: &PruneConfig) -> Result<Scores> {
    let lattice = &config.lattice;
    let mode = match config.method {
        Method::LatticeContext | Method::Reducible => OrderMode::Context,
        Method::LatticeReachability => OrderMode::Reachability,
        Method::LatticeOriented => OrderMode::Oriented(lattice.orientation),
        Method::Strength => {
            let values = strength(influence);
            return Ok(Scores {
                ties: values.clone(),
                values,
                cuts: Vec::new(),
            });
        }
        Method::RandomNeurons => {
            let mut rng = seed::rng(config.seed, "random neurons");
            let values: Vec<f64> = (0..influence.len()).map(|_| rng.random()).collect();
            return Ok(Scores {
                ties: values.clone(),
                values,
                cuts: Vec::new(),
            });
        }
        other => {
            return Err(Error::Setting {
                setting: "method",
                reason: format!("{other} does not rank neurons"),
            });
        }
    };
    let criterion = Criterion {
        mode,
        verdict: lattice.verdict,
        connected: lattice.connected,
    };
    let (share, cuts) = if config.method == Method::Reducible {
        reducible_share(influence, config, criterion)?
    } else {
        let p = persistence(influence, &lattice.cuts, criterion)?;
        (p.share, p.cuts)
    };
    let centrality = lattice.centrality.normalised(influence)?;
    let values = share
        .iter()
        .zip(&centrality)
        .map(|(s, c)| s + lattice.beta * c)
        .collect();
    Ok(Scores {
        values,
        ties: centrality,
        cuts,
    })
}

/// The share of cuts at which a neuron is connected but *not* irreducible.
fn reducible_share(
    influence: &Influence,
    config: &PruneConfig,
    criterion: Criterion,
) -> Result<(Vec<f64>, Vec<CutReport>)> {
    let mut share = vec![0.0; influence.len()];
    let mut reports = Vec::new();
    for &cut in &config.lattice.cuts {
        let irreducible = verdicts(
            influence,
            cut,
            Criterion {
                connected: Connected::No,
                ..criterion
            },
        )?;
        let graph = influence.digraph(irreducible.report.threshold);
        let sources = graph.transpose();
        for (x, s) in share.iter_mut().enumerate() {
            let connected =
                graph.row_ones(x).next().is_some() && sources.row_ones(x).next().is_some();
            *s += f64::from(u8::from(connected && !irreducible.kept[x]));
        }
        reports.push(irreducible.report);
    }
    share
        .iter_mut()
        .for_each(|s| *s /= reports.len().max(1) as f64);
    Ok((share, reports))
}
