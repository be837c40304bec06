//! Compressors against naive second implementations, and what must hold for any weight and inputs.

use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::ThreadPoolBuilder;

use super::{Compressed, Compressor, Inputs};
use crate::Error;

fn random(seed: u64, rows: usize, cols: usize) -> Mat<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Mat::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0))
}

/// Inputs that depend on each other and have very different sizes.
fn correlated(seed: u64, n: usize, tokens: usize) -> Mat<f64> {
    let mix = Mat::<f64>::identity(n, n) + 0.3 * random(seed, n, n);
    let mut x = mix * random(seed + 1, n, tokens);
    for j in 0..n {
        for t in 0..tokens {
            x[(j, t)] *= 0.6f64.powi((j % 7) as i32);
        }
    }
    x
}

fn gram(x: &Mat<f64>) -> Mat<f64> {
    x * x.transpose()
}

fn run(name: &str, w: &Mat<f64>, h: &Mat<f64>) -> Compressed {
    let compressor: Compressor = name.parse().expect("a name");
    compressor
        .compress(w.as_ref(), Some(Inputs::Gram(h.as_ref())))
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn distance(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    (a - b).norm_max()
}

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

#[test]
fn stale_groups_are_updated_ones_where_groups_are_blocks_and_worse_fitted_where_not() {
    let w = random(5, 16, 64);
    let h = gram(&correlated(6, 64, 200));
    let same = distance(
        &run("gptq-int3-g16-block16-stale", &w, &h).weight,
        &run("gptq-int3-g16-block16", &w, &h).weight,
    );
    assert_eq!(same, 0.0);
    let other = distance(
        &run("gptq-int3-g16-stale", &w, &h).weight,
        &run("gptq-int3-g16", &w, &h).weight,
    );
    assert!(other > 0.0);
    // In one block, stale parameters are those of the original weights.
    let statics = run("gptq-int3-g16-static", &w, &h);
    let stale = run("gptq-int3-g16-stale", &w, &h);
    assert_eq!(distance(&statics.weight, &stale.weight), 0.0);
}

#[test]
fn gptq_with_independent_inputs_is_rounding() {
    let w = random(7, 20, 140);
    let h = 3.0 * Mat::<f64>::identity(140, 140);
    for bits in ["int2", "int3", "int4", "int8"] {
        for suffix in ["", "-g32", "-g32-sym", "-g32-mse"] {
            let rounded = run(&format!("rtn-{bits}{suffix}"), &w, &h);
            let gptq = run(&format!("gptq-{bits}{suffix}"), &w, &h);
            assert_eq!(rounded.quantised, gptq.quantised, "{bits}{suffix}");
        }
    }
}

#[test]
fn taking_over_errors_lowers_the_loss() {
    let w = random(8, 32, 96);
    let x = correlated(9, 96, 300);
    let h = gram(&x);
    let loss = |name: &str| ((&w - run(name, &w, &h).weight) * &x).norm_l2();
    // No theorem: with groups of 2 bits the errors taken over no longer fit the grid, and rounding wins on this weight.
    for bits in ["int3", "int4", "int8"] {
        for group in ["", "-g32"] {
            let rounded = loss(&format!("rtn-{bits}{group}"));
            let gptq = loss(&format!("gptq-{bits}{group}"));
            assert!(gptq < rounded, "{bits}{group}: {gptq} {rounded}");
        }
    }
    for pattern in ["50", "2:4", "4:8"] {
        let magnitude = loss(&format!("magnitude-{pattern}"));
        let wanda = loss(&format!("wanda-{pattern}"));
        let sparsegpt = loss(&format!("sparsegpt-{pattern}"));
        assert!(sparsegpt < wanda && wanda < magnitude, "{pattern}");
    }
    // One sweep for both accounts for the rounding too.
    assert!(loss("sparsegpt-2:4+gptq-int4") < loss("sparsegpt-2:4+rtn-int4"));
    assert!(loss("wanda-2:4+gptq-int4") < loss("wanda-2:4+rtn-int4"));
}

#[test]
fn the_reported_loss_is_that_of_the_damped_inputs() {
    let w = random(10, 70, 140);
    let h = gram(&correlated(11, 140, 300));
    let mean = (0..140).map(|j| h[(j, j)]).sum::<f64>() / 140.0;
    for name in [
        "sparsegpt-50",
        "gptq-int3-g32-act",
        "sparsegpt-2:4+gptq-int4",
    ] {
        let compressed = run(name, &w, &h);
        let d = &w - &compressed.weight;
        let damped = &h + 0.01 * mean * Mat::<f64>::identity(140, 140);
        let product = &d * damped;
        let loss: f64 = (0..70)
            .flat_map(|i| (0..140).map(move |j| (i, j)))
            .map(|at| product[at] * d[at])
            .sum();
        let report = compressed.sweep.expect("it sweeps");
        assert!((report.loss / loss - 1.0).abs() < 1e-9, "{name}");
        assert_eq!((report.damping, report.retries, report.dead), (0.01, 0, 0));
    }
}

#[test]
fn patterns_and_ratios_are_exact() {
    let (m, n) = (70, 264);
    let w = random(12, m, n);
    let h = gram(&correlated(13, n, 300));
    for score in ["magnitude", "wanda", "sparsegpt"] {
        for (keep, of) in [(2, 4), (4, 8), (1, 4), (3, 4)] {
            for quantise in ["", "+rtn-int4", "+gptq-int4-g32"] {
                let name = format!("{score}-{keep}:{of}{quantise}");
                let compressed = run(&name, &w, &h);
                let mask = compressed.mask.expect("it prunes");
                assert!(
                    mask.pruned()
                        .chunks(of)
                        .all(|c| c.iter().filter(|&&p| p).count() == of - keep)
                );
                for (at, &pruned) in mask.pruned().iter().enumerate() {
                    assert!(
                        !pruned || compressed.weight[(at / n, at % n)] == 0.0,
                        "{name}"
                    );
                }
            }
        }
        for percent in [0.0, 12.5, 50.0, 99.9] {
            let compressed = run(&format!("{score}-{percent}"), &w, &h);
            let zeros = compressed.mask.expect("it prunes").count();
            let expected = match score {
                "wanda" => m * (n as f64 * percent / 100.0) as usize,
                _ => ((m * n) as f64 * percent / 100.0) as usize,
            };
            assert_eq!(zeros, expected, "{score}-{percent}");
            if percent == 0.0 {
                assert_eq!(distance(&compressed.weight, &w), 0.0, "{score}");
            }
        }
    }
}

#[test]
fn ties_are_cut_by_position_or_all_together() {
    let w = Mat::from_fn(2, 4, |i, j| if (i, j) == (1, 0) { 0.5 } else { 1.0 });
    let zeros = |name: &str| {
        let compressor: Compressor = name.parse().expect("a name");
        let compressed = compressor.compress(w.as_ref(), None).expect("valid");
        let mask = compressed.mask.expect("it prunes");
        mask.pruned()
            .iter()
            .map(|&p| u8::from(p))
            .collect::<Vec<_>>()
    };
    assert_eq!(zeros("magnitude-50"), [1, 1, 1, 0, 1, 0, 0, 0]);
    assert_eq!(zeros("magnitude-12.5"), [0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(zeros("magnitude-12.5-ties"), [1; 8]);
    assert_eq!(zeros("magnitude-2:4"), [1, 1, 0, 0, 1, 1, 0, 0]);
}

#[test]
fn wanda_weighs_magnitudes_by_the_norms_of_the_inputs() {
    let w = Mat::from_fn(2, 4, |i, j| {
        [[4.0, -3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]][i][j]
    });
    let compressor: Compressor = "wanda-50".parse().expect("a name");
    // Norms 1, 2, 3, 5: scores 4, 6, 6, 5 and 1, 2, 3, 5.
    let squares = [1.0, 4.0, 9.0, 25.0];
    let inputs = Some(Inputs::Diagonal(&squares));
    let weight = compressor
        .compress(w.as_ref(), inputs)
        .expect("valid")
        .weight;
    let expected = [[0.0, -3.0, 2.0, 0.0], [0.0, 0.0, 1.0, 1.0]];
    assert_eq!(weight, Mat::from_fn(2, 4, |i, j| expected[i][j]));
}

#[test]
fn outputs_do_not_depend_on_each_other_nor_on_the_scale_of_the_inputs() {
    let (m, n) = (130, 64);
    let w = random(14, m, n);
    let h = gram(&correlated(15, n, 200));
    let scaled = 1024.0 * &h;
    for name in [
        "wanda-50",
        "sparsegpt-2:4",
        "gptq-int3-g16-act",
        "sparsegpt-2:4+gptq-int4",
        "rtn-int3-mse",
    ] {
        let weight = run(name, &w, &h).weight;
        let reversed = run(name, &w.as_ref().reverse_rows().to_owned(), &h).weight;
        assert_eq!(
            distance(&reversed.as_ref().reverse_rows().to_owned(), &weight),
            0.0,
            "{name}"
        );
        assert_eq!(
            distance(&run(name, &w, &scaled).weight, &weight),
            0.0,
            "{name}"
        );
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (m, n) = (200, 520);
    let w = random(16, m, n);
    let h = gram(&correlated(17, n, 600));
    for name in [
        "magnitude-50",
        "wanda-50",
        "sparsegpt-50",
        "gptq-int3-g128-act",
        "sparsegpt-2:4+gptq-int4",
    ] {
        let with = |threads: usize| {
            let pool = ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool");
            pool.install(|| run(name, &w, &h))
        };
        let (one, report) = (with(1), with(1).sweep);
        for threads in [2, 3, 7] {
            let many = with(threads);
            assert_eq!(
                distance(&one.weight, &many.weight),
                0.0,
                "{name}, {threads} threads"
            );
            assert_eq!(report, many.sweep, "{name}, {threads} threads");
        }
    }
}

#[test]
fn stored_codes_are_in_range_and_give_exactly_the_weight() {
    let w = random(18, 9, 50);
    let h = gram(&correlated(19, 50, 100));
    for bits in [2, 3, 4, 8] {
        for suffix in ["", "-sym", "-symclip", "-g16", "-g16-sym-mse", "-exact"] {
            for method in ["rtn", "gptq", "wanda-50+rtn"] {
                let name = format!("{method}-int{bits}{suffix}");
                let compressed = run(&name, &w, &h);
                let stored = compressed.quantised.expect("it quantises");
                assert_eq!(
                    distance(&stored.dequantise(), &compressed.weight),
                    0.0,
                    "{name}"
                );
                let max = stored.bits.max_code();
                assert!(
                    stored
                        .codes
                        .iter()
                        .chain(&stored.zeros)
                        .all(|&code| code <= max)
                );
                assert_eq!(stored.is_symmetric(), suffix.contains("sym"), "{name}");
                let half = stored
                    .scales
                    .iter()
                    .all(|&s| f16::from_f64(s).to_f64() == s);
                assert_eq!(half, suffix != "-exact", "{name}");
            }
        }
    }
}

#[test]
fn act_order_groups_columns_by_the_size_of_their_inputs() {
    let w = random(20, 4, 8);
    let h = Mat::from_fn(8, 8, |i, j| {
        if i == j {
            [1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0][i]
        } else {
            0.0
        }
    });
    let stored = |name: &str| run(name, &w, &h).quantised.expect("it quantises");
    assert_eq!(
        stored("gptq-int4-g4-act").group_index,
        [1, 0, 1, 0, 1, 0, 1, 0]
    );
    assert_eq!(
        stored("gptq-int4-g4-act-static").group_index,
        [0, 0, 0, 0, 1, 1, 1, 1]
    );
    assert!(!stored("gptq-int4-g4-act").is_ordered());
    assert!(stored("gptq-int4-g3").is_ordered());
}

#[test]
fn a_degenerate_gram_matrix_is_no_failure() {
    let (m, n) = (8, 48);
    let w = random(21, m, n);
    let dead = {
        let mut x = correlated(22, n, 100);
        for t in 0..100 {
            x[(5, t)] = 0.0;
            x[(40, t)] = 0.0;
        }
        gram(&x)
    };
    let few = gram(&correlated(23, n, 3));
    // Rounded so coarsely that it has negative eigenvalues.
    let mut coarse = few.clone();
    for j in 0..n {
        for i in 0..n {
            coarse[(i, j)] = (coarse[(i, j)] * 4.0).round() / 4.0;
        }
    }
    let zero = Mat::zeros(n, n);
    for name in [
        "gptq-int4-damp0",
        "sparsegpt-2:4-damp0",
        "gptq-int4-act",
        "sparsegpt-50+gptq-int3",
    ] {
        for (what, h) in [
            ("dead", &dead),
            ("few", &few),
            ("coarse", &coarse),
            ("zero", &zero),
        ] {
            let compressed = run(name, &w, h);
            assert!(compressed.weight.is_all_finite(), "{name}, {what}");
            let report = compressed.sweep.expect("it sweeps");
            match what {
                "dead" => {
                    assert_eq!(report.dead, 2, "{name}");
                    assert!((0..m).all(|i| compressed.weight[(i, 5)] == 0.0));
                }
                "zero" => assert_eq!(report.dead, n, "{name}"),
                _ => {}
            }
            if what == "coarse" && name.contains("damp0") {
                assert!(
                    report.retries > 0 && report.damping > 0.0,
                    "{name}: {report:?}"
                );
            }
        }
    }
}

#[test]
fn extreme_weights_are_quantised_finitely() {
    let tiny = 1e-310;
    let w = Mat::from_fn(4, 8, |i, j| {
        let sign = if j % 2 == 0 { 1.0 } else { -1.0 };
        sign * [0.0, tiny, 1e300, 1.0][i]
    });
    let h = Mat::<f64>::identity(8, 8);
    for name in [
        "rtn-int4",
        "rtn-int4-exact",
        "gptq-int3-sym",
        "rtn-int2-mse",
    ] {
        let compressed = run(name, &w, &h);
        assert!(compressed.weight.is_all_finite(), "{name}");
        assert!((0..8).all(|j| compressed.weight[(0, j)] == 0.0), "{name}");
    }
}

#[test]
fn bad_input_is_named() {
    let w = random(24, 4, 8);
    let compress = |name: &str, w: &Mat<f64>, inputs: Option<Inputs<'_>>| {
        let compressor: Compressor = name.parse().expect("a name");
        let error = compressor.compress(w.as_ref(), inputs);
        error.expect_err("refused")
    };
    let diagonal = [1.0; 8];
    let error = compress("gptq-int4", &w, Some(Inputs::Diagonal(&diagonal)));
    assert!(matches!(error, Error::NeedsInputs { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("`gptq-int4` needs the Gram matrix"),
        "{error}"
    );
    let error = compress("wanda-50", &w, None);
    assert!(matches!(error, Error::NeedsInputs { .. }), "{error}");
    let error = compress("wanda-50", &w, Some(Inputs::Diagonal(&diagonal[1..])));
    assert!(matches!(error, Error::Size { .. }), "{error}");
    let error = compress("wanda-50", &w, Some(Inputs::Diagonal(&[-1.0; 8])));
    assert!(matches!(error, Error::NotGram { .. }), "{error}");
    let small = Mat::<f64>::identity(7, 7);
    let error = compress("gptq-int4", &w, Some(Inputs::Gram(small.as_ref())));
    assert_eq!(
        error.to_string(),
        "Gram matrix of the inputs: expected (8, 8), found (7, 7)"
    );
    let mut h = Mat::<f64>::identity(8, 8);
    h[(6, 2)] = f64::NAN;
    let error = compress("gptq-int4", &w, Some(Inputs::Gram(h.as_ref())));
    assert_eq!(
        error.to_string(),
        "Gram matrix of the inputs: NaN at row 6, column 2"
    );
    let mut bad = w.clone();
    bad[(3, 1)] = f64::INFINITY;
    let error = compress("magnitude-50", &bad, None);
    assert_eq!(error.to_string(), "weight: inf at row 3, column 1");
    let error = compress("wanda-4:16", &w, Some(Inputs::Diagonal(&diagonal)));
    assert!(
        error
            .to_string()
            .contains("8 columns are not a multiple of 16"),
        "{error}"
    );
}
