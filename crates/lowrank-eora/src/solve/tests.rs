use super::*;
use crate::testing::{Golden, Lcg, assert_close, assert_matrix_close};
use faer::linalg::solvers::Solve;
use proptest::prelude::*;

fn loss(d: &Mat<f64>, factors: &LowRank, h: &Mat<f64>) -> f64 {
    let error = factors.error(d.as_ref());
    let energy = Weighting::Gram(h.as_ref()).energy(error.as_ref());
    energy.expect("shapes fit").max(0.0).sqrt()
}

fn options(route: Route) -> Options {
    Options {
        route,
        ..Options::default()
    }
}

const ROUTES: [Route; 4] = [
    Route::Auto,
    Route::Gram,
    Route::Factor(Whitening::Eigen),
    Route::Factor(Whitening::Cholesky),
];

#[test]
fn golden_case_agrees_to_nine_digits() {
    let golden = Golden::new();
    let (d, h) = (golden.d(), golden.h());
    let wx = &golden.w * &golden.x;
    assert_close(wx.norm_l2(), 24.24760035075741, 1e-12);
    assert_close(d.norm_l2(), 0.9459978368373947, 1e-12);
    for route in ROUTES {
        let solve = |rank| {
            solve(
                d.as_ref(),
                &Weighting::Gram(h.as_ref()),
                rank,
                &options(route),
            )
            .expect("solves")
        };
        for (rank, expected) in [
            (1, 2.1305660709516903),
            (2, 1.5884241392597949),
            (3, 1.2343038187955053),
            (6, 0.3967066962033994),
        ] {
            let solution = solve(rank);
            assert_close(solution.loss(), expected, 1e-9);
            assert_close(loss(&d, &solution.factors, &h), expected, 1e-9);
        }
        assert!(loss(&d, &solve(12).factors, &h) < 1e-13);
        let three = solve(3);
        assert_close(three.spectrum.total().sqrt(), 3.1899469423599105, 1e-9);
        let product = three.factors.product();
        for (j, expected) in [0.072344, -0.033942, -0.008909].into_iter().enumerate() {
            assert!((product[(0, j)] - expected).abs() < 1e-6);
        }
        let singular = [2.374121, 1.419937, 0.999793, 0.881283, 0.647997];
        for (square, expected) in three.spectrum.squares().iter().zip(singular) {
            assert!((square.sqrt() - expected).abs() < 1e-6);
        }
    }
}

#[test]
fn diagonal_weightings_reach_their_golden_losses() {
    let golden = Golden::new();
    let (d, h) = (golden.d(), golden.h());
    let scales = |f: fn(f64) -> f64| -> Vec<f64> {
        let row = |j| golden.x.row(j).iter().map(|&x| f(x)).sum::<f64>();
        (0..16).map(row).collect()
    };
    let mean_abs: Vec<f64> = scales(f64::abs).iter().map(|s| s * s).collect();
    let squares = scales(|x| x * x);
    for (weighting, expected) in [
        (Weighting::Identity, 1.7033139565910513),
        (Weighting::Diagonal(&mean_abs), 1.4214612439321288),
        (Weighting::Diagonal(&squares), 1.394408824578968),
    ] {
        for route in [Route::Gram, Route::Factor(Whitening::Eigen)] {
            let solution = solve(d.as_ref(), &weighting, 3, &options(route)).expect("solves");
            assert_close(loss(&d, &solution.factors, &h), expected, 1e-9);
        }
    }
}

