//! GGUF files as the compressed model, and adapters for them.

use crate::common::{assert_close, compressor, decoder, eora, from_tensor, run, tiny, to_tensor};
use candle_core::{DType, Device};
use causal_lm::gguf::Architecture;
use causal_lm::{Factors, LinearName, Windows, testing};
use faer::Mat;
use lowrank_eora::Error;
use lowrank_eora::compress::Compressor;
use lowrank_eora::output::{
    Adapter, GgufAdapterOptions, GgufModelOptions, ImatrixOrigin, TypeTable, Weights, gguf_types,
    write_gguf,
};
use lowrank_eora::packed::BlockType;
use lowrank_eora::repair::{CompressedModel, Repaired, StoredWeight, Texts};
use std::path::Path;
use tensor_io::gguf::{Gguf, Metadata};
use tensor_io::{Checkpoint, CheckpointWriter, NoProgress, TensorSpec, WriteOptions};

#[test]
fn an_adapter_in_gguf_comes_back_with_every_rank_and_row_where_it_was() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let repaired = run(&eora(3), &decoder, &compressor("q4_0"), &tiny.path("run"));
    for architecture in [Architecture::Llama, Architecture::Qwen2] {
        let path = tiny.path(architecture.name());
        let options = GgufAdapterOptions::new(&decoder)
            .with_architecture(architecture)
            .with_dtype(BlockType::F32);
        Adapter::write_gguf(&repaired, &decoder, &options, &path).unwrap();
        let file = Gguf::open(&path).unwrap();
        let name = file
            .metadata()
            .required("general.architecture", Metadata::get_str);
        assert_eq!(name.unwrap(), architecture.name());
        assert!(!file.metadata().contains("adapter.lora.alpha"));
        assert_eq!(
            file.info("blk.1.ffn_down.weight.lora_a").unwrap().shape,
            [3, 64]
        );
        let adapter = causal_lm::Adapter::open(&path, tiny.checkpoint());
        let adapter = adapter.unwrap();
        assert_eq!(adapter.names().count(), 14);
        for block in 0..2 {
            for layer in repaired.block(block).unwrap() {
                let factors = adapter.factors(&layer.report.layer.weight());
                let found = product(&factors.unwrap().unwrap());
                let expected = layer.factors.unwrap().product();
                assert_close(found.as_ref(), expected.as_ref(), 1e-6);
            }
        }
        // Only where neighbours rotate together are rows of q and k in another order.
        let stored = file.floats("blk.0.attn_q.weight.lora_b").unwrap();
        let b = repaired.block(0).unwrap()[0].factors.clone().unwrap().b;
        assert_eq!(stored[..3], [0, 1, 2].map(|j| b[(0, j)] as f32));
        let second = if architecture == Architecture::Llama {
            2
        } else {
            1
        };
        assert_eq!(stored[3..6], [0, 1, 2].map(|j| b[(second, j)] as f32));
    }
    let other = crate::common::tiny();
    let config = other.dir().join("config.json");
    let error = causal_lm::Adapter::open(config, tiny.checkpoint());
    assert!(error.is_err());
}

/// B A, scaled.
fn product(factors: &Factors) -> Mat<f64> {
    let Factors { a, b, rank, .. } = factors;
    let matrix = |values: &[f32], cols: usize| {
        Mat::from_fn(values.len() / cols, cols, |i, j| {
            f64::from(values[i * cols + j])
        })
    };
    let scale = faer::Scale(f64::from(factors.scale));
    matrix(b, *rank) * matrix(a, a.len() / rank) * scale
}

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(shared_data::path!("golden")).join(name)
}

fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    testing::logits(&decoder(checkpoint), tokens)
}

/// The model with an adapter merged into its weights, as a folder.
fn merged(base: &Checkpoint, adapter: &causal_lm::Adapter, dir: &Path) -> Checkpoint {
    let spec = |name| TensorSpec::new(name, DType::F32, base.info(name).unwrap().shape.clone());
    let (specs, options) = (base.names().map(spec).collect(), WriteOptions::default());
    let mut writer = CheckpointWriter::create(dir, base.config(), specs, &options).unwrap();
    for name in base.names() {
        let mut tensor = base.tensor_as(name, DType::F32, &Device::Cpu).unwrap();
        if let Some(factors) = adapter.factors(name).unwrap() {
            tensor = (tensor + to_tensor(product(&factors).as_ref())).unwrap();
        }
        writer.write_tensor(name, &tensor).unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(dir).unwrap()
}

#[shared_data::needed("golden")]
#[test]
fn an_adapter_of_llama_cpp_merged_into_its_base_gives_the_logits_of_transformers() {
    let text = std::fs::read_to_string(golden("gguf-models.json")).unwrap();
    let values: serde_json::Value = serde_json::from_str(&text).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        let rows = value.as_array().unwrap().iter();
        rows.flat_map(|row| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()))
            .collect()
    };
    let tokens = values["tokens"].as_array().unwrap().iter();
    let tokens: Vec<u32> = tokens.map(|t| t.as_u64().unwrap() as u32).collect();
    let expected = numbers(&values["lora"]["tiny-llama-gqa-lora.gguf"]["logits"]);
    let base = causal_lm::gguf::open(golden("tiny-llama-gqa-f32.gguf")).unwrap();
    let adapter = causal_lm::Adapter::open(golden("tiny-llama-gqa-lora.gguf"), &base).unwrap();
    let rank = |name| adapter.factors(name).unwrap().unwrap().rank;
    let ranks: Vec<usize> = adapter.names().map(rank).collect();
    assert!(ranks.contains(&1) && ranks.contains(&4), "{ranks:?}");
    let dir = tempfile::tempdir().unwrap();
    let found = logits(
        &merged(&base, &adapter, &dir.path().join("merged")),
        &tokens,
    );
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (f64::from(*found) - expected).abs() < 1e-4,
            "{found} {expected}"
        );
    }
}

