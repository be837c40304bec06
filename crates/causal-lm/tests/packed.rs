//! Models that run from packed weights, beside the same weights as tensors.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kv_lazy::policy::Budget;
use kv_lazy::{CacheConfig, CacheSet};
use packed::{Kind, Team};
use serde_json::json;
use tensor_io::{Checkpoint, Config, Dtype, TensorData, write_file};

use causal_lm::compressed::bits;
use causal_lm::testing::{self, TestModel};
use causal_lm::{
    Adapter, Arithmetic, Decoder, DenseReason, Error, Execution, LinearName, Model, NoProgress,
    NoTap, WeightSummary, Windows, open_adapted, run_blocks,
};

const TOKENS: [u32; 12] = [0, 7, 3, 49, 11, 3, 20, 5, 8, 13, 1, 30];

fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

/// Logits of a prompt, and of tokens that are decoded one at a time.
fn logits(decoder: &Decoder<'_>) -> Vec<f32> {
    let model = Model::load(decoder).unwrap();
    let mut cache = model.full_cache(1).unwrap();
    let (prompt, rest) = TOKENS.split_at(8);
    let mut all = vec![model.forward_all(&[prompt], &mut cache).unwrap()];
    for token in rest.chunks(1) {
        all.push(model.forward_all(&[token], &mut cache).unwrap());
    }
    let all = Tensor::cat(&all, 1).unwrap();
    all.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, over the largest value.
fn gap(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let pairs = found.iter().zip(expected);
    pairs.fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

fn kind(decoder: &Decoder<'_>, linear: LinearName) -> Option<Kind> {
    decoder.block(0).unwrap().linear(linear).unwrap().kind()
}

#[test]
fn sixteen_bits_run_as_they_are_in_every_architecture() {
    for config in testing::configs() {
        for dtype in [DType::BF16, DType::F16] {
            let model = TestModel::with(&config, dtype, |_, tensor| tensor);
            let packed = model.decoder().packed(Execution::default());
            let name = config.str("model_type").unwrap();
            let down = kind(&packed, LinearName::Q);
            assert!(matches!(down, Some(Kind::Dense(_))), "{name}: {down:?}");
            let expected = logits(&model.decoder());
            let found = logits(&packed);
            assert!(gap(&found, &expected) < 1e-5, "{name} {dtype:?}");

            let windows = Windows::cut(&[1; 40], 20, None).unwrap();
            let hidden = |decoder: &Decoder<'_>| -> Vec<f32> {
                let hidden = run_blocks(decoder, &windows, &mut NoTap, &NoProgress).unwrap();
                let all = hidden.batches()[0].flatten_all().unwrap();
                all.to_vec1().unwrap()
            };
            assert!(gap(&hidden(&packed), &hidden(&model.decoder())) < 1e-5);
            assert_eq!(
                packed.weight_bytes().unwrap(),
                Model::load(&packed).unwrap().weight_bytes()
            );
            assert!(packed.weight_bytes().unwrap() < model.decoder().weight_bytes().unwrap());
        }
    }
}

#[test]
fn floats_of_32_bits_and_other_dtypes_stay_tensors() {
    let config = testing::config("llama", json!({}));
    let model = TestModel::new(&config);
    let decoder = model.decoder().packed(Execution::default());
    assert_eq!(kind(&decoder, LinearName::Q), None);
    assert_eq!(logits(&decoder), logits(&model.decoder()));
    let decoder = Decoder::new(model.checkpoint(), DType::BF16, &Device::Cpu).unwrap();
    assert!(decoder.packed(Execution::default()).execution().is_none());
}

/// How a module is stored in a test.
#[derive(Clone, Copy, Debug)]
struct Stored {
    gptq: Option<&'static str>,
    bits: usize,
    group: Option<usize>,
    symmetric: bool,
    act_order: bool,
}

impl Stored {
    fn config(self) -> serde_json::Value {
        let Self { bits, group, .. } = self;
        match self.gptq {
            Some(version) => json!({
                "quant_method": "gptq", "checkpoint_format": version, "bits": bits,
                "group_size": group.map_or(-1, |width| width as i64), "sym": self.symmetric,
            }),
            None => json!({
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                    "num_bits": bits, "type": "int", "symmetric": self.symmetric,
                    "strategy": if group.is_some() { "group" } else { "channel" }, "group_size": group,
                }}},
            }),
        }
    }

    /// The tensors of a matrix, rounded to the nearest codes.
    fn tensors(self, module: &str, weight: &Tensor) -> Vec<(String, Dtype, Vec<usize>, Vec<u8>)> {
        let (m, n) = weight.dims2().unwrap();
        let rows: Vec<Vec<f32>> = weight.to_vec2().unwrap();
        let Self { bits: b, .. } = self;
        let width = self.group.unwrap_or(n);
        let groups = n.div_ceil(width);
        // Columns 0, 2, 4, .. first where groups follow another order.
        let group_of = |column: usize| match self.act_order {
            false => column / width,
            true => (column % 2 * n.div_ceil(2) + column / 2) / width,
        };
        let most = (1u32 << b) - 1;
        let (mut codes, mut scales, mut zeros) = (vec![], vec![], vec![]);
        for row in &rows {
            let mut of_row = vec![];
            for group in 0..groups {
                let of_group = (0..n).filter(|&column| group_of(column) == group);
                let values: Vec<f32> = of_group.map(|column| row[column]).collect();
                let high = values.iter().fold(0f32, |most, x| most.max(x.abs()));
                let (scale, zero) = match self.symmetric {
                    true => (2.0 * high / most as f32, 1 << (b - 1)),
                    false => {
                        let low = values.iter().fold(0f32, |least, x| least.min(*x));
                        let top = values.iter().fold(0f32, |most, x| most.max(*x));
                        let scale = (top - low) / most as f32;
                        // Version 1 has no zero of 0.
                        (scale, ((-low / scale).round() as u32).clamp(1, most))
                    }
                };
                of_row.push((half::f16::from_f32(scale), zero));
            }
            for (column, value) in row.iter().enumerate() {
                let (scale, zero) = of_row[group_of(column)];
                let code = (value / scale.to_f32()).round() + zero as f32;
                codes.push(code.clamp(0.0, most as f32) as u8);
            }
            scales.extend(of_row.iter().map(|(scale, _)| *scale));
            zeros.extend(of_row.iter().map(|(_, zero)| *zero as u8));
        }
        let pack = |codes: &mut dyn Iterator<Item = u8>, count: usize| -> Vec<u32> {
            let mut words = vec![0; (count * b).div_ceil(32)];
            bits::pack(codes, b, &mut words);
            words
        };
        let by_row: Vec<Vec<u32>> = codes
            .chunks(n)
            .map(|row| pack(&mut row.iter().copied(), n))
            .collect();
        let bytes = |words: Vec<u32>| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let transposed = |rows: &[Vec<u32>]| -> Vec<u32> {
            let columns = 0..rows[0].len();
            columns
                .flat_map(|column| rows.iter().map(move |row| row[column]))
                .collect()
        };
        let index: Vec<u32> = (0..n).map(|column| group_of(column) as u32).collect();
        let name = |part: &str| format!("{module}.{part}");
        let half = |at: usize| scales[at].to_le_bytes();
        match self.gptq {
            Some(version) => {
                let offset = u8::from(version == "gptq");
                let of_group = |group: usize| {
                    let stored = (0..m).map(|row| zeros[row * groups + group] - offset);
                    pack(&mut stored.into_iter(), m)
                };
                let qzeros: Vec<u32> = (0..groups).flat_map(of_group).collect();
                let by_group = (0..groups).flat_map(|g| (0..m).map(move |row| row * groups + g));
                let words = by_row[0].len();
                vec![
                    (
                        name("qweight"),
                        Dtype::I32,
                        vec![words, m],
                        bytes(transposed(&by_row)),
                    ),
                    (
                        name("qzeros"),
                        Dtype::I32,
                        vec![groups, (m * b).div_ceil(32)],
                        bytes(qzeros),
                    ),
                    (
                        name("scales"),
                        Dtype::F16,
                        vec![groups, m],
                        by_group.flat_map(half).collect(),
                    ),
                    (name("g_idx"), Dtype::I32, vec![n], bytes(index)),
                ]
            }
            None => {
                let words = by_row[0].len();
                let shape = [m as i64, n as i64];
                let mut tensors = vec![
                    (
                        name("weight_packed"),
                        Dtype::I32,
                        vec![m, words],
                        bytes(by_row.concat()),
                    ),
                    (
                        name("weight_scale"),
                        Dtype::F16,
                        vec![m, groups],
                        (0..m * groups).flat_map(half).collect(),
                    ),
                    (
                        name("weight_shape"),
                        Dtype::I64,
                        vec![2],
                        shape.iter().flat_map(|size| size.to_le_bytes()).collect(),
                    ),
                ];
                if !self.symmetric {
                    let of_group = |group: usize| {
                        let stored = (0..m).map(|row| zeros[row * groups + group]);
                        pack(&mut stored.into_iter(), m)
                    };
                    let columns: Vec<Vec<u32>> = (0..groups).map(of_group).collect();
                    let words = columns[0].len();
                    let stored = bytes(transposed(&columns));
                    tensors.push((
                        name("weight_zero_point"),
                        Dtype::I32,
                        vec![words, groups],
                        stored,
                    ));
                }
                if self.act_order {
                    tensors.push((name("weight_g_idx"), Dtype::I32, vec![n], bytes(index)));
                }
                tensors
            }
        }
    }
}