#[test]
fn tall_and_wide_layers_agree_on_all_routes() {
    let mut lcg = Lcg(3);
    for (m, n) in [(20, 9), (9, 20)] {
        let (d, x) = (lcg.matrix(m, n), lcg.activations(n, 50));
        let h = &x * x.transpose();
        let g = &d * &h * d.transpose();
        let best = solve(
            d.as_ref(),
            &Weighting::Factor(x.as_ref()),
            4,
            &options(ROUTES[2]),
        )
        .expect("solves");
        for route in ROUTES {
            for weighting in [Weighting::Gram(h.as_ref()), Weighting::Output(g.as_ref())] {
                if m > n && matches!(weighting, Weighting::Output(_)) && route == ROUTES[3] {
                    continue; // G is singular.
                }
                let found = solve(d.as_ref(), &weighting, 4, &options(route)).expect("solves");
                assert_matrix_close(
                    found.factors.product().as_ref(),
                    best.factors.product().as_ref(),
                    1e-9,
                );
            }
        }
    }
}

/// An activation matrix with a decaying spectrum and outlier channels.
fn decaying(lcg: &mut Lcg, n: usize, t: usize, outlier: f64) -> Mat<f64> {
    let mut x = lcg.matrix(n, n) * Mat::from_fn(n, t, |i, _| lcg.next() / (1.0 + i as f64));
    x.row_mut(n / 3).iter_mut().for_each(|x| *x *= outlier);
    x
}

#[test]
fn krylov_is_within_its_tolerance_of_the_optimum() {
    let mut lcg = Lcg(11);
    for (m, n, t, outlier, rank) in [
        (120, 160, 400, 1.0, 8),
        (160, 120, 400, 100.0, 24),
        (300, 100, 50, 1e4, 16),
        (60, 200, 400, 1e6, 8),
        (200, 200, 800, 1e6, 32),
        (200, 200, 30, 1.0, 40),
    ] {
        let (d, x) = (lcg.matrix(m, n), decaying(&mut lcg, n, t, outlier));
        let h = &x * x.transpose();
        let g = &d * &h * d.transpose();
        for weighting in [
            Weighting::Gram(h.as_ref()),
            Weighting::Factor(x.as_ref()),
            Weighting::Output(g.as_ref()),
        ] {
            let best = solve(
                d.as_ref(),
                &Weighting::Factor(x.as_ref()),
                rank,
                &options(ROUTES[2]),
            )
            .expect("solves");
            let found =
                solve(d.as_ref(), &weighting, rank, &options(Route::Krylov)).expect("solves");
            let true_loss = (found.factors.error(d.as_ref()) * &x).norm_l2();
            let floor = 1e-6 * best.spectrum.total().sqrt();
            assert!(
                true_loss <= 1.001 * best.loss() + floor,
                "{m} {n} {outlier}: {true_loss} {}",
                best.loss()
            );
            assert!(
                (found.loss() - true_loss).abs() <= 2e-3 * true_loss + floor,
                "{m} {n} {outlier}: {} {true_loss}",
                found.loss()
            );
            println!(
                "{m}x{n} t{t} o{outlier} r{rank} {:?} {}",
                found.route,
                true_loss / best.loss()
            );
        }
    }
}

/// Plain solve with H.
fn eora(d: &Mat<f64>, h: &Mat<f64>, rank: usize) -> Solution {
    let weighting = Weighting::Gram(h.as_ref());
    solve(d.as_ref(), &weighting, rank, &Options::default()).expect("solves")
}

fn orthogonal(lcg: &mut Lcg, n: usize) -> Mat<f64> {
    lcg.matrix(n, n).qr().compute_Q()
}

