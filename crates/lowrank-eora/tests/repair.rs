//! The repair of whole models, as its user sees it.

mod common;

use candle_core::{DType, Device, Tensor};
use causal_lm::block::RopeTables;
use causal_lm::{Block, Decoder, Hidden, LinearName, Mixer, NoTap, Site, Tap, TapResult, Windows};
use common::{Tiny, decoder, trained, windows};
use faer::{Mat, MatRef, Side};
use lowrank_eora::Error;
use lowrank_eora::compress::{Compressor, Inputs};
use lowrank_eora::format::gptq;
use lowrank_eora::matrix::{from_tensor, to_tensor};
use lowrank_eora::output::{
    Adapter, AdapterOptions, AdapterRanks, Layout, Probe, Weights, write_checkpoint,
};
use lowrank_eora::repair::{
    Energy, FactorStorage, Given, InputSource, LayerId, LayerReport, Ranks, Repair, Repaired,
    Seconds, Source, Spread, WithinBlock,
};
use lowrank_eora::solve::{GroupQuantizer, Method};
use std::collections::BTreeMap;
use std::path::Path;
use tensor_io::{Checkpoint, WriteOptions};

fn compressor(name: &str) -> Compressor {
    name.parse().unwrap()
}

/// EoRA of a rank, stored in f32.
fn eora(rank: usize) -> Repair {
    Repair {
        ranks: Ranks::Constant(rank),
        factors: FactorStorage::F32,
        ..Repair::default()
    }
}

fn run(repair: &Repair, decoder: &Decoder<'_>, source: &dyn Source, folder: &Path) -> Repaired {
    let (calibration, held_out) = (windows(12, 1), windows(6, 2));
    repair
        .run(
            decoder,
            source,
            &calibration,
            Some(&held_out),
            folder,
            &mut |_| (),
        )
        .unwrap()
}

fn held_out(repaired: &Repaired) -> Energy {
    repaired
        .reports()
        .filter_map(|report| report.held_out)
        .sum()
}

fn assert_close(found: MatRef<'_, f64>, expected: MatRef<'_, f64>, tolerance: f64) {
    let difference = (found - expected).norm_l2();
    assert!(
        difference <= tolerance * expected.norm_l2(),
        "differ by {difference} of {}",
        expected.norm_l2()
    );
}

/// Inputs of the linears of a block, one token per row.
#[derive(Default)]
struct Inputs4(BTreeMap<usize, Vec<Tensor>>);

fn site_of(linear: LinearName) -> Site {
    match linear {
        LinearName::Q | LinearName::K | LinearName::V => Site::Qkv,
        LinearName::O => Site::O,
        LinearName::Gate | LinearName::Up => Site::GateUp,
        LinearName::Down => Site::Down,
    }
}

impl Tap for Inputs4 {
    fn observe(&mut self, _block: usize, site: Site, x: &Tensor) -> TapResult {
        self.0.entry(site as usize).or_default().push(x.clone());
        Ok(())
    }
}

impl Inputs4 {
    fn of(block: &Block, states: &[Tensor], rope: &RopeTables) -> Self {
        let mut inputs = Self::default();
        for batch in states {
            block
                .forward(batch, rope, &mut Mixer::Windows, &mut inputs)
                .unwrap();
        }
        inputs
    }

    /// X, `n × t`.
    fn matrix(&self, linear: LinearName) -> Mat<f64> {
        let all = Tensor::cat(&self.0[&(site_of(linear) as usize)], 0).unwrap();
        from_tensor(&all, "inputs").unwrap().transpose().to_owned()
    }
}

fn weight_of(block: &mut Block, linear: LinearName) -> &mut Tensor {
    let (attention, mlp) = (
        block.attention.as_mut().unwrap(),
        block.mlp.as_mut().unwrap(),
    );
    match linear {
        LinearName::Q => &mut attention.q.weight,
        LinearName::K => &mut attention.k.weight,
        LinearName::V => &mut attention.v.weight,
        LinearName::O => &mut attention.o.weight,
        LinearName::Gate => &mut mlp.gate.weight,
        LinearName::Up => &mut mlp.up.weight,
        LinearName::Down => &mut mlp.down.weight,
    }
}

