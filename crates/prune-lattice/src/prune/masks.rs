//! From scores, weights and chance to masks of exact size.

use super::{Compete, LayerWeights, Method, PruneConfig, score::Scores};
use crate::{
    cell::Cell,
    error::{Error, Result},
    graph::{Graph, barabasi_albert, erdos_renyi, watts_strogatz},
    influence::Aggregate,
    mask::{Block, MaskRule, Rank, keep_top, tile},
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
    /// The entries that exist, shaped like the matrix; the others are pruned beside the budget.
    pub(super) allowed: Option<&'a BitMatrix>,
    /// What the magnitudes of each column are multiplied by.
    pub(super) input_scale: Option<&'a [f64]>,
}

/// Entries that do not exist come after all others.
const EXCLUDED: Rank = Rank {
    level: u64::MAX,
    weight: f64::NEG_INFINITY,
};

impl Matrix<'_> {
    fn allows(&self, row: usize, j: usize) -> bool {
        self.allowed.is_none_or(|a| a.get(row, j))
    }

    /// Whether a connection exists in every gate.
    fn allows_connection(&self, i: usize, j: usize) -> bool {
        (0..self.gates).all(|g| self.allows(g * self.rows + i, j))
    }

    /// Weights of a gate that exist.
    fn size(&self, gate: usize) -> usize {
        match self.allowed {
            None => self.rows * self.cols,
            Some(_) => {
                let row = |i: usize| {
                    (0..self.cols).filter(move |&j| self.allows(gate * self.rows + i, j))
                };
                (0..self.rows).map(|i| row(i).count()).sum()
            }
        }
    }

    /// Weights of all gates to keep.
    fn budget(&self, sparsity: f64) -> usize {
        (0..self.gates)
            .map(|g| share(1.0 - sparsity, self.size(g)))
            .sum()
    }

    /// Connections to keep; every connection stands for a weight in each gate.
    fn connections(&self, sparsity: f64) -> usize {
        match self.allowed {
            None => share(1.0 - sparsity, self.rows * self.cols),
            Some(_) => {
                let row = |i: usize| (0..self.cols).filter(move |&j| self.allows_connection(i, j));
                share(1.0 - sparsity, (0..self.rows).map(|i| row(i).count()).sum())
            }
        }
    }

    /// Magnitude of a weight, times that of its input where they are weighed.
    fn magnitude(&self, row: usize, j: usize) -> f64 {
        let scale = self.input_scale.map_or(1.0, |s| s[j]);
        f64::from(self.w[row * self.cols + j]).abs() * scale
    }

    /// Joined magnitude of a connection over the gates.
    fn connection(&self, i: usize, j: usize, how: Aggregate) -> f64 {
        let at = |g: usize| self.magnitude(g * self.rows + i, j);
        let gates = (0..self.gates).map(at);
        match how {
            Aggregate::L2 => gates.map(|m| m * m).sum::<f64>().sqrt(),
            Aggregate::Max => gates.fold(0.0, f64::max),
            Aggregate::Sum => gates.sum(),
            Aggregate::Gate(g) => at(g.min(self.gates - 1)),
        }
    }

    /// The connections with the best ranks among those that exist, in all gates.
    fn keep_connections(&self, sparsity: f64, rank: impl Fn(usize, usize) -> Rank) -> BitMatrix {
        let rank = |i, j| match self.allows_connection(i, j) {
            true => rank(i, j),
            false => EXCLUDED,
        };
        let kept = keep_top(self.rows, self.cols, self.connections(sparsity), rank);
        tile(&kept, self.gates)
    }

    /// The weights with the best ranks among those that exist.
    fn keep_weights(&self, keep: usize, rank: impl Fn(usize, usize) -> Rank) -> BitMatrix {
        let rank = |row, j| match self.allows(row, j) {
            true => rank(row, j),
            false => EXCLUDED,
        };
        keep_top(self.gates * self.rows, self.cols, keep, rank)
    }

    /// Masks of the gates, one above the other.
    fn per_gate(&self, mask: impl Fn(usize) -> BitMatrix) -> BitMatrix {
        let mut keep = BitMatrix::new(self.gates * self.rows, self.cols);
        for g in 0..self.gates {
            let gate = mask(g);
            for i in 0..self.rows {
                keep.row_mut(g * self.rows + i).copy_from_slice(gate.row(i));
            }
        }
        keep
    }
}

fn share(density: f64, of: usize) -> usize {
    (density * of as f64).round() as usize
}