fn square(x: &Mat<f64>) -> Mat<f64> {
    x * x.transpose()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn nothing_of_the_same_rank_loses_less(
        m in 2usize..14, n in 2usize..14, t in 1usize..30, seed in 0u64..1000, scale in -3i32..4,
    ) {
        let mut lcg = Lcg(seed);
        let (d, mut x) = (lcg.matrix(m, n), lcg.activations(n, t));
        x.row_mut(n - 1).iter_mut().for_each(|x| *x *= 10f64.powi(scale));
        let h = square(&x);
        let diagonals = [
            (0..n).map(|i| h[(i, i)]).collect::<Vec<f64>>(),
            (0..n).map(|i| x.row(i).norm_l1().powi(2)).collect(),
        ];
        let size = (&d * &x).norm_l2();
        let mut before = size;
        for rank in 1..=m.min(n) {
            let best = eora(&d, &h, rank);
            let best_loss = loss(&d, &best.factors, &h);
            prop_assert!((best.loss() - best_loss).abs() <= 1e-6 * size);
            prop_assert!(best_loss <= before * (1.0 + 1e-6) + 1e-7 * size);
            before = best_loss;
            let plain = solve(d.as_ref(), &Weighting::Identity, rank, &Options::default()).expect("solves");
            let mut others = vec![plain.factors];
            for diagonal in &diagonals {
                let weighting = Weighting::Diagonal(diagonal);
                others.push(solve(d.as_ref(), &weighting, rank, &Options::default()).expect("solves").factors);
            }
            // A small step in any direction.
            let mut step = best.factors.clone();
            step.b += faer::Scale(1e-3 * step.b.norm_max()) * lcg.matrix(m, rank);
            step.a += faer::Scale(1e-3 * step.a.norm_max()) * lcg.matrix(rank, n);
            others.push(step);
            for other in &others {
                prop_assert!(best_loss <= loss(&d, other, &h) * (1.0 + 1e-6) + 1e-7 * size);
            }
            // The gradient is zero: E H Aᵀ = 0 and Bᵀ E H = 0.
            let eh = best.factors.error(d.as_ref()) * &h;
            let scale = (&d * &h).norm_l2();
            prop_assert!((&eh * best.factors.a.transpose()).norm_l2() <= 1e-6 * scale * best.factors.a.norm_l2());
            prop_assert!((best.factors.b.transpose() * &eh).norm_l2() <= 1e-6 * scale * best.factors.b.norm_l2());
        }
        prop_assert!(before <= 1e-6 * size);
    }

    #[test]
    fn solutions_turn_with_their_problem(seed in 0u64..1000, factor in 1e-3f64..1e3) {
        let mut lcg = Lcg(seed);
        let (d, x) = (lcg.matrix(9, 7), lcg.activations(7, 40));
        let (h, rank) = (square(&x), 3);
        let best = eora(&d, &h, rank).factors.product();
        let scaled = eora(&d, &(faer::Scale(factor) * &h), rank).factors.product();
        assert_matrix_close(scaled.as_ref(), best.as_ref(), 1e-6);
        let o = orthogonal(&mut lcg, 9);
        let turned = eora(&(&o * &d), &h, rank).factors.product();
        assert_matrix_close(turned.as_ref(), (&o * &best).as_ref(), 1e-6);
        let r = orthogonal(&mut lcg, 7);
        let turned = eora(&(&d * r.transpose()), &(&r * &h * r.transpose()), rank).factors.product();
        assert_matrix_close(turned.as_ref(), (&best * r.transpose()).as_ref(), 1e-6);
        let order: Vec<usize> = (0..40).map(|t| (t * 7) % 40).collect();
        let shuffled = Mat::from_fn(7, 40, |i, t| x[(i, order[t])]);
        let same = eora(&d, &square(&shuffled), rank).factors.product();
        assert_matrix_close(same.as_ref(), best.as_ref(), 1e-6);
        // Outputs of stacked layers may come in any order.
        let swapped = Mat::from_fn(9, 7, |i, j| d[((i + 4) % 9, j)]);
        let moved = eora(&swapped, &h, rank).factors.product();
        assert_matrix_close(moved.as_ref(), Mat::from_fn(9, 7, |i, j| best[((i + 4) % 9, j)]).as_ref(), 1e-6);
    }
}

