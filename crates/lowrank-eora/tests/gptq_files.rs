//! Checkpoints in GPTQ's format, written and read back. What is written stays in cargo's folder for tests, where
//! `gptq_reader.py` reads it with code of its own.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use faer::{Mat, MatRef};
use lowrank_eora::Error;
use lowrank_eora::compress::{Compressor, Inputs};
use lowrank_eora::output::gptq::{self, Version};
use lowrank_eora::repair::{Format, QuantisedCheckpoint};
use tensor_io::{Checkpoint, CheckpointWriter, Config, Dtype, TensorSpec, WriteOptions};

const MODULE: &str = "model.layers.0.mlp.up_proj";

fn weight() -> Mat<f64> {
    Mat::from_fn(32, 64, |i, j| ((i * 37 + j * 61) % 127) as f64 / 64.0 - 0.9)
}

fn compress(name: &str) -> (Compressor, lowrank_eora::compress::Compressed) {
    let compressor: Compressor = name.parse().expect("a name");
    let gram = Mat::from_fn(64, 64, |i, j| {
        let distance = i.abs_diff(j) as f64;
        (1.0 + ((i * j) % 5) as f64) * 0.7f64.powf(distance)
            + if i == j { 2.0 + (i % 7) as f64 } else { 0.0 }
    });
    let gram = &gram * gram.transpose();
    let inputs = Some(Inputs::Gram(gram.as_ref()));
    let compressed = compressor
        .compress(weight().as_ref(), inputs)
        .expect("valid");
    (compressor, compressed)
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("gptq")
        .join(name)
}

/// Writes a checkpoint with one quantised linear, and the dense weight that it stands for beside it.
fn write(name: &str, version: Version) -> PathBuf {
    let (compressor, compressed) = compress(name);
    let quantised = compressed.quantised.as_ref().expect("it quantises");
    let tensors = gptq::tensors(MODULE, quantised, version).expect("storable");
    let mut config = Config::default();
    let section = gptq::quantization_config(&compressor, version).expect("it quantises");
    config.set("quantization_config", section);
    let dense = TensorSpec::new("dense", Dtype::F64, vec![32, 64]);
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).chain([dense]);
    let path = folder(&format!("{name}-{}", version.name()));
    let options = WriteOptions::default().with_overwrite(true);
    let mut writer = CheckpointWriter::create(&path, &config, specs.collect::<Vec<_>>(), &options)
        .expect("a folder");
    for (spec, bytes) in &tensors {
        writer.write_bytes(&spec.name, bytes).expect("declared");
    }
    let dense = compressed
        .to_tensor(DType::F64, &Device::Cpu)
        .expect("a tensor");
    writer.write_tensor("dense", &dense).expect("declared");
    writer.finish().expect("complete");
    path
}

#[test]
fn what_is_written_is_read_back_exactly() {
    for bits in [2, 3, 4, 8] {
        for suffix in [
            "-sym",
            "-g16-sym",
            "-g16-sym-act",
            "-g48-sym",
            "-g16-sym-act-static",
        ] {
            for version in [Version::V1, Version::V2] {
                let name = format!("gptq-int{bits}{suffix}");
                let checkpoint = Checkpoint::open(write(&name, version)).expect("complete");
                let reader = QuantisedCheckpoint::open(&checkpoint).expect("known");
                assert!(
                    matches!(reader.format(), Format::Gptq { version: v, .. } if *v == version)
                );
                assert_eq!(reader.modules(), [MODULE]);
                let (_, compressed) = compress(&name);
                let read = reader.quantised(MODULE).expect("well-formed");
                assert_eq!(read, compressed.quantised, "{name}");
                assert_eq!(
                    reader.weight(MODULE).expect("well-formed"),
                    compressed.weight
                );
            }
        }
    }
}

#[test]
fn asymmetric_zero_points_are_kept() {
    for bits in [2, 3, 4, 8] {
        let name = format!("rtn-int{bits}-g16");
        let checkpoint = Checkpoint::open(write(&name, Version::V2)).expect("complete");
        let reader = QuantisedCheckpoint::open(&checkpoint).expect("known");
        let (_, compressed) = compress(&name);
        assert_eq!(
            reader.weight(MODULE).expect("well-formed"),
            compressed.weight
        );
    }
}