#[shared_data::needed("golden")]
#[test]
fn a_given_gguf_is_repaired_with_exactly_the_weights_that_it_holds() {
    let original = causal_lm::gguf::open(golden("tiny-llama-gqa-f32.gguf")).unwrap();
    let dense = decoder(&original);
    let quantised = causal_lm::gguf::open(golden("tiny-llama-gqa-q4_0.gguf")).unwrap();
    let given = CompressedModel::open(&quantised).unwrap();
    assert_eq!(given.architecture(), Some(Architecture::Llama));
    let windows = Windows::cut(
        &(0..320).map(|i| i * i % 40).collect::<Vec<u32>>(),
        16,
        None,
    );
    let windows = windows.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let repaired = eora(4)
        .run(
            &dense,
            &given,
            Texts::new(&windows),
            dir.path(),
            &NoProgress,
        )
        .unwrap();
    for block in 0..repaired.blocks() {
        for layer in repaired.block(block).unwrap() {
            match &layer.weight {
                StoredWeight::Blocks(blocks) => {
                    assert_eq!(blocks.block_type(), BlockType::Q4_0);
                    let bytes = blocks.bytes().len() as u64;
                    assert_eq!(layer.report.bytes.compressed, bytes);
                }
                // Its rows of 48 are no whole blocks: the file has them in f16.
                other => {
                    assert_eq!(layer.report.layer.module().parts, [LinearName::Down]);
                    assert!(matches!(other, StoredWeight::Dense(t) if t.dtype() == DType::F16));
                }
            }
            let name = layer.report.layer.weight();
            let expected = quantised
                .tensor_as(&name, DType::F64, &Device::Cpu)
                .unwrap();
            assert_eq!(layer.weight.matrix().unwrap(), from_tensor(&expected));
            let energy = layer.report.calibration;
            assert!(energy.after < energy.before, "{name}");
        }
    }
}

fn text_windows() -> Windows {
    let tokens: Vec<u32> = (0..320).map(|i| i * i % 40).collect();
    Windows::cut(&tokens, 16, None).unwrap()
}

/// The linears of a golden file compressed, without factors.
fn compressed(original: &Checkpoint, compressor: &Compressor, folder: &Path) -> Repaired {
    let repair = eora(0).with_method(None);
    let windows = text_windows();
    let texts = Texts::new(&windows);
    let decoder = decoder(original);
    repair
        .run(&decoder, compressor, texts, folder, &NoProgress)
        .unwrap()
}