#[test]
fn an_isotropic_input_gives_the_plain_singular_value_decomposition() {
    let d = Lcg(5).matrix(10, 8);
    let h = faer::Scale(3.0) * Mat::<f64>::identity(8, 8);
    let plain = solve(d.as_ref(), &Weighting::Identity, 3, &Options::default()).expect("solves");
    let weighted = eora(&d, &h, 3).factors.product();
    assert_matrix_close(weighted.as_ref(), plain.factors.product().as_ref(), 1e-9);
    let squares: f64 = plain.spectrum.squares()[3..].iter().sum();
    assert_close(plain.loss(), squares.sqrt(), 1e-12);
}

#[test]
fn singular_inputs_and_residuals_are_ordinary_cases() {
    let mut lcg = Lcg(6);
    let d = lcg.matrix(10, 12);
    let mut dead = lcg.activations(12, 40);
    dead.row_mut(3).fill(0.0);
    let mut copies = lcg.activations(12, 40);
    let first = copies.row(0).to_owned();
    copies.row_mut(5).copy_from(&first);
    for x in [dead, copies, lcg.activations(12, 5), lcg.activations(12, 1)] {
        let h = square(&x);
        for route in [
            Route::Auto,
            Route::Gram,
            Route::Factor(Whitening::Eigen),
            Route::Krylov,
        ] {
            let solution = solve(d.as_ref(), &Weighting::Gram(h.as_ref()), 3, &options(route))
                .expect("solves");
            let squares = (&d * &x).singular_values().expect("converges");
            let best = squares.iter().skip(3).map(|s| s * s).sum::<f64>().sqrt();
            let found = (solution.factors.error(d.as_ref()) * &x).norm_l2();
            assert!(
                found <= 1.001 * best + 1e-6 * squares[0],
                "{route:?}: {found}, best {best}"
            );
            check_finite(solution.factors.product().as_ref(), "B A").expect("finite");
        }
    }
    let singular = square(&lcg.activations(12, 5));
    let cholesky = options(Route::Factor(Whitening::Cholesky));
    let error = solve(
        d.as_ref(),
        &Weighting::Gram(singular.as_ref()),
        3,
        &cholesky,
    );
    assert!(matches!(error, Err(Error::Factorization { .. })));
}

#[test]
fn no_input_leaves_the_plain_decomposition_and_no_residual_no_correction() {
    let mut lcg = Lcg(7);
    let (d, zero) = (lcg.matrix(6, 8), Mat::zeros(8, 8));
    let plain = solve(d.as_ref(), &Weighting::Identity, 2, &Options::default()).expect("solves");
    for route in [Route::Auto, Route::Krylov, Route::Factor(Whitening::Eigen)] {
        let solution = solve(
            d.as_ref(),
            &Weighting::Gram(zero.as_ref()),
            2,
            &options(route),
        )
        .expect("solves");
        assert_eq!(solution.loss(), 0.0);
        assert_matrix_close(
            solution.factors.product().as_ref(),
            plain.factors.product().as_ref(),
            1e-6,
        );
    }
    let h = square(&lcg.activations(8, 20));
    let nothing = eora(&Mat::zeros(6, 8), &h, 2);
    assert_eq!(nothing.factors.product(), Mat::<f64>::zeros(6, 8));
}

#[test]
fn a_residual_of_low_rank_is_repaired_entirely() {
    let mut lcg = Lcg(8);
    let d = lcg.matrix(12, 3) * lcg.matrix(3, 20);
    let h = square(&lcg.activations(20, 60));
    let size = Weighting::Gram(h.as_ref())
        .energy(d.as_ref())
        .expect("fits")
        .sqrt();
    for route in [Route::Auto, Route::Krylov] {
        for rank in [3, 5] {
            let solution = solve(
                d.as_ref(),
                &Weighting::Gram(h.as_ref()),
                rank,
                &options(route),
            )
            .expect("solves");
            assert!(loss(&d, &solution.factors, &h) < 1e-6 * size);
        }
    }
}