/// EoRA by its definition: T = Q √Λ, [D T]_r T⁻¹.
fn by_definition(d: &Mat<f64>, x: &Mat<f64>, rank: usize) -> Mat<f64> {
    let h = x * x.transpose();
    let eigen = h.self_adjoint_eigen(Side::Lower).unwrap();
    let (q, values) = (eigen.U(), eigen.S().column_vector());
    let n = h.nrows();
    let t = Mat::from_fn(n, n, |i, j| q[(i, j)] * values[j].sqrt());
    let inverse = Mat::from_fn(n, n, |i, j| q[(j, i)] / values[i].sqrt());
    let svd = (d * &t).thin_svd().unwrap();
    let truncated = Mat::from_fn(d.nrows(), n, |i, j| {
        (0..rank)
            .map(|k| svd.U()[(i, k)] * svd.S().column_vector()[k] * svd.V()[(j, k)])
            .sum::<f64>()
    });
    truncated * inverse
}

/// W_c and B A of all linears: each block once to see its inputs, once to go on.
fn naive(
    decoder: &Decoder<'_>,
    compressor: Compressor,
    rank: usize,
    windows: &Windows,
    repair: &Repair,
) -> BTreeMap<LayerId, (Mat<f64>, Mat<f64>)> {
    let rope = decoder.rope(0, windows.window_len()).unwrap();
    let mut student = Hidden::embed(decoder, windows).unwrap();
    let mut teacher = student.clone();
    let mut all = BTreeMap::new();
    for layer in 0..decoder.config().layers() {
        let dense = decoder.block(layer).unwrap();
        let mut block = dense.clone();
        let mut seen = Inputs4::of(&dense, student.batches(), &rope);
        if repair.inputs == InputSource::Dense {
            seen = Inputs4::of(&dense, teacher.batches(), &rope);
        }
        for linear in LinearName::ALL {
            let starts = !matches!(linear, LinearName::K | LinearName::V | LinearName::Up);
            if repair.within_block == WithinBlock::Sequential && starts {
                seen = Inputs4::of(&block, student.batches(), &rope);
            }
            let x = seen.matrix(linear);
            let weight = weight_of(&mut block, linear);
            let w = from_tensor(weight, "weight").unwrap();
            let h = &x * x.transpose();
            let compressed = compressor.compress(w.as_ref(), Some(Inputs::Gram(h.as_ref())));
            let compressed = compressed
                .unwrap()
                .to_tensor(DType::F32, &Device::Cpu)
                .unwrap();
            let w_c = from_tensor(&compressed, "compressed").unwrap();
            let ba = by_definition(&(&w - &w_c), &x, rank);
            *weight = to_tensor((&w_c + &ba).as_ref(), DType::F32, &Device::Cpu).unwrap();
            all.insert(
                LayerId {
                    block: layer,
                    linear,
                },
                (w_c, ba),
            );
        }
        student.advance(&block, &mut NoTap).unwrap();
        teacher.advance(&dense, &mut NoTap).unwrap();
    }
    all
}

#[test]
fn the_streaming_repair_equals_a_naive_two_pass_implementation() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let windows = windows(12, 1);
    let variants = [
        (InputSource::Repaired, WithinBlock::Original),
        (InputSource::Repaired, WithinBlock::Sequential),
        (InputSource::Dense, WithinBlock::Original),
    ];
    for (index, (inputs, within_block)) in variants.into_iter().enumerate() {
        let repair = Repair {
            inputs,
            within_block,
            ..eora(3)
        };
        let folder = tiny.path(&format!("run-{index}"));
        let source = compressor("wanda-2:4");
        let repaired = run(&repair, &decoder, &source, &folder);
        let expected = naive(&decoder, source, 3, &windows, &repair);
        assert_eq!(expected.len(), repaired.reports().count());
        for block in 0..repaired.blocks() {
            for layer in repaired.block(block).unwrap() {
                let (w_c, ba) = &expected[&layer.report.layer];
                assert_close(layer.weight.matrix().unwrap().as_ref(), w_c.as_ref(), 1e-9);
                let found = layer.factors.unwrap().product();
                assert_close(found.as_ref(), ba.as_ref(), 2e-3);
            }
        }
    }
}

