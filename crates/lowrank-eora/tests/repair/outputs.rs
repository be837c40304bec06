//! What a repair is written as, and what reads it.

use crate::common::{
    assert_close, compressor, decoder, eora, from_tensor, id, run, tiny, to_tensor,
};
use candle_core::{DType, Device, Tensor};
use causal_lm::LinearName;
use lowrank_eora::Error;
use lowrank_eora::output::{
    Adapter, AdapterOptions, AdapterRanks, CheckpointOptions, Layout, Probe, Weights, gptq,
    write_checkpoint,
};
use lowrank_eora::repair::{CompressedModel, LayerId, Ranks};
use tensor_io::{Checkpoint, CheckpointWriter, NoProgress, TensorSpec, WriteOptions};

#[test]
fn an_adapter_on_the_compressed_weight_is_the_merged_weight() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let ranks = LinearName::ALL
        .iter()
        .enumerate()
        .skip(1)
        .flat_map(|(i, &linear)| (0..2).map(move |block| (id(block, linear), i + block)));
    let repair = eora(0).with_ranks(Ranks::Table(ranks.collect()));
    let repaired = run(
        &repair,
        &decoder,
        &compressor("wanda-2:4"),
        &tiny.path("run"),
    );
    let merged = tiny.path("merged");
    let options = CheckpointOptions::new(Weights::Merged, Layout::Dense { dtype: None });
    write_checkpoint(&decoder, &repaired, &merged, &options, &NoProgress).unwrap();
    let merged = Checkpoint::open(&merged).unwrap();
    assert_eq!(merged.total_bytes(), tiny.checkpoint().total_bytes());

    let mut sizes = Vec::new();
    for (ranks, rslora, dtype, eps) in [
        (AdapterRanks::Uniform, false, DType::F32, 1e-6),
        (AdapterRanks::Uniform, true, DType::F32, 1e-6),
        (AdapterRanks::Mixed, false, DType::F32, 1e-6),
        (AdapterRanks::Mixed, true, DType::F16, 1e-3),
        (AdapterRanks::Uniform, false, DType::BF16, 8e-3),
    ] {
        let folder = tiny.path(&format!("{ranks:?}-{rslora}-{dtype:?}"));
        let options = AdapterOptions::new("compressed")
            .with_dtype(dtype)
            .with_ranks(ranks)
            .with_rslora(rslora);
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
                let expected = from_tensor(&expected);
                let mut found = layer.weight.matrix().unwrap();
                match (adapter.get(id), layer.factors) {
                    (Some(factors), _) => {
                        if ranks == AdapterRanks::Uniform {
                            assert_eq!(factors.factors.rank(), 7);
                        }
                        found += factors.product();
                    }
                    (None, factors) => {
                        assert!(factors.is_none() && id.module().parts == [LinearName::Q])
                    }
                }
                assert_close(found.as_ref(), expected.as_ref(), eps);
            }
        }
    }
    assert!(sizes[2] < sizes[0], "mixed ranks take less");
}