#[test]
fn a_channel_a_million_times_larger_costs_no_accuracy() {
    let mut lcg = Lcg(12);
    let (d, mut x) = (lcg.matrix(40, 60), lcg.activations(60, 200));
    x.row_mut(17).iter_mut().for_each(|x| *x *= 1e6);
    let (h, rank) = (square(&x), 6);
    // Oracle: projected on the first direction, the rest is well scaled.
    let best = solve(
        d.as_ref(),
        &Weighting::Factor(x.as_ref()),
        rank,
        &options(ROUTES[2]),
    )
    .expect("solves");
    for route in [Route::Auto, Route::Gram, Route::Krylov, ROUTES[2]] {
        let solution = solve(
            d.as_ref(),
            &Weighting::Gram(h.as_ref()),
            rank,
            &options(route),
        )
        .expect("solves");
        let found = (solution.factors.error(d.as_ref()) * &x).norm_l2();
        assert!(
            found <= 1.001 * best.loss(),
            "{route:?}: {found}, best {}",
            best.loss()
        );
    }
}

#[test]
fn least_squares_in_turns_does_not_beat_the_closed_form() {
    let golden = Golden::new();
    let (d, h) = (golden.d(), golden.h());
    let mut lcg = Lcg(99);
    let weighting = Weighting::Gram(h.as_ref());
    let (mut a, mut b) = (lcg.matrix(3, 16), Mat::zeros(12, 3));
    for _ in 0..3000 {
        b = refit(d.as_ref(), &weighting, a.as_ref()).expect("fits");
        // With B given the best A is (BᵀB)⁻¹ Bᵀ D.
        a = (b.transpose() * &b)
            .partial_piv_lu()
            .solve(b.transpose() * &d);
    }
    let oracle = loss(&d, &LowRank { b, a }, &h);
    let closed = 1.2343038187955053;
    assert!(
        oracle >= closed * (1.0 - 1e-9) && oracle <= closed * (1.0 + 1e-6),
        "{oracle}"
    );
}

#[test]
fn impossible_ranks_and_shapes_are_typed_errors() {
    let (d, h) = (Mat::<f64>::zeros(4, 6), Mat::<f64>::identity(5, 5));
    for rank in [0, 5] {
        let error = solve(d.as_ref(), &Weighting::Identity, rank, &Options::default());
        assert!(matches!(
            error,
            Err(Error::Rank {
                rows: 4,
                cols: 6,
                ..
            })
        ));
    }
    for weighting in [
        Weighting::Gram(h.as_ref()),
        Weighting::Output(h.as_ref()),
        Weighting::Factor(h.as_ref()),
        Weighting::Diagonal(&[1.0]),
    ] {
        let error = solve(d.as_ref(), &weighting, 1, &Options::default());
        assert!(matches!(error, Err(Error::Shape { .. })));
    }
    let bad = Mat::from_fn(4, 6, |i, j| if (i, j) == (2, 3) { f64::NAN } else { 0.0 });
    let error = solve(bad.as_ref(), &Weighting::Identity, 1, &Options::default());
    assert!(matches!(
        error,
        Err(Error::NotFinite {
            row: 2,
            column: 3,
            ..
        })
    ));
}

#[test]
fn splits_share_one_product_and_the_balanced_one_fits_f16() {
    let mut lcg = Lcg(13);
    let (d, mut x) = (lcg.matrix(12, 16), lcg.activations(16, 60));
    x.row_mut(2).iter_mut().for_each(|x| *x *= 1e5);
    let h = square(&x);
    let solve = |split| {
        let options = Options {
            split,
            ..Options::default()
        };
        super::solve(d.as_ref(), &Weighting::Gram(h.as_ref()), 12, &options)
            .expect("solves")
            .factors
    };
    let balanced = solve(Split::Balanced);
    for split in [Split::SqrtSigma, Split::Orthonormal] {
        assert_matrix_close(
            solve(split).product().as_ref(),
            balanced.product().as_ref(),
            1e-9,
        );
    }
    for i in 0..12 {
        assert_close(
            balanced.b.col(i).norm_l2(),
            balanced.a.row(i).norm_l2(),
            1e-9,
        );
    }
    let (a, b) = balanced
        .to_tensors(candle_core::DType::F16, &candle_core::Device::Cpu)
        .expect("fits");
    let stored = LowRank::from_tensors(&a, &b).expect("finite");
    assert_matrix_close(stored.product().as_ref(), balanced.product().as_ref(), 5e-3);
}

