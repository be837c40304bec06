//! Methods, ranks, tokens and factors other than the usual ones.

use crate::common::{compressor, eora, held_out, run, tiny, tiny_with, windows};
use causal_lm::Windows;
use lowrank_eora::Error;
use lowrank_eora::repair::layer::Importance;
use lowrank_eora::repair::{
    Energy, FactorStorage, InputSource, Method, Ranks, Repair, Repaired, Sampling, Spread, Texts,
};
use tensor_io::NoProgress;

#[test]
fn drift_aware_factors_come_closest_to_what_the_dense_model_computes() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let none = eora(0).with_method(None);
    let compressed = run(&none, &decoder, &compressor("rtn-int2"), &tiny.path("none"));
    let windows = windows(40, 1);
    let drift = |method: Method| {
        let repair = eora(2).with_method(Some(method)).with_measure_drift(true);
        let folder = tiny.path(method.name());
        // Measured where it was fitted: there it is the optimum.
        let texts = Texts::new(&windows).with_held_out(&windows);
        repair
            .run(&decoder, &compressed, texts, folder, &NoProgress)
            .unwrap()
    };
    let of = |repaired: &Repaired, block| -> Vec<Energy> {
        let reports = repaired
            .reports()
            .filter(|report| report.layer.block() == block);
        reports.filter_map(|report| report.held_out_drift).collect()
    };
    let (eora, aware) = (
        drift(Method::Eora),
        drift(Method::EoraDrift { damping: 1e-6 }),
    );
    for (a, b) in of(&eora, 0).iter().zip(of(&aware, 0)) {
        assert!(
            (a.after / b.after - 1.0).abs() < 1e-3,
            "no drift before the first block"
        );
    }
    // q/k/v of the second block are fed the same by both.
    for (eora, aware) in of(&eora, 1).iter().zip(of(&aware, 1)).take(3) {
        assert!(
            aware.after < 0.98 * eora.after,
            "{} {}",
            aware.after,
            eora.after
        );
    }
    let refused = Repair::default()
        .with_method(Some(Method::EoraDrift { damping: 0.01 }))
        .with_inputs(InputSource::Dense);
    let folder = tiny.path("refused");
    let result = refused.run(
        &decoder,
        &compressed,
        Texts::new(&windows),
        folder,
        &NoProgress,
    );
    assert!(matches!(result, Err(Error::Setting { name: "inputs", .. })));
}

#[test]
fn ranks_under_a_budget_spend_it_where_it_gains_most() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let source = compressor("rtn-int3");
    let constant = run(&eora(4), &decoder, &source, &tiny.path("constant"));
    let budget = constant.reports().map(|report| report.bytes.factors).sum();
    let ranks = Ranks::allocate(constant.reports(), budget, 4, 1, Spread::Absolute).unwrap();
    let repair = eora(0).with_ranks(ranks);
    let allocated = run(&repair, &decoder, &source, &tiny.path("allocated"));
    let spent: u64 = allocated.reports().map(|report| report.bytes.factors).sum();
    assert!(
        spent <= budget && spent > budget * 9 / 10,
        "{spent} of {budget}"
    );
    let error = |repaired: &Repaired| -> f64 {
        repaired
            .reports()
            .map(|report| report.calibration.after)
            .sum()
    };
    assert!(error(&allocated) < error(&constant));
}

#[test]
fn window_weights_act_as_repetition_and_sampled_tokens_still_repair() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let once = windows(8, 1);
    let text: Vec<u32> = once
        .iter()
        .chain(once.iter().take(4))
        .flatten()
        .copied()
        .collect();
    let twice = Windows::cut(&text, 16, None).unwrap();
    let result = |repair: &Repair, windows: &Windows, folder: &str| {
        let (source, folder) = (compressor("wanda-2:4"), tiny.path(folder));
        let texts = Texts::new(windows);
        repair
            .run(&decoder, &source, texts, folder, &NoProgress)
            .unwrap()
    };
    let weighted = eora(3).with_window_weights(Some(
        (0..8).map(|w| if w < 4 { 2.0 } else { 1.0 }).collect(),
    ));
    let (a, b) = (result(&weighted, &once, "a"), result(&eora(3), &twice, "b"));
    for (a, b) in a.reports().zip(b.reports()) {
        assert!((a.calibration.after / b.calibration.after - 1.0).abs() < 1e-3);
    }
    let short = eora(3).with_window_weights(Some(vec![1.0; 3]));
    let (source, folder) = (compressor("rtn-int4"), tiny.path("short"));
    let short = short.run(&decoder, &source, Texts::new(&once), folder, &NoProgress);
    assert!(matches!(short, Err(Error::Shape { .. })));

    let sampled = eora(8).with_sampling(Some(Sampling::new(Importance::Mixture, 0.5, 0)));
    let (all, half) = (
        run(
            &eora(8),
            &decoder,
            &compressor("rtn-int3"),
            &tiny.path("all"),
        ),
        run(
            &sampled,
            &decoder,
            &compressor("rtn-int3"),
            &tiny.path("half"),
        ),
    );
    let (all, half) = (held_out(&all), held_out(&half));
    assert!(half.loss() < 1.1 * all.loss() && half.loss() < half.loss_before());
}

#[test]
fn factors_in_few_bits_lose_little_and_count_their_bytes() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let source = compressor("rtn-int3");
    let full = run(&eora(8), &decoder, &source, &tiny.path("full"));
    let quantised = eora(8).with_factors(FactorStorage::Quantised {
        a: compressor("rtn-int4-g16-sym"),
        b: compressor("rtn-int8-g16-sym"),
    });
    let few = run(&quantised, &decoder, &source, &tiny.path("few"));
    let bytes = |r: &Repaired| -> u64 { r.reports().map(|report| report.bytes.factors).sum() };
    assert!(bytes(&few) * 4 < bytes(&full));
    assert!(held_out(&few).loss() < 1.1 * held_out(&full).loss());
    assert!(held_out(&few).loss() < held_out(&few).loss_before());
}

#[test]
fn factors_beyond_f16_are_refused_with_the_storage_that_holds_them() {
    let loud = tiny_with(
        |name, tensor| match name.ends_with("1.mlp.down_proj.weight") {
            true => (tensor * 1e14).unwrap(),
            false => tensor,
        },
    );
    let repaired = |factors: FactorStorage| {
        let made = eora(2).with_factors(factors).run(
            &loud.decoder(),
            &compressor("rtn-int2"),
            Texts::new(&windows(8, 1)),
            loud.path(&factors.to_string()),
            &NoProgress,
        );
        made.map(drop).map_err(|error| error.to_string())
    };
    let error = repaired(FactorStorage::F16).unwrap_err();
    assert!(
        error.contains("factors is f16") && error.contains("bf16 or f32"),
        "{error}"
    );
    repaired(FactorStorage::Bf16).unwrap();
}