/// Writes `model` with its linears stored so.
fn write_compressed(model: &TestModel, stored: Stored, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let checkpoint = model.checkpoint();
    let mut config = checkpoint.config().raw().clone();
    config.insert("quantization_config".into(), stored.config());
    let config = serde_json::Value::Object(config);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors = Vec::new();
    for name in checkpoint.names() {
        let tensor = checkpoint
            .tensor_as(name, DType::F32, &Device::Cpu)
            .unwrap();
        match name.strip_suffix("_proj.weight") {
            Some(_) => {
                let module = name.strip_suffix(".weight").unwrap();
                tensors.extend(stored.tensors(module, &tensor));
            }
            None => {
                let info = checkpoint.info(name).unwrap();
                let bytes = checkpoint.bytes(name).unwrap().into_owned();
                tensors.push((name.to_string(), info.dtype, info.shape.clone(), bytes));
            }
        }
    }
    let data = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let dtype = *dtype;
        (
            name,
            TensorData::Bytes {
                dtype,
                shape,
                bytes,
            },
        )
    });
    write_file(dir.join("model.safetensors"), data, &BTreeMap::new()).unwrap();
}

fn wide() -> Config {
    let changes = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16,
    });
    testing::config("llama", changes)
}

const STORED: [Stored; 10] = {
    let gptq = Stored {
        gptq: Some("gptq"),
        bits: 4,
        group: Some(32),
        symmetric: true,
        act_order: false,
    };
    let tensors = Stored { gptq: None, ..gptq };
    [
        gptq,
        Stored {
            gptq: Some("gptq_v2"),
            symmetric: false,
            ..gptq
        },
        Stored {
            symmetric: false,
            act_order: true,
            ..gptq
        },
        Stored {
            bits: 8,
            group: None,
            ..gptq
        },
        Stored {
            bits: 3,
            symmetric: false,
            ..gptq
        },
        Stored {
            group: Some(16),
            symmetric: false,
            act_order: true,
            ..gptq
        },
        Stored {
            group: Some(16),
            bits: 8,
            ..tensors
        },
        tensors,
        Stored {
            bits: 2,
            group: None,
            symmetric: false,
            ..tensors
        },
        Stored {
            act_order: true,
            symmetric: false,
            ..tensors
        },
    ]
};