#[test]
fn truncating_gives_the_solution_of_the_smaller_rank() {
    let golden = Golden::new();
    let (d, h) = (golden.d(), golden.h());
    let truncated = eora(&d, &h, 6).truncated(3).expect("smaller");
    assert_matrix_close(
        truncated.factors.product().as_ref(),
        eora(&d, &h, 3).factors.product().as_ref(),
        1e-9,
    );
    assert_close(truncated.loss(), 1.2343038187955053, 1e-9);
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let mut lcg = Lcg(14);
    let (d, x) = (lcg.matrix(150, 200), lcg.activations(200, 300));
    let h = square(&x);
    for route in [Route::Gram, Route::Krylov] {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool");
            pool.install(|| {
                solve(
                    d.as_ref(),
                    &Weighting::Gram(h.as_ref()),
                    10,
                    &options(route),
                )
                .expect("solves")
            })
        };
        let (one, three) = (run(1), run(3));
        assert_matrix_close(
            one.factors.product().as_ref(),
            three.factors.product().as_ref(),
            1e-9,
        );
    }
}

#[test]
fn methods_solve_in_their_norms_and_read_back_their_names() {
    let golden = Golden::new();
    let values = (0..64)
        .flat_map(|t| (0..16).map(move |j| (j, t)))
        .map(|(j, t)| golden.x[(j, t)] as f32);
    let rows = crate::stats::Rows::new(values.collect(), 16).expect("finite");
    let collect = crate::stats::Collect {
        gram: true,
        cross: true,
    };
    let mut collector =
        crate::stats::InputCollector::new(16, collect, Default::default()).expect("valid");
    collector.update(&rows, Some(&rows)).expect("fits");
    let stats = collector.finish();
    let (d, h) = (golden.d(), golden.h());
    for (name, expected) in [
        ("svd", 1.7033139565910513),
        ("act-scale", 1.4214612439321288),
        ("diag", 1.394408824578968),
        ("eora", 1.2343038187955053),
        ("eora-drift", 1.2343038187955053),
    ] {
        let method: Method = name.parse().expect("a name");
        assert_eq!(method.name(), name);
        let solution = method
            .solve(
                golden.w.as_ref(),
                golden.compressed.as_ref(),
                &stats,
                3,
                &Options::default(),
            )
            .expect("solves");
        assert_close(loss(&d, &solution.factors, &h), expected, 1e-5);
    }
    for name in Method::NAMES {
        assert_eq!(name.parse::<Method>().expect("a name").to_string(), *name);
    }
    assert!(matches!(
        "aora".parse::<Method>(),
        Err(Error::UnknownMethod { .. })
    ));
    let without = crate::stats::InputStats {
        gram: None,
        ..stats
    };
    let error = Method::Eora.solve(
        golden.w.as_ref(),
        golden.compressed.as_ref(),
        &without,
        3,
        &Options::default(),
    );
    assert!(matches!(
        error,
        Err(Error::MissingStatistic { method: "eora", .. })
    ));
}

