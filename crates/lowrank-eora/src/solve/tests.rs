use super::*;
use crate::testing::{Golden, Lcg, assert_close, assert_matrix_close, with_threads};
use proptest::prelude::*;

pub(super) fn loss(d: &Mat<f64>, factors: &LowRank, h: &Mat<f64>) -> f64 {
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
pub(super) fn decaying(lcg: &mut Lcg, n: usize, t: usize, outlier: f64) -> Mat<f64> {
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
            assert_eq!(found.route, Route::Krylov);
        }
    }
}

/// Plain solve with H.
pub(super) fn eora(d: &Mat<f64>, h: &Mat<f64>, rank: usize) -> Solution {
    let weighting = Weighting::Gram(h.as_ref());
    solve(d.as_ref(), &weighting, rank, &Options::default()).expect("solves")
}

fn orthogonal(lcg: &mut Lcg, n: usize) -> Mat<f64> {
    lcg.matrix(n, n).qr().compute_Q()
}

pub(super) fn square(x: &Mat<f64>) -> Mat<f64> {
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
fn krylov_keeps_its_tolerance_on_flat_spectra_and_any_start() {
    let mut lcg = Lcg(21);
    for (m, n) in [(250, 200), (200, 250), (80, 250)] {
        let d = lcg.matrix(m, n);
        let exact = solve(d.as_ref(), &Weighting::Identity, 12, &options(Route::Gram));
        let best = exact.expect("solves").loss();
        for seed in 0..3 {
            let options = Options {
                seed,
                ..options(Route::Krylov)
            };
            let found = solve(d.as_ref(), &Weighting::Identity, 12, &options).expect("solves");
            let loss = found.factors.error(d.as_ref()).norm_l2();
            assert!(loss <= 1.0005 * best, "{loss} {best}");
            assert_eq!(found.route, Route::Krylov);
        }
    }
}

#[test]
fn krylov_does_not_stop_at_repeated_singular_values() {
    let mut lcg = Lcg(22);
    let (u, v) = (orthogonal(&mut lcg, 120), orthogonal(&mut lcg, 120));
    let d =
        u * Mat::from_fn(120, 120, |i, j| {
            if i == j {
                if i < 60 { 3.0 } else { 1.0 }
            } else {
                0.0
            }
        }) * v;
    let found = solve(
        d.as_ref(),
        &Weighting::Identity,
        50,
        &options(Route::Krylov),
    )
    .expect("solves");
    let loss = found.factors.error(d.as_ref()).norm_l2();
    assert!(loss <= 1.0005 * 150f64.sqrt(), "{loss}");
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
    // Larger than a tile, on the side that each route works on.
    let (d, x) = (lcg.matrix(300, 350), lcg.activations(350, 400));
    let h = square(&x);
    let weighting = Weighting::Gram(h.as_ref());
    for route in [Route::Gram, Route::Krylov, ROUTES[2]] {
        let run = |threads| {
            with_threads(threads, || {
                let found = solve(d.as_ref(), &weighting, 10, &options(route)).expect("solves");
                (found.factors.b, found.factors.a, found.spectrum)
            })
        };
        let one = run(1);
        for threads in [2, 3] {
            assert!(run(threads) == one, "{route:?}, {threads} threads");
        }
    }
}