#[test]
fn groups_of_gptq_and_compressed_tensors_give_the_logits_of_the_decoded_weights() {
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
fn codes_that_no_kernel_serves_run_decoded() {
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
fn with_scale(dir: &Path, module: &str, scale: f32, to: &Path) {
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
        tensors.push((name, dtype, info.shape.clone(), bytes));
    }
    std::fs::create_dir(to).unwrap();
    std::fs::copy(dir.join("config.json"), to.join("config.json")).unwrap();
    let data = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let dtype = *dtype;
        (
            *name,
            TensorData::Bytes {
                dtype,
                shape,
                bytes,
            },
        )
    });
    write_file(to.join("model.safetensors"), data, &BTreeMap::new()).unwrap();
}

#[test]
fn a_model_tells_how_its_linears_run_and_why() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let layers = model.decoder().config().layers();
    let (linears, head) = (7 * layers, 1);
    let summary = |decoder: &Decoder<'_>| -> WeightSummary {
        let summary = decoder.weights().unwrap();
        assert_eq!(Model::load(decoder).unwrap().weights(), summary);
        assert_eq!(summary.linears(), linears + head);
        summary
    };
    let dense = |summary: &WeightSummary| -> Vec<(DenseReason, usize)> {
        summary
            .dense
            .iter()
            .map(|(why, count)| (*why, *count))
            .collect()
    };
    let floats = Kind::Dense(packed::BlockType::BF16);

    let decoded = summary(&model.decoder());
    assert_eq!(dense(&decoded), [(DenseReason::NotAsked, linears + head)]);
    let in_place = summary(&model.decoder().packed(Execution::default()));
    assert_eq!(in_place.packed, [(floats, linears + head)]);
    assert_eq!((in_place.quantised(), in_place.low_rank), (0, 0));

    let (all, narrow, odd) = (model.path("all"), model.path("24"), model.path("odd"));
    write_compressed(&model, STORED[0], &all);
    let group = Some(24);
    write_compressed(&model, Stored { group, ..STORED[0] }, &narrow);
    with_scale(&all, "model.layers.1.mlp.up_proj", 1.0 / 3.0, &odd);
    let of = |checkpoint: &Checkpoint| summary(&decoder(checkpoint).packed(Execution::default()));
    let found = of(&causal_lm::open(&all).unwrap());
    assert_eq!((found.quantised(), dense(&found)), (linears, vec![]));
    assert!(found.packed.contains(&(floats, head)));
    let found = of(&causal_lm::open(&narrow).unwrap());
    assert_eq!(dense(&found), [(DenseReason::GroupWidth(24), linears)]);
    assert_eq!(found.quantised(), 0);
    let found = of(&causal_lm::open(&odd).unwrap());
    assert_eq!(dense(&found), [(DenseReason::Scales, 1)]);
    assert_eq!(found.quantised(), linears - 1);
    let found = of(&open_adapted(&all, write_adapter(&model)).unwrap());
    assert_eq!((found.quantised(), found.low_rank), (linears, 2 * layers));

    let mut block = model.decoder().block(0).unwrap();
    let weight = block.linear(LinearName::Q).unwrap().weight().unwrap();
    let linear = block.linear_mut(LinearName::Q).unwrap();
    linear.set_weight(weight);
    assert_eq!(linear.dense_reason(), Some(DenseReason::Given));
}

