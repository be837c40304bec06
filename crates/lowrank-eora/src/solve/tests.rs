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
            solve(d.as_ref(), &Weighting::Gram(h.as_ref()), rank, &options(route)).expect("solves")
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
        let best = solve(d.as_ref(), &Weighting::Factor(x.as_ref()), 4, &options(ROUTES[2]))
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
