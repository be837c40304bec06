//! What the sweep over columns must do for any weight and inputs.

use super::{correlated, distance, gram, random, run};
use faer::Mat;

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