#[test]
fn quantised_weights_are_an_error_where_no_kernel_runs_and_floats_are_not() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let dir = model.path("groups");
    write_compressed(&model, STORED[0], &dir);
    let adapted = open_adapted(&dir, write_adapter(&model)).unwrap();
    for checkpoint in [&causal_lm::open(&dir).unwrap(), &adapted] {
        let decoder = || Decoder::new(checkpoint, DType::BF16, &Device::Cpu).unwrap();
        let error = decoder().packed(Execution::default()).block(0).unwrap_err();
        assert!(matches!(error, Error::QuantisedWeights { .. }), "{error}");
        let error = error.to_string();
        for part in ["model.layers.0.", "gptq, 4 bits", "bf16", "decode it first"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(decoder().block(0).is_ok());
    }
    let floats = Decoder::new(model.checkpoint(), DType::BF16, &Device::Cpu).unwrap();
    let block = floats.packed(Execution::default()).block(0).unwrap();
    let reason = block.linear(LinearName::Q).unwrap().dense_reason();
    assert_eq!(reason, Some(DenseReason::Device));
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
                tensors.push((name, info.dtype, shape, bytes));
            }
        }
        let dir = model.path(says);
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(
            model.path("broken").join("config.json"),
            dir.join("config.json"),
        )
        .unwrap();
        let data = tensors.iter().map(|(name, dtype, shape, bytes)| {
            let dtype = *dtype;
            (
                *name,
                TensorData::Bytes {
                    dtype,
                    shape,
                    bytes,
                },
            )
        });
        write_file(dir.join("model.safetensors"), data, &BTreeMap::new()).unwrap();
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

