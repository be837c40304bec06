//! Results that do not depend on the number of threads.

use crate::common::{Tiny, compressor, eora, run};
use lowrank_eora::repair::{LayerReport, Ranks, Repair, Seconds};
use lowrank_eora::solve::{Method, Options, Route, Whitening};
use rayon::ThreadPoolBuilder;

#[test]
fn written_factors_and_reports_are_the_same_bytes_for_one_two_and_three_threads() {
    let tiny = Tiny::wide();
    let decoder = tiny.decoder();
    let drift = Method::EoraDrift { damping: 0.01 };
    let factor = Route::Factor(Whitening::Eigen);
    for (name, method, route) in [
        ("rtn-int3", Method::Eora, Route::Auto),
        ("gptq-int3", Method::Eora, Route::Krylov),
        ("sparsegpt-2:4", drift, Route::Gram),
        ("magnitude-50", Method::Svd, factor),
    ] {
        let repair = Repair {
            method: Some(method),
            ranks: Ranks::Constant(6),
            solver: Options {
                route,
                ..Options::default()
            },
            measure_drift: method == drift,
            ..eora(6)
        };
        let written = |threads: usize| {
            let folder = tiny.path(&format!("{name}-{threads}"));
            let pool = ThreadPoolBuilder::new().num_threads(threads).build();
            let repaired = pool.unwrap().install(|| {
                let source = compressor(name);
                run(&repair, &decoder, &source, &folder)
            });
            let timeless = |report: &LayerReport| LayerReport {
                seconds: Seconds::default(),
                ..report.clone()
            };
            let reports: Vec<LayerReport> = repaired.reports().map(timeless).collect();
            let tensors = (0..repaired.blocks()).flat_map(|block| repaired.block(block).unwrap());
            let tensors: Vec<_> = tensors
                .map(|layer| {
                    let factors = layer.factors.unwrap();
                    let bits = |m: &faer::Mat<f64>| -> Vec<u64> {
                        let entries = m.col_iter().flat_map(|column| column.iter().copied());
                        entries.map(f64::to_bits).collect()
                    };
                    let weight = layer.weight.matrix().unwrap();
                    [&factors.b, &factors.a, &weight].map(bits)
                })
                .collect();
            (reports, tensors)
        };
        let one = written(1);
        for threads in [2, 3] {
            assert!(written(threads) == one, "{name}, {threads} threads");
        }
    }
}
