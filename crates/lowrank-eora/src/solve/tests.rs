use super::*;
use crate::testing::{Golden, Lcg, assert_close, assert_matrix_close};

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
