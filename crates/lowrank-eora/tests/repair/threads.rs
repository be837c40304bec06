//! Results that do not depend on the number of threads.

use crate::common::{compressor, eora, run, timeless, wide};
use candle_core::DType;
use lowrank_eora::output::{Adapter, AdapterOptions};
use lowrank_eora::repair::LayerReport;
use lowrank_eora::repair::layer::{Method, Options, Route, Whitening};
use rayon::ThreadPoolBuilder;

#[test]
fn written_factors_and_reports_are_the_same_bytes_for_one_two_and_three_threads() {
    let tiny = wide();
    let decoder = tiny.decoder();
    let drift = Method::EoraDrift { damping: 0.01 };
    let factor = Route::Factor(Whitening::Eigen);
    for (name, method, route) in [
        ("rtn-int3", Method::Eora, Route::Auto),
        ("gptq-int3", Method::Eora, Route::Krylov),
        ("sparsegpt-2:4", drift, Route::Gram),
        ("magnitude-50", Method::Svd, factor),
    ] {
        let solver = Options::default().with_route(route);
        let repair = eora(6)
            .with_method(Some(method))
            .with_solver(solver)
            .with_measure_drift(method == drift);
        let options = AdapterOptions::new("compressed").with_dtype(DType::F32);
        let written = |threads: usize| {
            let path = |what: &str| tiny.path(&format!("{what}-{name}-{threads}"));
            let pool = ThreadPoolBuilder::new().num_threads(threads).build();
            let repaired = pool.unwrap().install(|| {
                let source = compressor(name);
                run(&repair, &decoder, &source, &path("run"))
            });
            Adapter::write(&repaired, &options, path("adapter")).unwrap();
            let factors = path("adapter").join("adapter_model.safetensors");
            let reports: Vec<LayerReport> = repaired.reports().map(timeless).collect();
            (std::fs::read(factors).unwrap(), reports)
        };
        let one = written(1);
        for threads in [2, 3] {
            assert!(written(threads) == one, "{name}, {threads} threads");
        }
    }
}