#[test]
fn reported_losses_are_those_of_the_stored_factors_on_the_tokens_themselves() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let repair = Repair {
        factors: FactorStorage::F16,
        ..eora(4)
    };
    let repaired = run(
        &repair,
        &decoder,
        &compressor("rtn-int3"),
        &tiny.path("run"),
    );
    let held_out = windows(6, 2);
    let rope = decoder.rope(0, 16).unwrap();
    let states = Hidden::embed(&decoder, &held_out).unwrap();
    let mut dense = decoder.block(0).unwrap();
    let seen = Inputs4::of(&dense, states.batches(), &rope);
    for layer in repaired.block(0).unwrap() {
        let x = seen.matrix(layer.report.layer.linear);
        let w = from_tensor(weight_of(&mut dense, layer.report.layer.linear), "weight").unwrap();
        let square = |e: &Mat<f64>| (e * &x).squared_norm_l2();
        let found = layer.report.held_out.unwrap();
        let expected = Energy {
            target: square(&w),
            before: square(&(&w - &layer.weight.matrix().unwrap())),
            after: square(&(&w - &layer.merged().unwrap())),
        };
        for (found, expected) in [
            (found.target, expected.target),
            (found.before, expected.before),
            (found.after, expected.after),
        ] {
            assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
        }
        assert!(found.after < found.before);
    }
}

#[test]
fn a_run_that_was_killed_goes_on_to_the_same_result() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let source = compressor("gptq-int4");
    let (whole, killed) = (tiny.path("whole"), tiny.path("killed"));
    let whole = run(&eora(2), &decoder, &source, &whole);
    run(&eora(2), &decoder, &source, &killed);
    std::fs::remove_file(killed.join("block-00001.safetensors")).unwrap();
    assert!(matches!(
        Repaired::open(&killed),
        Err(Error::Malformed { .. })
    ));

    let mut resumed = Vec::new();
    let calibration = windows(12, 1);
    let again = eora(2)
        .run(
            &decoder,
            &source,
            &calibration,
            Some(&windows(6, 2)),
            &killed,
            &mut |done| {
                resumed.push(done.resumed);
            },
        )
        .unwrap();
    assert_eq!(resumed, [true, false]);
    let timeless = |report: &LayerReport| LayerReport {
        seconds: Seconds::default(),
        ..report.clone()
    };
    let reports = |repaired: &Repaired| repaired.reports().map(timeless).collect::<Vec<_>>();
    assert_eq!(reports(&whole), reports(&again));
    for block in 0..2 {
        let pairs = whole
            .block(block)
            .unwrap()
            .into_iter()
            .zip(again.block(block).unwrap());
        for (a, b) in pairs {
            assert_eq!(a.merged().unwrap(), b.merged().unwrap());
        }
    }
}

#[test]
fn a_folder_with_another_run_is_refused_and_says_what_differs() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let folder = tiny.path("run");
    run(&eora(2), &decoder, &compressor("rtn-int4"), &folder);
    let what = |repair: &Repair, source: &str, seed| {
        let result = repair.run(
            &decoder,
            &compressor(source),
            &windows(12, seed),
            Some(&windows(6, 2)),
            &folder,
            &mut |_| (),
        );
        match result {
            Err(Error::OtherRun { difference, .. }) => difference,
            other => panic!("{other:?}"),
        }
    };
    assert!(what(&eora(3), "rtn-int4", 1).starts_with("ranks "));
    assert!(what(&eora(2), "rtn-int3", 1).starts_with("source "));
    assert!(what(&eora(2), "rtn-int4", 7).starts_with("calibration "));
}