#[test]
fn the_adapter_configuration_is_what_peft_and_vllm_read() {
    let tiny = tiny();
    let repaired = run(
        &eora(5),
        &tiny.decoder(),
        &compressor("rtn-int4"),
        &tiny.path("run"),
    );
    let folder = tiny.path("adapter");
    let nameless = Adapter::write(&repaired, &AdapterOptions::new(""), &folder).unwrap_err();
    assert!(nameless.to_string().contains("base model"), "{nameless}");
    Adapter::write(&repaired, &AdapterOptions::new("/models/int4"), &folder).unwrap();
    let text = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&config["r"], &config["lora_alpha"]),
        (&5.into(), &5.into())
    );
    assert_eq!(config["rank_pattern"], serde_json::json!({}));
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 7);
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["base_model_name_or_path"], "/models/int4");
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
    let tiny = tiny();
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
            let layers = repaired.block(id.block()).unwrap();
            let layer = layers
                .into_iter()
                .find(|layer| layer.report.layer == id)
                .unwrap();
            let mut w = layer.weight.matrix().unwrap();
            w += layer.factors.unwrap().product() * faer::Scale(scale);
            let w = to_tensor(w.as_ref());
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
    let tiny = tiny();
    let decoder = tiny.decoder();
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
        ("rtn-int4-g32-sym", Layout::CompressedTensors),
        ("gptq-int4-g16", Layout::CompressedTensors),
        ("gptq-int3-g16-sym-act", Layout::CompressedTensors),
        ("gptq-int4-g16-act-static", Layout::CompressedTensors),
        ("rtn-int8", Layout::CompressedTensors),
        ("rtn-int2-g32-signed", Layout::CompressedTensors),
    ] {
        let none = eora(0).with_method(None);
        let path = |what: &str| tiny.path(&format!("{what}-{name}-{layout:?}"));
        let compressed = run(&none, &decoder, &compressor(name), &path("run"));
        assert!(compressed.reports().all(|report| report.rank == 0));
        let options = CheckpointOptions::new(Weights::Compressed, layout);
        let dst = path("compressed");
        write_checkpoint(&decoder, &compressed, dst, &options, &NoProgress).unwrap();
        let checkpoint = Checkpoint::open(path("compressed")).unwrap();
        let given = CompressedModel::open(&checkpoint).unwrap();
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
fn merging_by_requantisation_reports_its_loss_and_is_stored_with_exactly_that() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let repair = eora(4).with_requantise(Some(compressor("gptq-int4-g32")));
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
    let dir = tiny.path("requantised");
    let options = CheckpointOptions::new(Weights::Requantised, layout);
    write_checkpoint(&decoder, &repaired, &dir, &options, &NoProgress).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let given = CompressedModel::open(&checkpoint).unwrap();
    let none = eora(0).with_method(None);
    let again = run(&none, &decoder, &given, &tiny.path("again"));
    // The inputs of the first block are the same in both runs.
    for (a, b) in repaired.reports().zip(again.reports()).take(3) {
        let expected = a.requantised.as_ref().unwrap().calibration;
        assert!((b.calibration.after / expected - 1.0).abs() < 1e-9);
    }
    let options = CheckpointOptions::new(Weights::Merged, layout);
    let no = tiny.path("no");
    let merged = write_checkpoint(&decoder, &repaired, &no, &options, &NoProgress);
    assert!(matches!(merged, Err(Error::NotStorable { .. })));
    assert!(!tiny.path("no").exists());
}

#[test]
fn a_head_that_the_config_denies_is_kept_and_announced() {
    let tiny = tiny();
    let folder = tiny.dir();
    // The same model with a head of its own, and the config that it had.
    let source = tiny.checkpoint();
    let embedding = source
        .tensor("model.embed_tokens.weight", &Device::Cpu)
        .unwrap();
    let head = (&embedding + 0.5).unwrap();
    let mut specs = Vec::new();
    for name in source.names() {
        let info = source.info(name).unwrap();
        specs.push(TensorSpec::new(name, info.dtype, info.shape.clone()));
    }
    specs.push(TensorSpec::new("lm_head.weight", DType::F32, head.dims()));
    let dst = folder.with_file_name("other");
    let mut writer =
        CheckpointWriter::create(&dst, source.config(), specs, &WriteOptions::default()).unwrap();
    for name in source.names() {
        writer.copy_tensor(name, source).unwrap();
    }
    writer.write_tensor("lm_head.weight", &head).unwrap();
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&dst).unwrap();
    let decoder = decoder(&checkpoint);
    assert!(!decoder.config().tied);
    let repaired = run(
        &eora(2),
        &decoder,
        &compressor("rtn-int4-g16-sym"),
        &tiny.path("run"),
    );
    let version = gptq::Version::V1;
    for (name, weights, layout) in [
        ("dense", Weights::Merged, Layout::Dense { dtype: None }),
        ("gptq", Weights::Compressed, Layout::Gptq { version }),
    ] {
        let dst = tiny.path(name);
        let options = CheckpointOptions::new(weights, layout);
        write_checkpoint(&decoder, &repaired, &dst, &options, &NoProgress).unwrap();
        let written = Checkpoint::open(&dst).unwrap();
        assert_eq!(
            written.config().get("tie_word_embeddings"),
            Some(&false.into()),
            "{name}"
        );
        let kept = written.tensor("lm_head.weight", &Device::Cpu).unwrap();
        assert_close(
            from_tensor(&kept).as_ref(),
            from_tensor(&head).as_ref(),
            0.0,
        );
    }
}