#[test]
fn drift_aware_correction_beats_the_local_one_on_drifting_inputs() {
    let mut lcg = Lcg(15);
    let w = lcg.matrix(24, 16);
    let compressed = crate::testing::round_to_nearest(w.as_ref(), 3, 8);
    let teacher = lcg.activations(16, 200);
    let turn = Mat::<f64>::identity(16, 16) + faer::Scale(0.05) * lcg.matrix(16, 16);
    let student = &turn * &teacher;
    let (h, k) = (square(&student), &teacher * student.transpose());
    let d = &w - &compressed;
    let total = |factors: &LowRank| {
        (&w * &teacher - (&compressed + factors.product()) * &student).norm_l2()
    };
    let local = total(&eora(&d, &h, 6).factors);
    let solve = |damping| {
        let m =
            drift_residual(w.as_ref(), d.as_ref(), h.as_ref(), k.as_ref(), damping).expect("fits");
        eora(&m, &h, 6).factors
    };
    assert!(total(&solve(DRIFT_DAMPING)) < 0.9 * local);
    // Undamped it is the least squares optimum of rank 6.
    let best = total(&solve(0.0));
    for _ in 0..20 {
        let mut step = solve(0.0);
        step.b += faer::Scale(1e-2) * lcg.matrix(24, 6);
        assert!(total(&step) >= best);
    }
    let none = drift_residual(w.as_ref(), d.as_ref(), h.as_ref(), h.as_ref(), 0.1).expect("fits");
    assert_matrix_close(none.as_ref(), d.as_ref(), 1e-12);
}

#[test]
fn alternation_keeps_the_best_round() {
    let mut lcg = Lcg(16);
    let (w, x) = (lcg.matrix(24, 32), lcg.activations(32, 200));
    let h = square(&x);
    let weighting = Weighting::Gram(h.as_ref());
    let found = alternate(w.as_ref(), &weighting, 4, 6, &Options::default(), |w| {
        crate::testing::round_to_nearest(w.as_ref(), 3, 16)
    })
    .expect("solves");
    let best = found.losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(found.losses.len(), 7);
    assert_close(found.solution.loss(), best, 1e-12);
    assert!(best < 0.99 * found.losses[0], "{:?}", found.losses);
    let error = &w - &found.compressed - found.solution.factors.product();
    assert_close((error * &x).norm_l2(), best, 1e-6);
}

#[test]
fn refitting_b_makes_four_bits_for_a_nearly_free() {
    let mut lcg = Lcg(17);
    let (w, x) = (lcg.matrix(96, 128), decaying(&mut Lcg(18), 128, 600, 5.0));
    let d = &w - crate::testing::round_to_nearest(w.as_ref(), 3, 64);
    let (h, size) = (square(&x), (&d * &x).norm_l2());
    let weighting = Weighting::Gram(h.as_ref());
    let factors = eora(&d, &h, 12).factors;
    let bits = |a, b| {
        (
            GroupQuantizer { bits: a, group: 64 },
            GroupQuantizer { bits: b, group: 64 },
        )
    };
    let loss = |factors: &LowRank| (factors.error(d.as_ref()) * &x).norm_l2() / size;
    let plain = loss(&factors);
    let kept = quantize_factors(&factors, bits(4, 8), |_| Ok(factors.b.clone())).expect("fits");
    let refitted =
        quantize_factors(&factors, bits(4, 8), |a| refit(d.as_ref(), &weighting, a)).expect("fits");
    let (kept, refitted_loss) = (loss(&kept.dequantize()), loss(&refitted.dequantize()));
    assert!(
        plain <= refitted_loss && refitted_loss < kept,
        "{plain} {refitted_loss} {kept}"
    );
    assert!(
        refitted_loss - plain < 0.4 * (kept - plain),
        "{plain} {refitted_loss} {kept}"
    );
    assert_eq!(
        refitted.bytes(),
        (12 * 128 / 2 + 12 * 2 * 2) + (12 * 96 + 12 * 2 * 2)
    );

    // The same from tokens, without H.
    let a = refitted.a.dequantize();
    let mut collector = RefitCollector::new(d.as_ref(), a.as_ref()).expect("fits");
    let values = (0..600)
        .flat_map(|t| (0..128).map(move |j| (j, t)))
        .map(|(j, t)| x[(j, t)] as f32);
    collector
        .update(&crate::stats::Rows::new(values.collect(), 128).expect("finite"))
        .expect("fits");
    let streamed = collector.finish().expect("solves");
    let direct = refit(d.as_ref(), &weighting, a.as_ref()).expect("fits");
    assert_matrix_close(streamed.as_ref(), direct.as_ref(), 1e-3);
}