#[test]
fn an_adapter_on_the_compressed_weight_is_the_merged_weight() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let ranks = LinearName::ALL
        .iter()
        .enumerate()
        .skip(1)
        .flat_map(|(i, &linear)| (0..2).map(move |block| (LayerId { block, linear }, i + block)));
    let repair = Repair {
        ranks: Ranks::Table(ranks.collect()),
        ..eora(0)
    };
    let repaired = run(
        &repair,
        &decoder,
        &compressor("wanda-2:4"),
        &tiny.path("run"),
    );
    let merged = tiny.path("merged");
    let layout = Layout::Dense { dtype: None };
    let options = WriteOptions::default();
    write_checkpoint(
        &decoder,
        &repaired,
        Weights::Merged,
        layout,
        &merged,
        &options,
        &mut || (),
    )
    .unwrap();
    let merged = Checkpoint::open(&merged).unwrap();
    assert_eq!(merged.total_bytes(), tiny.checkpoint.total_bytes());

    let mut sizes = Vec::new();
    for (ranks, rslora, dtype, eps) in [
        (AdapterRanks::Uniform, false, DType::F32, 1e-6),
        (AdapterRanks::Uniform, true, DType::F32, 1e-6),
        (AdapterRanks::Mixed, false, DType::F32, 1e-6),
        (AdapterRanks::Mixed, true, DType::F16, 1e-3),
        (AdapterRanks::Uniform, false, DType::BF16, 8e-3),
    ] {
        let folder = tiny.path(&format!("{ranks:?}-{rslora}-{dtype:?}"));
        let options = AdapterOptions {
            dtype,
            ranks,
            rslora,
            base_model: "compressed".into(),
            overwrite: false,
        };
        Adapter::write(&repaired, &options, &folder).unwrap();
        sizes.push(
            std::fs::metadata(folder.join("adapter_model.safetensors"))
                .unwrap()
                .len(),
        );
        let adapter = Adapter::read(&folder).unwrap();
        for block in 0..repaired.blocks() {
            for layer in repaired.block(block).unwrap() {
                let id = layer.report.layer;
                let expected = merged.tensor(&id.weight(), &Device::Cpu).unwrap();
                let expected = from_tensor(&expected, "merged").unwrap();
                let mut found = layer.weight.matrix().unwrap();
                match (adapter.get(id), layer.factors) {
                    (Some(factors), _) => {
                        if ranks == AdapterRanks::Uniform {
                            assert_eq!(factors.factors.rank(), 7);
                        }
                        found += factors.product();
                    }
                    (None, factors) => assert!(factors.is_none() && id.linear == LinearName::Q),
                }
                assert_close(found.as_ref(), expected.as_ref(), eps);
            }
        }
    }
    assert!(sizes[2] < sizes[0], "mixed ranks take less");
}

#[test]
fn the_adapter_configuration_is_what_peft_and_vllm_read() {
    let tiny = Tiny::new();
    let repaired = run(
        &eora(5),
        &tiny.decoder(),
        &compressor("rtn-int4"),
        &tiny.path("run"),
    );
    let folder = tiny.path("adapter");
    Adapter::write(&repaired, &AdapterOptions::default(), &folder).unwrap();
    let text = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&config["r"], &config["lora_alpha"]),
        (&5.into(), &5.into())
    );
    assert_eq!(config["rank_pattern"], serde_json::json!({}));
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 7);
    assert_eq!(config["peft_type"], "LORA");
    let file = Checkpoint::open_file(folder.join("adapter_model.safetensors")).unwrap();
    assert_eq!(
        file.metadata().get("format").map(String::as_str),
        Some("pt")
    );
    let name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight";
    assert_eq!(file.info(name).unwrap().shape, [16, 5]);
    assert_eq!(file.names().count(), 2 * 14);
}

