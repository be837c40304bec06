//! Weights in groups: the logits of the decoded weights, and tensors that do not fit.

use std::path::Path;

use candle_core::{DType, Device};
use packed::Kind;
use tensor_io::{Checkpoint, Dtype};

use causal_lm::testing::TestModel;
use causal_lm::{Decoder, Execution, LinearName};

use crate::stored::{STORED, Stored, write_compressed, write_tensors};
use crate::{decoder, gap, kind, logits, wide};

#[test]
pub(crate) fn groups_of_gptq_and_compressed_tensors_give_the_logits_of_the_decoded_weights() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let dense = logits(&model.decoder());
    for (at, stored) in STORED.into_iter().enumerate() {
        let dir = model.path(&format!("stored-{at}"));
        write_compressed(&model, stored, &dir);
        let checkpoint = causal_lm::open(&dir).unwrap();
        assert!(checkpoint.config().get("quantization_config").is_none());
        let decoded = decoder(&checkpoint);
        let packed = decoder(&checkpoint).packed(Execution::default());
        let kind = kind(&packed, LinearName::Down);
        assert!(
            matches!(kind, Some(Kind::Groups { bits, .. }) if bits.get() as usize == stored.bits),
            "{stored:?}: {kind:?}"
        );
        let expected = logits(&decoded);
        assert!(gap(&logits(&packed), &expected) < 1e-5, "{stored:?}");
        // The rounding of 8 bits is small, and that of fewer is there.
        let lost = gap(&expected, &dense);
        let bound = if stored.bits == 8 { 0.02 } else { 1.0 };
        assert!(lost > 0.0 && lost < bound, "{stored:?} loses {lost}");
        for name in [LinearName::Q, LinearName::Down] {
            let weight = |decoder: &Decoder<'_>| -> Vec<f32> {
                let weight = decoder.weight(1, name).unwrap().unwrap();
                weight.flatten_all().unwrap().to_vec1().unwrap()
            };
            assert_eq!(weight(&packed), weight(&decoded), "{stored:?}");
        }
        assert!(packed.weight_bytes().unwrap() < model.decoder().weight_bytes().unwrap() / 2);
    }
}

#[test]
pub(crate) fn codes_that_no_kernel_serves_run_decoded() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let stored = Stored {
        group: Some(24),
        ..STORED[0]
    };
    let dir = model.path("narrow");
    write_compressed(&model, stored, &dir);
    let checkpoint = causal_lm::open(&dir).unwrap();
    let packed = decoder(&checkpoint).packed(Execution::default());
    assert_eq!(kind(&packed, LinearName::Q), None);
    assert!(gap(&logits(&packed), &logits(&decoder(&checkpoint))) < 1e-5);
}

/// The same folder with another scale of the first group of a module.
pub(crate) fn with_scale(dir: &Path, module: &str, scale: f32, to: &Path) {
    let file = Checkpoint::open_file(dir.join("model.safetensors")).unwrap();
    let mut tensors = Vec::new();
    for name in file.names() {
        let info = file.info(name).unwrap();
        let (mut dtype, mut bytes) = (info.dtype, file.bytes(name).unwrap().into_owned());
        if name == format!("{module}.scales") {
            let values = file.tensor_as(name, DType::F32, &Device::Cpu).unwrap();
            let mut values: Vec<f32> = values.flatten_all().unwrap().to_vec1().unwrap();
            values[0] = scale;
            dtype = Dtype::F32;
            bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        }
        tensors.push((name.to_string(), dtype, info.shape.clone(), bytes));
    }
    std::fs::create_dir(to).unwrap();
    std::fs::copy(dir.join("config.json"), to.join("config.json")).unwrap();
    write_tensors(to, &tensors);
}

#[test]
fn a_folder_whose_tensors_do_not_fit_is_refused_by_tensor() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let dir = model.path("broken");
    write_compressed(&model, STORED[0], &dir);
    let file = Checkpoint::open_file(dir.join("model.safetensors")).unwrap();
    let module = "model.layers.0.mlp.up_proj";
    type Change = fn(&str, &mut Vec<usize>, &mut Vec<u8>) -> bool;
    let without: Change = |name, _, _| !name.ends_with("up_proj.scales");
    let short: Change = |name, shape, bytes| {
        if name.ends_with("up_proj.qzeros") {
            shape[0] -= 1;
            bytes.truncate(shape[0] * shape[1] * 4);
        }
        true
    };
    let beyond: Change = |name, _, bytes| {
        if name.ends_with("up_proj.g_idx") {
            bytes[..4].copy_from_slice(&99u32.to_le_bytes());
        }
        true
    };
    let infinite: Change = |name, _, bytes| {
        if name.ends_with("up_proj.scales") {
            bytes[..2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
        }
        true
    };
    for (change, says) in [
        (without, "scales"),
        (short, "qzeros"),
        (beyond, "names group 99"),
        (infinite, "scale"),
    ] {
        let mut tensors = Vec::new();
        for name in file.names() {
            let info = file.info(name).unwrap();
            let (mut shape, mut bytes) =
                (info.shape.clone(), file.bytes(name).unwrap().into_owned());
            if change(name, &mut shape, &mut bytes) {
                tensors.push((name.to_string(), info.dtype, shape, bytes));
            }
        }
        let dir = model.path(says);
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(
            model.path("broken").join("config.json"),
            dir.join("config.json"),
        )
        .unwrap();
        write_tensors(&dir, &tensors);
        for execution in [None, Some(Execution::default())] {
            let opened = causal_lm::open(&dir).and_then(|checkpoint| {
                let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
                let decoder = match execution {
                    Some(execution) => decoder.packed(execution),
                    None => decoder,
                };
                decoder.block(0).map(drop)
            });
            let error = opened.unwrap_err().to_string();
            assert!(error.contains(module) && error.contains(says), "{error}");
        }
    }
}