#[test]
fn quantised_factors_do_not_depend_on_the_split() {
    let golden = Golden::new();
    let (d, h) = (golden.d(), golden.h());
    let weighting = Weighting::Gram(h.as_ref());
    let quantizer = GroupQuantizer { bits: 8, group: 8 };
    let product = |split| {
        let options = Options {
            split,
            ..Options::default()
        };
        let factors = solve(d.as_ref(), &weighting, 3, &options)
            .expect("solves")
            .factors;
        let quantised =
            quantize_factors(&factors, (quantizer, quantizer), |_| Ok(factors.b.clone()));
        quantised.expect("fits").dequantize().product()
    };
    assert_matrix_close(
        product(Split::Balanced).as_ref(),
        product(Split::Orthonormal).as_ref(),
        0.02, // The f16 scales round differently.
    );
}

#[test]
fn allocation_is_optimal_under_its_budget() {
    let spectra: Vec<Spectrum> = [
        [9.0, 4.0, 1.0, 0.5],
        [8.0, 7.0, 6.0, 0.1],
        [2.0, 0.3, 0.2, 0.1],
    ]
    .into_iter()
    .map(|squares| Spectrum::new(squares.to_vec(), 0.0))
    .collect();
    let layers: Vec<Candidate<'_>> = (spectra.iter())
        .map(|spectrum| Candidate {
            spectrum,
            weight: 1.0,
            bytes_per_rank: 10,
            min: 0,
            max: 4,
        })
        .collect();
    let gain = |ranks: &[usize]| -> f64 {
        ranks
            .iter()
            .zip(&spectra)
            .map(|(&r, s)| s.squares()[..r].iter().sum::<f64>())
            .sum()
    };
    for budget in 0..13 {
        let found = allocate(&layers, budget * 10, 1).expect("affordable");
        let best = (0..125)
            .map(|code| [code / 25, code / 5 % 5, code % 5])
            .filter(|ranks| ranks.iter().sum::<usize>() as u64 <= budget)
            .map(|ranks| gain(&ranks))
            .fold(0.0, f64::max);
        assert_close(gain(&found), best, 1e-12);
    }
    assert_eq!(allocate(&layers, 45, 2).expect("affordable"), [2, 2, 0]);
    let mut bounded = layers.clone();
    bounded[2].min = 2;
    bounded[1].max = 1;
    assert_eq!(allocate(&bounded, 50, 1).expect("affordable"), [2, 1, 2]);
    bounded[0].weight = 0.0;
    assert_eq!(allocate(&bounded, 50, 1).expect("affordable"), [0, 1, 4]);
    let error = allocate(&bounded, 19, 1);
    assert!(matches!(
        error,
        Err(Error::Budget {
            budget: 19,
            needed: 20
        })
    ));
    bounded[0].max = 5;
    assert!(matches!(
        allocate(&bounded, 50, 1),
        Err(Error::Setting { .. })
    ));
}

#[test]
fn rank_criteria_follow_their_definitions() {
    let spectrum = Spectrum::new(vec![16.0, 4.0, 1.0, 1.0], 0.0);
    assert_eq!(spectrum.rank(Criterion::Energy(0.9)), 2);
    assert_eq!(spectrum.rank(Criterion::Sum(0.9)), 4);
    assert_eq!(spectrum.rank(Criterion::Ratio(0.6)), 2);
    assert_eq!(spectrum.rank(Criterion::Value(2.0)), 2);
    assert_eq!(spectrum.rank(Criterion::Energy(1.0)), 4);
}
