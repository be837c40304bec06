//! Inputs and weights that are degenerate, extreme or wrong, and the form in which results are stored.

use super::{correlated, distance, gram, random, run};
use crate::Error;
use crate::compress::{Compressor, Inputs};
use crate::testing::with_threads;
use faer::Mat;
use half::f16;

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
        let with = |threads| with_threads(threads, || run(name, &w, &h));
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
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    let error = compress("wanda-50", &w, Some(Inputs::Diagonal(&[-1.0; 8])));
    assert!(matches!(error, Error::NotGram { .. }), "{error}");
    let small = Mat::<f64>::identity(7, 7);
    let error = compress("gptq-int4", &w, Some(Inputs::Gram(small.as_ref())));
    assert_eq!(
        error.to_string(),
        "Gram matrix of the inputs has shape [7, 7], expected [8, 8]"
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
