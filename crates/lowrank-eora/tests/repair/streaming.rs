//! Wide inputs, whose H is spared where nothing needs it.

use crate::common::{assert_close, compressor, eora, run, tiny};
use causal_lm::{Decoder, LinearName};
use lowrank_eora::Result;
use lowrank_eora::compress::{Compressor, Needs};
use lowrank_eora::repair::{
    CompressedLinear, Energy, FactorStorage, LayerReport, Linear, Method, Repaired, Source,
    WithinBlock,
};

/// The same compressor, which says that it needs H.
struct WithGram(Compressor);

impl Source for WithGram {
    fn describe(&self) -> Result<String> {
        Ok(self.0.to_string())
    }

    fn needs(&self) -> Needs {
        Needs::Gram
    }

    fn check(&self, dense: &Decoder<'_>) -> Result<()> {
        self.0.check(dense)
    }

    fn compressed(&self, linear: &Linear<'_>) -> Result<CompressedLinear> {
        self.0.compressed(linear)
    }
}

/// The two linears, one in each block, that read 64 channels and put out 32.
fn down(repaired: &Repaired) -> Vec<&LayerReport> {
    let reports = repaired.reports();
    reports
        .filter(|report| report.layer.module().parts == [LinearName::Down])
        .collect()
}

#[track_caller]
fn assert_same(found: Energy, expected: Energy) {
    for (found, expected) in [
        (found.target, expected.target),
        (found.before, expected.before),
        (found.after, expected.after),
    ] {
        assert!((found / expected - 1.0).abs() < 1e-6, "{found} {expected}");
    }
}

#[test]
fn a_wide_input_gives_the_same_factors_and_losses_with_and_without_its_h_in_fewer_bytes() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let int = FactorStorage::Quantised {
        a: compressor("rtn-int4-g16-sym"),
        b: compressor("rtn-int8-g16-sym"),
    };
    let sequential = WithinBlock::Sequential;
    let f32 = FactorStorage::F32;
    let original = WithinBlock::Original;
    for (index, (name, method, factors, within_block)) in [
        ("magnitude-2:4", Some(Method::Eora), f32, original),
        ("wanda-2:4", Some(Method::Eora), f32, sequential),
        ("rtn-int3", Some(Method::Svd), f32, original),
        ("wanda-50", Some(Method::Diag), f32, original),
        ("wanda-2:4", None, f32, original),
        ("rtn-int3", Some(Method::Eora), int, original),
    ]
    .into_iter()
    .enumerate()
    {
        let repair = eora(5)
            .with_method(method)
            .with_factors(factors)
            .with_within_block(within_block)
            .with_requantise(Some(compressor("rtn-int4")));
        let path = |what: &str| tiny.path(&format!("{what}-{index}"));
        let source = compressor(name);
        let streamed = run(&repair, &decoder, &source, &path("streamed"));
        let whole = run(&repair, &decoder, &WithGram(source), &path("whole"));
        for (streamed, whole) in down(&streamed).into_iter().zip(down(&whole)) {
            assert_same(streamed.calibration, whole.calibration);
            assert_same(streamed.held_out.unwrap(), whole.held_out.unwrap());
            let lost = |report: &LayerReport| report.requantised.as_ref().unwrap().calibration;
            assert!((lost(streamed) / lost(whole) - 1.0).abs() < 1e-6);
            // H has 64² entries of 8 bytes; three errors of 32 × 64 have 4 bytes an entry.
            assert!(whole.statistics_bytes > 64 * 64 * 8);
            assert!(
                streamed.statistics_bytes < whole.statistics_bytes,
                "{name}: {} {}",
                streamed.statistics_bytes,
                whole.statistics_bytes
            );
        }
        for block in 0..2 {
            let pairs =
                (streamed.block(block).unwrap().into_iter()).zip(whole.block(block).unwrap());
            for (streamed, whole) in pairs {
                let merged = (streamed.merged().unwrap(), whole.merged().unwrap());
                assert_close(merged.0.as_ref(), merged.1.as_ref(), 1e-6);
            }
        }
    }
}

#[test]
fn held_out_losses_are_the_same_with_and_without_h() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let source = compressor("gptq-int3");
    let streamed = run(&eora(3), &decoder, &source, &tiny.path("streamed"));
    let drift = eora(3).with_measure_drift(true);
    let whole = run(&drift, &decoder, &source, &tiny.path("whole"));
    for (streamed, whole) in streamed.reports().zip(whole.reports()) {
        assert_eq!(streamed.calibration, whole.calibration);
        assert_same(streamed.held_out.unwrap(), whole.held_out.unwrap());
    }
}