/// The share of its weights that a gate keeps.
fn density(config: &PruneConfig, gate: usize) -> f64 {
    match &config.densities {
        Some(densities) => densities[gate],
        None => 1.0 - config.sparsity,
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
    let plain = |weight: f64| Rank { level: 0, weight };
    match config.method {
        Method::Dense => Ok(matrices
            .iter()
            .map(|m| match m.allowed {
                Some(allowed) => allowed.clone(),
                None => BitMatrix::ones(m.gates * m.rows, m.cols),
            })
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
                let aggregate = config.lattice.aggregate;
                let rank = |i, j| plain(m.connection(i, j, aggregate));
                m.keep_connections(config.sparsity, rank)
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
                if m.allowed.is_some() {
                    let reason = format!("{} draws its own graph", config.method);
                    return Err(Error::Setting {
                        setting: "wiring",
                        reason,
                    });
                }
                let mut rng = seed::rng(config.seed, &format!("{} {}", config.method, m.layer));
                let edges = random_graph(m.rows, m.connections(config.sparsity), config, &mut rng)?;
                Ok(tile(&edges, m.gates))
            })
            .collect(),
        method => match (method.block(), ranked) {
            (Some(block), _) => matrices
                .iter()
                .map(|m| by_blocks(m, block, config))
                .collect(),
            (None, Some(ranked)) => Ok(matrices
                .iter()
                .map(|m| by_neurons(m, ranked, config))
                .collect()),
            (None, None) => Err(Error::Setting {
                setting: "method",
                reason: format!("{method} needs scores of neurons"),
            }),
        },
    }
}

fn by_blocks(m: &Matrix<'_>, block: Block, config: &PruneConfig) -> Result<BitMatrix> {
    if m.allowed.is_some() {
        return Err(Error::Setting {
            setting: "wiring",
            reason: format!("{} keeps whole blocks, which it may cut", config.method),
        });
    }
    let diagonal = m.recurrent && config.keep_diagonal;
    let (down, across) = block.grid(m.rows, m.cols);
    Ok(m.per_gate(|g| {
        let weight = |i: usize, j: usize| match diagonal && i == j {
            true => 0.0,
            false => m.magnitude(g * m.rows + i, j).powi(2),
        };
        let keep = share(density(config, g), down * across);
        let mut kept = block.keep_largest(m.rows, m.cols, keep, weight);
        if diagonal {
            (0..m.rows).for_each(|i| kept.set(i, i, true));
        }
        kept
    }))
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
        m.keep_connections(config.sparsity, rank)
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
                weight: m.magnitude(row, j) * (1.0 + lambda * score(row % m.rows, j)),
            };
            m.keep_weights(m.budget(config.sparsity), rank)
        }
    }
}

fn magnitude(matrices: &[Matrix<'_>], config: &PruneConfig) -> Vec<BitMatrix> {
    let plain = |weight: f64| Rank { level: 0, weight };
    match config.compete {
        Compete::PerMatrix => matrices
            .iter()
            .map(|m| {
                m.keep_weights(m.budget(config.sparsity), |row, j| {
                    plain(m.magnitude(row, j))
                })
            })
            .collect(),
        Compete::PerGate => matrices
            .iter()
            .map(|m| {
                m.per_gate(|g| {
                    let rank = |i: usize, j: usize| match m.allows(g * m.rows + i, j) {
                        true => plain(m.magnitude(g * m.rows + i, j)),
                        false => EXCLUDED,
                    };
                    let keep = share(density(config, g), m.size(g));
                    keep_top(m.rows, m.cols, keep, rank)
                })
            })
            .collect(),
        Compete::Global => {
            let total: usize = matrices.iter().map(|m| m.w.len()).sum();
            let budget: usize = matrices.iter().map(|m| m.budget(config.sparsity)).sum();
            // One row of all weights, cut back into matrices.
            let all: Vec<Rank> = matrices
                .iter()
                .flat_map(|m| {
                    (0..m.w.len()).map(move |e| match m.allows(e / m.cols, e % m.cols) {
                        true => plain(m.magnitude(e / m.cols, e % m.cols)),
                        false => EXCLUDED,
                    })
                })
                .collect();
            let kept = keep_top(1, total, budget, |_, e| all[e]);
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
    let exist: Vec<usize> = (0..m.w.len())
        .filter(|e| m.allows(e / m.cols, e % m.cols))
        .collect();
    for k in index::sample(rng, exist.len(), m.budget(sparsity)) {
        keep.set(exist[k] / m.cols, exist[k] % m.cols, true);
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
    sides: &'a [Sides],
) -> Vec<Matrix<'a>> {
    let gates = cell.gates();
    let mut matrices = Vec::new();
    for (layer, l) in layers.iter().enumerate() {
        let rows = l.hidden;
        let side = sides.get(layer);
        if config.scope.recurrent() {
            matrices.push(Matrix {
                w: l.w_hh,
                gates,
                rows,
                cols: rows,
                recurrent: true,
                layer,
                allowed: side.and_then(|s| s.recurrent.as_ref()),
                input_scale: side.and_then(|s| s.recurrent_scale.as_deref()),
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
                allowed: side.and_then(|s| s.input.as_ref()),
                input_scale: side.and_then(|s| s.input_scale.as_deref()),
            });
        }
    }
    matrices
}

/// What is known of a layer's matrices beside their weights: the entries that exist, and the size of what they read.
#[derive(Default)]
pub(super) struct Sides {
    pub(super) recurrent: Option<BitMatrix>,
    pub(super) input: Option<BitMatrix>,
    pub(super) recurrent_scale: Option<Vec<f64>>,
    pub(super) input_scale: Option<Vec<f64>>,
}