#[test]
fn a_probe_passes_on_the_repaired_model_and_tells_a_wrong_scale_by_its_size() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let repaired = run(
        &eora(4),
        &decoder,
        &compressor("gptq-int3"),
        &tiny.path("run"),
    );
    let path = tiny.path("probe.safetensors");
    Probe::write(&repaired, 3, 0, &path).unwrap();
    let probe = Probe::open(&path).unwrap();
    assert_eq!(probe.layers().len(), 14);
    let with = |scale: f64| {
        let runtime = |id: LayerId, x: &Tensor| {
            let layers = repaired.block(id.block).unwrap();
            let layer = layers
                .into_iter()
                .find(|layer| layer.report.layer == id)
                .unwrap();
            let mut w = layer.weight.matrix().unwrap();
            w += layer.factors.unwrap().product() * faer::Scale(scale);
            let w = to_tensor(w.as_ref(), DType::F32, &Device::Cpu).unwrap();
            x.matmul(&w.t()?)
        };
        probe.check(runtime).unwrap()
    };
    for right in with(1.0) {
        assert!(
            right.error < 1e-4 && (right.scale.unwrap() - 1.0).abs() < 1e-4,
            "{right:?}"
        );
    }
    for scale in [0.0, 2.0, 0.5] {
        for wrong in with(scale) {
            assert!((wrong.scale.unwrap() - scale).abs() < 1e-3, "{wrong:?}");
            assert!(
                (wrong.error - (scale - 1.0).abs()).abs() < 1e-3,
                "{wrong:?}"
            );
        }
    }
    let crossed = probe.check(|id, _| Ok(probe.layer(id).unwrap().input));
    assert!(matches!(crossed, Err(Error::Layer { layer, .. }) if layer.contains("k_proj")));
}

#[test]
fn a_model_compressed_before_is_repaired_like_the_weights_themselves() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let options = WriteOptions::default();
    for (name, layout) in [
        ("wanda-2:4", Layout::Dense { dtype: None }),
        (
            "gptq-int4-g16",
            Layout::Gptq {
                version: gptq::Version::V2,
            },
        ),
        (
            "rtn-int4-g32-sym",
            Layout::Gptq {
                version: gptq::Version::V1,
            },
        ),
    ] {
        let none = Repair {
            method: None,
            ..eora(0)
        };
        let path = |what: &str| tiny.path(&format!("{what}-{name}"));
        let compressed = run(&none, &decoder, &compressor(name), &path("run"));
        assert!(compressed.reports().all(|report| report.rank == 0));
        write_checkpoint(
            &decoder,
            &compressed,
            Weights::Compressed,
            layout,
            path("compressed"),
            &options,
            &mut || (),
        )
        .unwrap();
        let checkpoint = Checkpoint::open(path("compressed")).unwrap();
        let given = Given::open(&checkpoint).unwrap();
        let from_folder = run(&eora(3), &decoder, &given, &path("from-folder"));
        let from_run = run(&eora(3), &decoder, &compressed, &path("from-run"));
        for (a, b) in from_folder.reports().zip(from_run.reports()) {
            assert_eq!(
                (a.layer, a.rank, a.calibration),
                (b.layer, b.rank, b.calibration)
            );
            assert_eq!(a.held_out, b.held_out);
            assert!(a.calibration.after < a.calibration.before);
        }
    }
}

#[test]
fn what_does_not_fit_the_dense_model_is_an_error_that_names_it() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let up = "model.layers.1.mlp.up_proj.weight";
    let error = |other: &Tiny, drop: Option<&str>| -> String {
        let dir = other.path("given");
        let names = other.checkpoint.names().filter(|name| Some(*name) != drop);
        let specs = names.map(|name| {
            let info = other.checkpoint.info(name).unwrap();
            tensor_io::TensorSpec::new(name, info.dtype, info.shape.clone())
        });
        let (specs, options) = (specs.collect(), WriteOptions::default());
        let config = other.checkpoint.config();
        let mut writer =
            tensor_io::CheckpointWriter::create(&dir, config, specs, &options).unwrap();
        for name in other.checkpoint.names().filter(|name| Some(*name) != drop) {
            writer
                .write_bytes(name, &other.checkpoint.bytes(name).unwrap())
                .unwrap();
        }
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let given = Given::open(&checkpoint).unwrap();
        let folder = other.path("run");
        let error = eora(2)
            .run(&decoder, &given, &windows(4, 1), None, &folder, &mut |_| ())
            .unwrap_err();
        error.to_string()
    };
    let same = |_: &str, tensor: Tensor| tensor;
    let missing = error(&Tiny::with(same), Some(up));
    assert!(
        missing.starts_with("model.layers.1.mlp.up_proj: "),
        "{missing}"
    );
    let norm = "model.layers.0.input_layernorm.weight";
    let scaled = |name: &str, tensor: Tensor| match name {
        n if n == norm => (tensor * 1.5).unwrap(),
        _ => tensor,
    };
    let other = error(&Tiny::with(scaled), None);
    assert!(other.contains(norm), "{other}");
}

