//! From scores, weights and chance to masks of exact size.

use super::{Compete, LayerWeights, Method, PruneConfig, score::Scores};
use crate::{
    cell::Cell,
    error::{Error, Result},
    graph::{Graph, barabasi_albert, erdos_renyi, watts_strogatz},
    influence::Aggregate,
    mask::{MaskRule, Rank, keep_top, tile},
    order::bits::BitMatrix,
    seed,
};
use rand::{Rng, seq::index};
use rand_chacha::ChaCha8Rng;

/// Masks of one layer, shaped like its matrices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerMask {
    /// For `W_hh`, where it is in scope.
    pub recurrent: Option<BitMatrix>,
    /// For `W_ih`, where it is in scope.
    pub input: Option<BitMatrix>,
}

/// One matrix to prune: `[gates * rows, cols]`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) w: &'a [f32],
    pub(super) gates: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) recurrent: bool,
    pub(super) layer: usize,
}

impl Matrix<'_> {
    /// Connections to keep; every connection stands for a weight in each gate.
    fn budget(&self, sparsity: f64) -> usize {
        ((1.0 - sparsity) * (self.rows * self.cols) as f64).round() as usize
    }

    /// Joined magnitude of a connection over the gates.
    fn connection(&self, i: usize, j: usize, how: Aggregate) -> f64 {
        let at = |g: usize| f64::from(self.w[(g * self.rows + i) * self.cols + j]).abs();
        let gates = (0..self.gates).map(at);
        match how {
            Aggregate::L2 => gates.map(|m| m * m).sum::<f64>().sqrt(),
            Aggregate::Max => gates.fold(0.0, f64::max),
            Aggregate::Sum => gates.sum(),
            Aggregate::Gate(g) => at(g.min(self.gates - 1)),
        }
    }
}

/// Places of the neurons of every layer in their ranking, and their scores divided by the largest.
pub(super) struct Ranked {
    places: Vec<Vec<usize>>,
    scores: Vec<Vec<f64>>,
}