/// A PEFT folder with factors of rank 3 for two linears of each block.
fn write_adapter(model: &TestModel) -> std::path::PathBuf {
    let config = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none"});
    write_adapter_with(model, "adapter", config)
}

/// The same factors with another config.
fn write_adapter_with(
    model: &TestModel,
    name: &str,
    config: serde_json::Value,
) -> std::path::PathBuf {
    let dir = model.path(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let mut tensors = Vec::new();
    let mut random = causal_lm::synthetic::random(5);
    for layer in 0..3 {
        for module in ["self_attn.q_proj", "mlp.down_proj"] {
            let name = format!("model.layers.{layer}.{module}");
            let shape = &model
                .checkpoint()
                .info(&format!("{name}.weight"))
                .unwrap()
                .shape;
            for (part, shape) in [("lora_A", [3, shape[1]]), ("lora_B", [shape[0], 3])] {
                let name = format!("base_model.model.{name}.{part}.weight");
                let values = random(&name, &shape).unwrap();
                tensors.push((name, values));
            }
        }
    }
    let data = tensors.iter().map(|(name, tensor)| (name, tensor));
    write_file(
        dir.join("adapter_model.safetensors"),
        data,
        &BTreeMap::new(),
    )
    .unwrap();
    dir
}

#[test]
fn an_adapter_beside_packed_weights_gives_the_logits_of_the_merged_model() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let adapter = write_adapter(&model);
    let groups = model.path("groups");
    write_compressed(&model, STORED[1], &groups);
    for base in [model.dir(), groups.as_path()] {
        let checkpoint = open_adapted(base, &adapter).unwrap();
        let packed = decoder(&checkpoint).packed(Execution::default());
        assert!(kind(&packed, LinearName::Q).is_some());
        let merged = logits(&decoder(&checkpoint));
        assert!(gap(&logits(&packed), &merged) < 1e-5, "{}", base.display());
        let alone = causal_lm::open(base).unwrap();
        assert!(gap(&merged, &logits(&decoder(&alone))) > 1e-2);
        let weight = |decoder: &Decoder<'_>| -> Vec<f32> {
            let weight = decoder.weight(2, LinearName::Q).unwrap().unwrap();
            weight.flatten_all().unwrap().to_vec1().unwrap()
        };
        let gap = gap(&weight(&packed), &weight(&decoder(&checkpoint)));
        assert!(gap < 1e-6, "{gap}");
    }
}

