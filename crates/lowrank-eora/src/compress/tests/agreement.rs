//! SparseGPT and GPTQ against a naive second implementation.

use super::{correlated, distance, gram, random, run};
use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};

/// GPTQ and SparseGPT column by column: after each column H⁻¹ is downdated by elimination, without any factor or block.
struct Naive {
    bits: Option<u32>,
    group: usize,
    act: bool,
    statics: bool,
    /// N:M.
    pattern: Option<(usize, usize)>,
    /// Share of all weights, chosen before the first column.
    percent: Option<f64>,
    damping: f64,
}

const NAIVE: Naive = Naive {
    bits: None,
    group: usize::MAX,
    act: false,
    statics: false,
    pattern: None,
    percent: None,
    damping: 0.01,
};

impl Naive {
    fn fit(&self, weights: &[f64]) -> (f64, f64) {
        let max = 2f64.powi(self.bits.expect("quantises") as i32) - 1.0;
        let lo = weights.iter().copied().fold(0.0, f64::min);
        let hi = weights.iter().copied().fold(0.0, f64::max);
        let scale = (hi - lo) / max;
        (scale, (-lo / scale).round_ties_even())
    }

    fn round(&self, weight: f64, (scale, zero): (f64, f64)) -> f64 {
        let max = 2f64.powi(self.bits.expect("quantises") as i32) - 1.0;
        scale * (((weight / scale).round_ties_even() + zero).clamp(0.0, max) - zero)
    }

    fn run(&self, w: &Mat<f64>, h: &Mat<f64>) -> Mat<f64> {
        let (m, n) = w.shape();
        let mut w = w.clone();
        let mut h = h.clone();
        for j in 0..n {
            if h[(j, j)] == 0.0 {
                h[(j, j)] = 1.0;
                (0..m).for_each(|i| w[(i, j)] = 0.0);
            }
        }
        let mean = (0..n).map(|j| h[(j, j)]).sum::<f64>() / n as f64;
        let mut order: Vec<usize> = (0..n).collect();
        if self.act {
            order.sort_by(|&a, &b| h[(b, b)].total_cmp(&h[(a, a)]));
        }
        (0..n).for_each(|j| h[(j, j)] += self.damping * mean);
        let inverse = h.llt(Side::Lower).expect("positive definite").inverse();
        let eliminate = |inverse: &mut Mat<f64>, p: usize| {
            let row: Vec<f64> = (0..n).map(|j| inverse[(p, j)]).collect();
            for i in 0..n {
                for j in 0..n {
                    inverse[(i, j)] -= row[i] * row[j] / row[p];
                }
            }
        };
        // The diagonal entry that each column has when its turn comes.
        let mut pivots = vec![0.0; n];
        let mut left = inverse.clone();
        for &p in &order {
            pivots[p] = left[(p, p)];
            eliminate(&mut left, p);
        }

        let original = w.clone();
        let width = self.group.min(n);
        let mut pruned = vec![vec![false; n]; m];
        if let Some(percent) = self.percent {
            let mut all: Vec<(f64, usize, usize)> = (0..m)
                .flat_map(|i| (0..n).map(move |j| (i, j)))
                .map(|(i, j)| (w[(i, j)].powi(2) / pivots[j], i, j))
                .collect();
            all.sort_by(|a, b| a.0.total_cmp(&b.0));
            let count = (all.len() as f64 * percent / 100.0) as usize;
            all[..count]
                .iter()
                .for_each(|&(_, i, j)| pruned[i][j] = true);
        }
        let mut steps = vec![(0.0, 0.0); m];
        let mut left = inverse;
        for (turn, &p) in order.iter().enumerate() {
            for i in 0..m {
                if self.bits.is_some() && self.statics {
                    let start = p / width * width;
                    let group: Vec<f64> = (start..(start + width).min(n))
                        .map(|j| original[(i, j)])
                        .collect();
                    steps[i] = self.fit(&group);
                } else if self.bits.is_some() && turn % width == 0 {
                    let group: Vec<f64> = order[turn..(turn + width).min(n)]
                        .iter()
                        .map(|&j| if pruned[i][j] { 0.0 } else { w[(i, j)] })
                        .collect();
                    steps[i] = self.fit(&group);
                }
                if let Some((keep, of)) = self.pattern
                    && turn % of == 0
                {
                    let mut columns: Vec<usize> = (turn..turn + of).collect();
                    columns.sort_by(|&a, &b| {
                        let score = |j: usize| w[(i, j)].powi(2) / pivots[j];
                        score(a).total_cmp(&score(b))
                    });
                    columns[..of - keep]
                        .iter()
                        .for_each(|&j| pruned[i][j] = true);
                }
                let mut value = if pruned[i][p] { 0.0 } else { w[(i, p)] };
                if self.bits.is_some() {
                    value = self.round(value, steps[i]);
                }
                let error = (w[(i, p)] - value) / left[(p, p)];
                for &j in &order[turn + 1..] {
                    w[(i, j)] -= error * left[(p, j)];
                }
                w[(i, p)] = value;
            }
            eliminate(&mut left, p);
        }
        w
    }
}