#[test]
fn activations_that_overflow_are_an_error_that_names_the_layer() {
    let huge = |name: &str, tensor: Tensor| match name {
        "model.layers.1.mlp.up_proj.weight" | "model.layers.1.mlp.gate_proj.weight" => {
            (tensor * 1e30).unwrap()
        }
        _ => tensor,
    };
    let tiny = Tiny::with(huge);
    let decoder = tiny.decoder();
    let error = eora(2)
        .run(
            &decoder,
            &compressor("rtn-int8"),
            &windows(4, 1),
            None,
            tiny.path("run"),
            &mut |_| (),
        )
        .unwrap_err();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    assert!(
        text.contains("layer 1") && text.contains("mlp.down_proj"),
        "{text}"
    );
}

#[test]
fn drift_aware_factors_come_closest_to_what_the_dense_model_computes() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let none = Repair {
        method: None,
        ..eora(0)
    };
    let compressed = run(&none, &decoder, &compressor("rtn-int2"), &tiny.path("none"));
    let windows = windows(40, 1);
    let drift = |method: Method| {
        let repair = Repair {
            method: Some(method),
            measure_drift: true,
            ..eora(2)
        };
        let folder = tiny.path(method.name());
        // Measured where it was fitted: there it is the optimum.
        let all = Some(&windows);
        repair
            .run(&decoder, &compressed, &windows, all, folder, &mut |_| ())
            .unwrap()
    };
    let of = |repaired: &Repaired, block| -> Vec<Energy> {
        let reports = repaired
            .reports()
            .filter(|report| report.layer.block == block);
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
    let refused = Repair {
        method: Some(Method::EoraDrift { damping: 0.01 }),
        inputs: InputSource::Dense,
        ..Repair::default()
    };
    let folder = tiny.path("refused");
    let result = refused.run(&decoder, &compressed, &windows, None, folder, &mut |_| ());
    assert!(matches!(result, Err(Error::Setting { name: "inputs", .. })));
}

#[test]
fn ranks_under_a_budget_spend_it_where_it_gains_most() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let source = compressor("rtn-int3");
    let constant = run(&eora(4), &decoder, &source, &tiny.path("constant"));
    let budget = constant.reports().map(|report| report.bytes.factors).sum();
    let ranks = Ranks::allocate(constant.reports(), budget, 4, 1, Spread::Absolute).unwrap();
    let repair = Repair { ranks, ..eora(0) };
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
fn merging_by_requantisation_reports_its_loss_and_is_stored_with_exactly_that() {
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let repair = Repair {
        requantise: Some(compressor("gptq-int4-g32")),
        ..eora(4)
    };
    let source = compressor("gptq-int4-g32");
    let repaired = run(&repair, &decoder, &source, &tiny.path("run"));
    for report in repaired.reports() {
        let requantised = report.requantised.as_ref().unwrap();
        assert!(requantised.calibration > report.calibration.after);
        assert_eq!(requantised.bytes, report.bytes.compressed);
    }
    let layout = Layout::Gptq {
        version: gptq::Version::V2,
    };
    let (dir, options) = (tiny.path("requantised"), WriteOptions::default());
    let weights = Weights::Requantised;
    write_checkpoint(
        &decoder,
        &repaired,
        weights,
        layout,
        &dir,
        &options,
        &mut || (),
    )
    .unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let given = Given::open(&checkpoint).unwrap();
    let none = Repair {
        method: None,
        ..eora(0)
    };
    let again = run(&none, &decoder, &given, &tiny.path("again"));
    // The inputs of the first block are the same in both runs.
    for (a, b) in repaired.reports().zip(again.reports()).take(3) {
        let expected = a.requantised.as_ref().unwrap().calibration;
        assert!((b.calibration.after / expected - 1.0).abs() < 1e-9);
    }
    let merged = write_checkpoint(
        &decoder,
        &repaired,
        Weights::Merged,
        layout,
        tiny.path("no"),
        &options,
        &mut || (),
    );
    assert!(matches!(merged, Err(Error::NotStorable { .. })));
    assert!(!tiny.path("no").exists());
}