#[test]
fn ranks_and_alphas_of_an_adapter_are_those_of_the_patterns_that_match() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let config = |r: usize, ranks: serde_json::Value, alphas: serde_json::Value| {
        json!({"peft_type": "LORA", "r": r, "lora_alpha": 6, "bias": "none", "rank_pattern": ranks,
            "alpha_pattern": alphas})
    };
    let open = |name: &str, config| {
        let dir = write_adapter_with(&model, name, config);
        Adapter::open(dir, model.checkpoint())
    };
    let scales = |adapter: &Adapter| -> Vec<f32> {
        let scale = |name| adapter.factors(name).unwrap().unwrap().scale;
        adapter.names().map(scale).collect()
    };
    // In the order of names: down_proj and q_proj of each of three blocks.
    let plain = open("plain", config(3, json!({}), json!({}))).unwrap();
    assert_eq!(scales(&plain), [2.0; 6]);
    let ranks = json!({".*q_proj": 3, r"layers\.\d+\.mlp\..*": 3});
    let by_rank = open("ranks", config(12, ranks, json!({}))).unwrap();
    assert_eq!(scales(&by_rank), [2.0; 6]);
    let alphas = json!({r"layers\.[01]\..*q_proj": 12, "down_proj": 3});
    let by_alpha = open("alphas", config(3, json!({}), alphas)).unwrap();
    assert_eq!(scales(&by_alpha), [1.0, 4.0, 1.0, 4.0, 1.0, 2.0]);

    // A rank that is not that of the factors would give them another strength.
    let wrong = open("wrong", config(12, json!({"q_proj": 3}), json!({})));
    let error = wrong.unwrap_err().to_string();
    for part in [
        "adapter_model.safetensors",
        "down_proj",
        "rank 3",
        "states 12",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn an_adapter_may_be_added_in_part() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let dir = write_adapter(&model);
    let half = write_adapter_with(
        &model,
        "half",
        json!({"peft_type": "LORA", "r": 3, "lora_alpha": 3, "bias": "none"}),
    );
    let open = || Adapter::open(&dir, model.checkpoint()).unwrap();
    let scaled = |scale: f32| {
        let base = Checkpoint::open(model.dir()).unwrap();
        let checkpoint = open().with_scale(scale).unwrap().added_to(base).unwrap();
        let packed = logits(&decoder(&checkpoint).packed(Execution::default()));
        let merged = logits(&decoder(&checkpoint));
        assert!(gap(&packed, &merged) < 1e-5);
        (merged, checkpoint.content_hash().unwrap())
    };
    let expected = open_adapted(model.dir(), &half).unwrap();
    let (found, hash) = scaled(0.5);
    assert!(gap(&found, &logits(&decoder(&expected))) < 1e-6);
    assert_ne!(scaled(1.0).1, hash);
    assert!(gap(&scaled(0.0).0, &logits(&model.decoder())) < 1e-6);
    let error = open().with_scale(f32::NAN).unwrap_err().to_string();
    assert!(error.contains("NaN"), "{error}");
}

#[test]
fn logits_do_not_depend_on_the_number_of_threads() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let dir = model.path("groups");
    write_compressed(&model, STORED[2], &dir);
    let checkpoint = open_adapted(&dir, write_adapter(&model)).unwrap();
    for arithmetic in [Arithmetic::F32, Arithmetic::Int8] {
        let of = |threads: usize| {
            let mut execution = Execution::new(arithmetic);
            execution.team = Some(Arc::new(Team::new(threads)));
            logits(&decoder(&checkpoint).packed(execution))
        };
        let one = of(1);
        for threads in [2, 3, 7] {
            assert_eq!(of(threads), one, "{threads} threads, {arithmetic:?}");
        }
    }
}

#[test]
fn int8_arithmetic_is_near_that_of_f32() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let dir = model.path("groups");
    write_compressed(&model, STORED[1], &dir);
    let checkpoint = causal_lm::open(&dir).unwrap();
    let of = |arithmetic| logits(&decoder(&checkpoint).packed(Execution::new(arithmetic)));
    let gap = gap(&of(Arithmetic::Int8), &of(Arithmetic::F32));
    assert!(gap > 0.0 && gap < 0.03, "{gap}");
}