#[test]
fn gptq_agrees_with_column_by_column_elimination() {
    // More columns than a block, more rows than a strip, groups that do not divide either.
    let (m, n) = (67, 150);
    let w = random(1, m, n);
    let h = gram(&correlated(2, n, 400));
    let cases = [
        (
            "gptq-int4-exact",
            Naive {
                bits: Some(4),
                ..NAIVE
            },
        ),
        (
            "gptq-int3-g32-exact",
            Naive {
                bits: Some(3),
                group: 32,
                ..NAIVE
            },
        ),
        (
            "gptq-int4-g48-exact",
            Naive {
                bits: Some(4),
                group: 48,
                ..NAIVE
            },
        ),
        (
            "gptq-int4-g100-exact-block30",
            Naive {
                bits: Some(4),
                group: 100,
                ..NAIVE
            },
        ),
        (
            "gptq-int8-g7-exact",
            Naive {
                bits: Some(8),
                group: 7,
                ..NAIVE
            },
        ),
        (
            "gptq-int3-g32-exact-act",
            Naive {
                bits: Some(3),
                group: 32,
                act: true,
                ..NAIVE
            },
        ),
        (
            "gptq-int2-g32-exact-act-static-damp0.1",
            Naive {
                bits: Some(2),
                group: 32,
                act: true,
                statics: true,
                damping: 0.1,
                ..NAIVE
            },
        ),
        (
            "gptq-int3-g16-exact-static",
            Naive {
                bits: Some(3),
                group: 16,
                statics: true,
                ..NAIVE
            },
        ),
    ];
    for (name, naive) in cases {
        let found = run(name, &w, &h).weight;
        let distance = distance(&found, &naive.run(&w, &h));
        assert!(distance < 1e-9, "{name}: {distance}");
    }
}

#[test]
fn sparsegpt_agrees_with_column_by_column_elimination() {
    let (m, n) = (67, 152);
    let w = random(3, m, n);
    let h = gram(&correlated(4, n, 400));
    let cases = [
        (
            "sparsegpt-2:4",
            Naive {
                pattern: Some((2, 4)),
                ..NAIVE
            },
        ),
        (
            "sparsegpt-4:8",
            Naive {
                pattern: Some((4, 8)),
                ..NAIVE
            },
        ),
        // One block, so that both choose before the first column.
        (
            "sparsegpt-50-block152",
            Naive {
                percent: Some(50.0),
                ..NAIVE
            },
        ),
        (
            "sparsegpt-2:4+gptq-int4-g32-exact",
            Naive {
                pattern: Some((2, 4)),
                bits: Some(4),
                group: 32,
                ..NAIVE
            },
        ),
        (
            "sparsegpt-37.5+gptq-int3-exact-act-block152",
            Naive {
                percent: Some(37.5),
                bits: Some(3),
                act: true,
                ..NAIVE
            },
        ),
    ];
    for (name, naive) in cases {
        let found = run(name, &w, &h).weight;
        let distance = distance(&found, &naive.run(&w, &h));
        assert!(distance < 1e-9, "{name}: {distance}");
    }
}