#[test]
fn zero_points_that_contradict_the_label_are_refused() {
    for (written, labelled) in [(Version::V1, Version::V2), (Version::V2, Version::V1)] {
        for bits in [2, 3, 4, 8] {
            let name = format!("rtn-int{bits}-g16-sym");
            let path = write(&name, written);
            let other = tempfile::tempdir().expect("a folder");
            let file = "model.safetensors";
            std::fs::copy(path.join(file), other.path().join(file)).expect("copied");
            let config = std::fs::read_to_string(path.join("config.json")).expect("JSON");
            let relabelled = config.replace(
                &format!("\"{}\"", written.name()),
                &format!("\"{}\"", labelled.name()),
            );
            // `quant_method` is gptq in both.
            let relabelled =
                relabelled.replace("quant_method\": \"gptq_v2", "quant_method\": \"gptq");
            std::fs::write(other.path().join("config.json"), &relabelled).expect("written");
            let checkpoint = Checkpoint::open(other.path()).expect("complete");
            let reader = QuantisedCheckpoint::open(&checkpoint).expect("known");
            let error = reader.quantised(MODULE).expect_err("refused").to_string();
            for tell in [written.name(), "checkpoint_format", "qzeros", "sym: true"] {
                assert!(error.contains(tell), "{tell}: {error}");
            }
            // Without the promise of a symmetric grid the label has to be believed.
            let silent = relabelled.replace("\"sym\": true", "\"sym\": false");
            std::fs::write(other.path().join("config.json"), silent).expect("written");
            let checkpoint = Checkpoint::open(other.path()).expect("complete");
            let reader = QuantisedCheckpoint::open(&checkpoint).expect("known");
            assert!(reader.quantised(MODULE).is_ok());
        }
    }
}

#[test]
fn symmetric_zero_points_have_the_words_that_other_tools_write() {
    let (_, compressed) = compress("rtn-int4-sym");
    let quantised = compressed.quantised.expect("it quantises");
    for (version, byte) in [(Version::V1, 0x77), (Version::V2, 0x88)] {
        let tensors = gptq::tensors(MODULE, &quantised, version).expect("storable");
        let (spec, zeros) = &tensors[1];
        assert_eq!(spec.name, format!("{MODULE}.qzeros"));
        assert!(zeros.iter().all(|&found| found == byte));
    }
}

#[test]
fn what_cannot_be_stored_is_refused() {
    let positive = Mat::from_fn(32, 64, |i, j| 1.0 + (i + j) as f64);
    let quantise = |name: &str, weight: MatRef<'_, f64>| {
        let compressor: Compressor = name.parse().expect("a name");
        let compressed = compressor.compress(weight, None).expect("valid");
        compressed.quantised.expect("it quantises")
    };
    for (quantised, version, reason) in [
        (
            quantise("rtn-int4", positive.as_ref()),
            Version::V1,
            "zero point of 0",
        ),
        (
            quantise("rtn-int4-exact", weight().as_ref()),
            Version::V2,
            "not f16",
        ),
        (
            quantise("rtn-int3-sym", positive.as_ref().subcols(0, 60)),
            Version::V1,
            "whole 32-bit words",
        ),
    ] {
        let error = gptq::tensors(MODULE, &quantised, version).expect_err("refused");
        assert!(matches!(error, Error::NotStorable { .. }));
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn other_formats_are_refused_by_name() {
    let path = write("gptq-int4-g32-sym", Version::V1);
    let other = tempfile::tempdir().expect("a folder");
    std::fs::copy(
        path.join("model.safetensors"),
        other.path().join("model.safetensors"),
    )
    .expect("copied");
    for (section, found) in [
        (r#"{"quant_method": "awq", "bits": 4}"#, "`awq`"),
        (
            r#"{"quant_method": "gptq", "checkpoint_format": "marlin", "bits": 4}"#,
            "`marlin`",
        ),
        (
            r#"{"quant_method": "gptq", "bits": 3, "meta": {"packing": "planar"}}"#,
            "planar",
        ),
        (r#"{"quant_method": "gptq", "bits": 5}"#, "5 bits"),
        (
            r#"{"quant_method": "compressed-tensors", "format": "float-quantized"}"#,
            "`float-quantized`",
        ),
    ] {
        let config = format!(r#"{{"quantization_config": {section}}}"#);
        std::fs::write(other.path().join("config.json"), config).expect("written");
        let checkpoint = Checkpoint::open(other.path()).expect("complete");
        let error = QuantisedCheckpoint::open(&checkpoint).expect_err("refused");
        assert!(matches!(
            error,
            Error::Model(causal_lm::Error::UnsupportedFormat { .. })
        ));
        assert!(error.to_string().contains(found), "{error}");
    }
}