#[test]
fn window_weights_act_as_repetition_and_sampled_tokens_still_repair() {
    let tiny = Tiny::new();
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
        repair
            .run(&decoder, &source, windows, None, folder, &mut |_| ())
            .unwrap()
    };
    let weighted = Repair {
        window_weights: Some((0..8).map(|w| if w < 4 { 2.0 } else { 1.0 }).collect()),
        ..eora(3)
    };
    let (a, b) = (result(&weighted, &once, "a"), result(&eora(3), &twice, "b"));
    for (a, b) in a.reports().zip(b.reports()) {
        assert!((a.calibration.after / b.calibration.after - 1.0).abs() < 1e-3);
    }
    let short = Repair {
        window_weights: Some(vec![1.0; 3]),
        ..eora(3)
    };
    let (source, folder) = (compressor("rtn-int4"), tiny.path("short"));
    let short = short.run(&decoder, &source, &once, None, folder, &mut |_| ());
    assert!(matches!(short, Err(Error::Shape { .. })));

    let sampled = Repair {
        sampling: Some(lowrank_eora::repair::Sampling {
            importance: lowrank_eora::stats::Importance::Mixture,
            share: 0.5,
            seed: 0,
        }),
        ..eora(8)
    };
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
    let tiny = Tiny::new();
    let decoder = tiny.decoder();
    let source = compressor("rtn-int3");
    let full = run(&eora(8), &decoder, &source, &tiny.path("full"));
    let quantizer = |bits| GroupQuantizer { bits, group: 16 };
    let quantised = Repair {
        factors: FactorStorage::Quantised {
            a: quantizer(4),
            b: quantizer(8),
        },
        ..eora(8)
    };
    let few = run(&quantised, &decoder, &source, &tiny.path("few"));
    let bytes = |r: &Repaired| -> u64 { r.reports().map(|report| report.bytes.factors).sum() };
    assert!(bytes(&few) * 4 < bytes(&full));
    assert!(held_out(&few).loss() < 1.1 * held_out(&full).loss());
    assert!(held_out(&few).loss() < held_out(&few).loss_before());
}

#[test]
fn on_a_trained_model_eora_loses_least_on_held_out_tokens() {
    let Some((checkpoint, calibration, held_out_windows)) = trained() else {
        return;
    };
    let decoder = decoder(&checkpoint);
    let folder = tempfile::tempdir().unwrap();
    let repair = |source: &dyn Source, method, name: &str| {
        let repair = Repair { method, ..eora(8) };
        let path = folder.path().join(name);
        let held_out = Some(&held_out_windows);
        repair
            .run(&decoder, source, &calibration, held_out, path, &mut |_| ())
            .unwrap()
    };
    for name in ["wanda-2:4", "gptq-int3"] {
        let none = repair(&compressor(name), None, name);
        let svd = repair(&none, Some(Method::Svd), &format!("{name}-svd"));
        let eora = repair(&none, Some(Method::Eora), &format!("{name}-eora"));
        let loss = [&eora, &svd, &none].map(|repaired| held_out(repaired).loss());
        assert!(loss[0] < loss[1] && loss[1] < loss[2], "{name}: {loss:?}");
        for (eora, svd) in eora.reports().zip(svd.reports()).take(3) {
            // Of the first block both see the same inputs.
            assert!(eora.calibration.after <= svd.calibration.after * (1.0 + 1e-6));
        }
    }
}