#[test]
fn policies_evict_on_a_packed_model_as_on_its_decoded_weights() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let dir = model.path("groups");
    write_compressed(&model, STORED[0], &dir);
    let checkpoint = causal_lm::open(&dir).unwrap();
    for policy in ["streaming", "lazy"] {
        let of = |decoder: &Decoder<'_>| -> (Vec<f32>, usize) {
            let model = Model::load(decoder).unwrap();
            let config = CacheConfig::new(policy.parse().unwrap(), Budget::Tokens(8));
            let shapes = model.cache_shapes();
            let mut cache = CacheSet::new(&shapes, 1, DType::F32, &Device::Cpu, &config).unwrap();
            let mut logits = model.forward(&[&TOKENS[..4]], &mut cache).unwrap();
            for step in 0..24 {
                let token = TOKENS[step % TOKENS.len()];
                logits = model.forward(&[&[token]], &mut cache).unwrap();
            }
            let logits = logits.flatten_all().unwrap().to_vec1().unwrap();
            (logits, cache.physical_len(0))
        };
        let (expected, _) = of(&decoder(&checkpoint));
        let (found, held) = of(&decoder(&checkpoint).packed(Execution::default()));
        assert!(gap(&found, &expected) < 1e-4, "{policy}");
        assert!(held < 28, "{policy} holds {held}");
    }
}

#[test]
fn windows_that_are_decoded_predict_as_the_model_does_with_such_a_cache() {
    let mut evicting = CacheConfig::new("keydiff".parse().unwrap(), Budget::Tokens(8));
    evicting.storage = "f16".parse().unwrap();
    let mut full = CacheConfig::new("full".parse().unwrap(), Budget::Tokens(12));
    full.storage = "int4".parse().unwrap();
    // Quantise from the first tokens on.
    (full.storage.sinks, full.storage.residual) = (0, 1);
    let tokens: Vec<u32> = TOKENS.iter().cycle().take(48).copied().collect();
    let in_windows = |decoder: &Decoder<'_>| -> Vec<f32> {
        let windows = Windows::cut(&tokens, tokens.len(), None).unwrap();
        let hidden = run_blocks(decoder, &windows, &mut NoTap, &NoProgress).unwrap();
        let hidden = hidden.batches()[0].squeeze(0).unwrap();
        let logits = decoder.head().unwrap().forward(&hidden).unwrap();
        logits.flatten_all().unwrap().to_vec1().unwrap()
    };
    let gemma = json!({"head_dim": 8, "sliding_window": 20, "query_pre_attn_scalar": 16,
        "hidden_act": "gelu_pytorch_tanh"});
    let heads = json!({"head_dim": 8});
    for (model_type, changes) in [("llama", &heads), ("qwen3", &heads), ("gemma2", &gemma)] {
        let model = TestModel::new(&testing::config(model_type, changes.clone()));
        let plain = in_windows(&model.decoder());
        for config in [&evicting, &full] {
            let decoder = model.decoder();
            let whole = Model::load(&decoder).unwrap();
            let shapes = whole.cache_shapes();
            let mut cache = CacheSet::new(&shapes, 1, DType::F32, &Device::Cpu, config).unwrap();
            let mut step = |token: &[u32]| whole.forward_all(&[token], &mut cache).unwrap();
            let steps: Vec<Tensor> = tokens.chunks(1).map(&mut step).collect();
            let expected = Tensor::cat(&steps, 1).unwrap();
            let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();

            let found = in_windows(&model.decoder().decoding(config.clone()));
            // The last bit of a key decides on its code, by as much as a code is worth.
            let (difference, whole) = (gap(&found, &expected), gap(&found, &plain));
            assert!(difference < 1e-3, "{model_type}: {difference}");
            assert!(
                whole > 20.0 * difference,
                "{model_type}: {difference} of {whole}"
            );
        }
    }
}