#[shared_data::needed("golden")]
#[test]
fn a_model_written_as_gguf_has_the_bytes_of_llama_cpps_quantiser() {
    let template = Gguf::open(golden("tiny-llama-gqa-f32.gguf")).unwrap();
    let original = causal_lm::gguf::open(golden("tiny-llama-gqa-f32.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (name, file_type) in [("q4_0", 2), ("q4_1", 3), ("q8_0", 7)] {
        let repaired = compressed(&original, &compressor(name), &dir.path().join(name));
        let path = dir.path().join(format!("{name}.gguf"));
        let options = GgufModelOptions::new(Weights::Compressed, &template);
        let size = write_gguf(&decoder(&original), &repaired, &options, &path, &NoProgress);
        assert_eq!(size.unwrap(), std::fs::metadata(&path).unwrap().len());
        let (found, golden) = (
            Gguf::open(&path).unwrap(),
            Gguf::open(golden(&format!("tiny-llama-gqa-{name}.gguf"))).unwrap(),
        );
        let stored = found.metadata().get_u64("general.file_type").unwrap();
        assert_eq!(stored, Some(file_type));
        let says = |key: &str| found.metadata().get_str(key).unwrap().unwrap();
        assert_eq!(says("eora.compressor"), name);
        assert_eq!(says("eora.weights"), "compressed");
        assert_eq!(says("eora.model").len(), 64);
        let table = TypeTable::of(&specs(&found));
        assert_eq!(says("eora.types"), table.to_string());
        assert_eq!(table.bytes(), found.total_bytes());
        let mut linears = 0;
        for info in found.tensors() {
            let name = &info.name;
            if name.contains("norm") || !name.starts_with("blk.") {
                // Copied as it is.
                assert_eq!(found.bytes(name).unwrap(), template.bytes(name).unwrap());
                continue;
            }
            linears += 1;
            assert_eq!(info.layout, golden.info(name).unwrap().layout, "{name}");
            assert_eq!(found.bytes(name).unwrap(), golden.bytes(name).unwrap());
        }
        assert_eq!(linears, 7 * repaired.blocks());
    }
}

fn specs(file: &Gguf) -> Vec<tensor_io::gguf::TensorSpec> {
    let spec = |info: &tensor_io::gguf::TensorInfo| {
        tensor_io::gguf::TensorSpec::new(&info.name, info.layout, info.shape.clone())
    };
    file.tensors().iter().map(spec).collect()
}

#[shared_data::needed("golden")]
#[test]
fn what_a_file_says_of_an_importance_matrix_is_what_weighted_its_rounding() {
    // A template that was made with an importance matrix itself.
    let plain = Gguf::open(golden("tiny-llama-gqa-f32.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("template.gguf");
    let metadata = plain.metadata();
    let mut entries: Vec<_> = metadata
        .keys()
        .map(|key| (key.to_string(), metadata.get(key).unwrap().unwrap()))
        .collect();
    entries.push(("quantize.imatrix.file".into(), "stale.dat".into()));
    let mut writer = tensor_io::gguf::Writer::create(&path, &entries, &specs(&plain)).unwrap();
    for info in plain.tensors() {
        writer
            .write(&info.name, plain.bytes(&info.name).unwrap())
            .unwrap();
    }
    writer.finish().unwrap();
    let template = Gguf::open(&path).unwrap();
    let original = causal_lm::gguf::open(&path).unwrap();
    for (name, file) in [("q4_0", None), ("q4_0-imatrix", Some("own.dat"))] {
        let repaired = compressed(&original, &compressor(name), &dir.path().join(name));
        let path = dir.path().join(format!("{name}.gguf"));
        let origin = ImatrixOrigin {
            file: Some("own.dat".into()),
            dataset: Some("a text".into()),
            entries: None,
            chunks: Some(7),
        };
        let options = GgufModelOptions::new(Weights::Compressed, &template).with_imatrix(origin);
        write_gguf(&decoder(&original), &repaired, &options, &path, &NoProgress).unwrap();
        let written = Gguf::open(&path).unwrap();
        let metadata = written.metadata();
        assert_eq!(
            metadata.get_str("quantize.imatrix.file").unwrap(),
            file,
            "{name}"
        );
        let number = |key: &str| {
            metadata
                .get_u64(&format!("quantize.imatrix.{key}"))
                .unwrap()
        };
        let linears = file.map(|_| repaired.reports().count() as u64);
        assert_eq!(number("entries_count"), linears, "{name}");
        assert_eq!(number("chunks_count"), file.map(|_| 7));
    }
}

#[shared_data::needed("golden")]
#[test]
fn codes_of_gptq_come_back_from_a_gguf_file_unchanged() {
    let file = golden("tiny-llama-wide-q4_k_m.gguf");
    let template = Gguf::open(&file).unwrap();
    let original = causal_lm::gguf::open(&file).unwrap();
    let dense = decoder(&original);
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "gptq-int4-g32-sym",
        "gptq-int4-g32-offset",
        "gptq-q4_k_m",
        "wanda-2:4",
    ] {
        let folder = dir.path().join(name.replace(':', "of"));
        gguf_types(&dense, &compressor(name)).unwrap();
        let repaired = compressed(&original, &compressor(name), &folder);
        let path = folder.with_extension("gguf");
        let options = GgufModelOptions::new(Weights::Compressed, &template);
        write_gguf(&dense, &repaired, &options, &path, &NoProgress).unwrap();
        let written = causal_lm::gguf::open(&path).unwrap();
        for block in 0..repaired.blocks() {
            for layer in repaired.block(block).unwrap() {
                let id = layer.report.layer;
                let found = written.tensor_as(&id.weight(), DType::F64, &Device::Cpu);
                assert_eq!(
                    from_tensor(&found.unwrap()),
                    layer.weight.matrix().unwrap(),
                    "{name} {id}"
                );
            }
        }
    }
    for name in ["gptq-int4-g32", "gptq-int4-g32-sym-act", "rtn-int8-g32"] {
        let refused = gguf_types(&dense, &compressor(name));
        assert!(matches!(refused, Err(Error::NotStorable { .. })), "{name}");
    }
}

#[shared_data::needed("golden")]
#[test]
fn a_given_file_is_compared_with_rounding_to_the_type_of_most_of_its_weights() {
    for (file, alike) in [
        ("tiny-llama-gqa-q4_1.gguf", Some("q4_1")),
        ("tiny-llama-wide-q4_k_m.gguf", Some("q4_k")),
        ("tiny-llama-gqa-f32.gguf", None),
    ] {
        let checkpoint = causal_lm::gguf::open(golden(file)).unwrap();
        let found = CompressedModel::open(&checkpoint).unwrap().alike();
        assert_eq!(found, alike.map(compressor), "{file}");
    }
}