impl Ranked {
    pub(super) fn new(scores: &Scores, layers: &[LayerWeights<'_>]) -> Self {
        let largest = scores
            .values
            .iter()
            .copied()
            .fold(0.0, f64::max)
            .max(f64::MIN_POSITIVE);
        let mut ranked = Self {
            places: Vec::new(),
            scores: Vec::new(),
        };
        let mut start = 0;
        for layer in layers {
            let range = start..start + layer.hidden;
            let mut place = vec![0; layer.hidden];
            scores
                .ranking(range.clone())
                .into_iter()
                .enumerate()
                .for_each(|(p, x)| place[x] = p);
            ranked.places.push(place);
            ranked.scores.push(
                scores.values[range.clone()]
                    .iter()
                    .map(|s| s / largest)
                    .collect(),
            );
            start = range.end;
        }
        ranked
    }
}

/// Masks of the matrices, in their order.
pub(super) fn masks(
    matrices: &[Matrix<'_>],
    ranked: Option<&Ranked>,
    config: &PruneConfig,
) -> Result<Vec<BitMatrix>> {
    match config.method {
        Method::Dense => Ok(matrices
            .iter()
            .map(|m| BitMatrix::ones(m.gates * m.rows, m.cols))
            .collect()),
        Method::Magnitude => Ok(magnitude(matrices, config)),
        Method::Random => {
            let mut rng = seed::rng(config.seed, "random weights");
            Ok(matrices
                .iter()
                .map(|m| random(m, config.sparsity, &mut rng))
                .collect())
        }
        Method::Threshold => Ok(matrices
            .iter()
            .map(|m| {
                let rank = |i, j| Rank {
                    level: 0,
                    weight: m.connection(i, j, config.lattice.aggregate),
                };
                tile(
                    &keep_top(m.rows, m.cols, m.budget(config.sparsity), rank),
                    m.gates,
                )
            })
            .collect()),
        Method::ZeroWhh | Method::Ws | Method::Ba | Method::Er => matrices
            .iter()
            .map(|m| {
                if !m.recurrent {
                    let reason = format!("{} prunes W_hh only; use the scope h2h", config.method);
                    return Err(Error::Setting {
                        setting: "scope",
                        reason,
                    });
                }
                if config.method == Method::ZeroWhh {
                    return Ok(BitMatrix::new(m.gates * m.rows, m.cols));
                }
                let mut rng = seed::rng(config.seed, &format!("{} {}", config.method, m.layer));
                let edges = random_graph(m.rows, m.budget(config.sparsity), config, &mut rng)?;
                Ok(tile(&edges, m.gates))
            })
            .collect(),
        _ => {
            let ranked = ranked.ok_or_else(|| Error::Setting {
                setting: "method",
                reason: format!("{} needs scores of neurons", config.method),
            })?;
            Ok(matrices
                .iter()
                .map(|m| by_neurons(m, ranked, config))
                .collect())
        }
    }
}

fn by_neurons(m: &Matrix<'_>, ranked: &Ranked, config: &PruneConfig) -> BitMatrix {
    let targets = &ranked.places[m.layer];
    // Inputs of the first layer have no rank: the target alone decides.
    let from = if m.recurrent {
        Some(m.layer)
    } else {
        m.layer.checked_sub(1)
    };
    let aggregate = config.lattice.aggregate;
    let level = |i: usize, j: usize, of: fn(u64, u64) -> u64| {
        // Places as shares of their layers, over the common denominator.
        let target = (targets[i] * m.cols) as u64;
        from.map_or(target, |l| {
            of(target, (ranked.places[l][j] * m.rows) as u64)
        })
    };
    let connections = |of: fn(u64, u64) -> u64| {
        let rank = |i, j| Rank {
            level: level(i, j, of),
            weight: m.connection(i, j, aggregate),
        };
        tile(
            &keep_top(m.rows, m.cols, m.budget(config.sparsity), rank),
            m.gates,
        )
    };
    match config.rule {
        MaskRule::Both => connections(u64::max),
        MaskRule::Either => connections(u64::min),
        MaskRule::WeightedMagnitude { lambda } => {
            let score = |i: usize, j: usize| {
                let target = ranked.scores[m.layer][i];
                target + from.map_or(target, |l| ranked.scores[l][j])
            };
            let rank = |row: usize, j: usize| Rank {
                level: 0,
                weight: f64::from(m.w[row * m.cols + j]).abs()
                    * (1.0 + lambda * score(row % m.rows, j)),
            };
            keep_top(
                m.gates * m.rows,
                m.cols,
                m.gates * m.budget(config.sparsity),
                rank,
            )
        }
    }
}

fn magnitude(matrices: &[Matrix<'_>], config: &PruneConfig) -> Vec<BitMatrix> {
    let weight = |m: &Matrix<'_>, row: usize, j: usize| f64::from(m.w[row * m.cols + j]).abs();
    match config.compete {
        Compete::PerMatrix => matrices
            .iter()
            .map(|m| {
                let rank = |row, j| Rank {
                    level: 0,
                    weight: weight(m, row, j),
                };
                keep_top(
                    m.gates * m.rows,
                    m.cols,
                    m.gates * m.budget(config.sparsity),
                    rank,
                )
            })
            .collect(),
        Compete::PerGate => matrices
            .iter()
            .map(|m| {
                let mut keep = BitMatrix::new(m.gates * m.rows, m.cols);
                for g in 0..m.gates {
                    let rank = |i, j| Rank {
                        level: 0,
                        weight: weight(m, g * m.rows + i, j),
                    };
                    let gate = keep_top(m.rows, m.cols, m.budget(config.sparsity), rank);
                    for i in 0..m.rows {
                        keep.row_mut(g * m.rows + i).copy_from_slice(gate.row(i));
                    }
                }
                keep
            })
            .collect(),
        Compete::Global => {
            let total: usize = matrices.iter().map(|m| m.w.len()).sum();
            let budget: usize = matrices
                .iter()
                .map(|m| m.gates * m.budget(config.sparsity))
                .sum();
            // One row of all weights, cut back into matrices.
            let all: Vec<f32> = matrices.iter().flat_map(|m| m.w).map(|w| w.abs()).collect();
            let kept = keep_top(1, total, budget, |_, e| Rank {
                level: 0,
                weight: f64::from(all[e]),
            });
            let mut start = 0;
            matrices
                .iter()
                .map(|m| {
                    let from = start;
                    start += m.w.len();
                    BitMatrix::from_fn(m.gates * m.rows, m.cols, |row, j| {
                        kept.get(0, from + row * m.cols + j)
                    })
                })
                .collect()
        }
    }
}

fn random(m: &Matrix<'_>, sparsity: f64, rng: &mut ChaCha8Rng) -> BitMatrix {
    let mut keep = BitMatrix::new(m.gates * m.rows, m.cols);
    for e in index::sample(rng, m.w.len(), m.gates * m.budget(sparsity)) {
        keep.set(e / m.cols, e % m.cols, true);
    }
    keep
}

/// Exactly `budget` connections: both directions of the edges of a random graph with half as many edges, an odd one out on
/// the diagonal. Where the budget exceeds all pairs, the rest is the diagonal.
fn random_graph(
    n: usize,
    budget: usize,
    config: &PruneConfig,
    rng: &mut ChaCha8Rng,
) -> Result<BitMatrix> {
    let pairs = n * (n - 1) / 2;
    let edges = (budget / 2).min(pairs);
    let graph = match config.method {
        Method::Ws if n > 2 => {
            let half_degree = edges.div_ceil(n).clamp(1, (n - 1) / 2);
            watts_strogatz(n, half_degree, config.rewire, rng)?
        }
        // The smallest m with m (n - m) edges or more; beyond n / 2 there are no more edges to have.
        Method::Ba if n > 1 => {
            let m = (1..=(n / 2).max(1))
                .find(|m| m * (n - m) >= edges)
                .unwrap_or((n / 2).max(1));
            barabasi_albert(n, m, rng)?
        }
        Method::Er => erdos_renyi(n, edges, rng)?,
        _ => Graph::new(n, []),
    }
    .resized(edges, rng)?;
    let mut keep = BitMatrix::new(n, n);
    for &(a, b) in &graph.edges {
        keep.set(a, b, true);
        keep.set(b, a, true);
    }
    let mut diagonal: Vec<usize> = (0..n).collect();
    for _ in 0..budget - 2 * edges {
        let x = diagonal.swap_remove(rng.random_range(0..diagonal.len()));
        keep.set(x, x, true);
    }
    Ok(keep)
}

/// The matrices in scope, layer after layer, recurrent before input.
pub(super) fn in_scope<'a>(
    layers: &[LayerWeights<'a>],
    cell: Cell,
    config: &PruneConfig,
) -> Vec<Matrix<'a>> {
    let gates = cell.gates();
    let mut matrices = Vec::new();
    for (layer, l) in layers.iter().enumerate() {
        let rows = l.hidden;
        if config.scope.recurrent() {
            matrices.push(Matrix {
                w: l.w_hh,
                gates,
                rows,
                cols: rows,
                recurrent: true,
                layer,
            });
        }
        if let (Some(w), true) = (l.w_ih, config.scope.input()) {
            matrices.push(Matrix {
                w,
                gates,
                rows,
                cols: w.len() / (gates * rows),
                recurrent: false,
                layer,
            });
        }
    }
    matrices
}
