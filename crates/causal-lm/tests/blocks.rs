//! Folders with weights in blocks of GGUF's types, beside groups and floats.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use causal_lm::compressed::blocks;
use causal_lm::testing::{self, TestModel};
use causal_lm::{Decoder, Execution, LinearName, Model};
use packed::{BlockType, Kind, quantise};
use serde_json::json;
use tensor_io::{Checkpoint, Dtype, TensorData, write_file};

/// A tensor of a file.
#[derive(Clone)]
struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// The type of each weight of a test; the norms stay floats.
fn type_of(name: &str) -> Option<BlockType> {
    let types = [
        ("embed_tokens", BlockType::Q8_0),
        ("q_proj", BlockType::Q5_0),
        ("down_proj", BlockType::Q5_K),
        ("up_proj", BlockType::Q4_1),
        ("o_proj", BlockType::F16),
    ];
    let (_, ty) = types.into_iter().find(|(part, _)| name.contains(part))?;
    Some(ty)
}

fn model() -> TestModel {
    let changes = json!({
        "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "tie_word_embeddings": true,
    });
    TestModel::with(
        &testing::config("llama", changes),
        DType::BF16,
        |_, tensor| tensor,
    )
}

/// The model's tensors with weights in blocks, and those weights as they decode.
fn entries(model: &TestModel) -> (Vec<Entry>, BTreeMap<String, Vec<f32>>) {
    let checkpoint = model.checkpoint();
    let (mut entries, mut decoded) = (Vec::new(), BTreeMap::new());
    for name in checkpoint.names() {
        let info = checkpoint.info(name).unwrap();
        let Some(ty) = type_of(name) else {
            entries.push(Entry {
                name: name.to_string(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: checkpoint.bytes(name).unwrap().into_owned(),
            });
            continue;
        };
        let (rows, cols) = (info.shape[0], info.shape[1]);
        let weight = checkpoint.tensor_as(name, DType::F32, &Device::Cpu);
        let values: Vec<f32> = weight.unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let blocks = quantise(ty, &values, cols, None).unwrap();
        let module = name.strip_suffix(".weight").unwrap();
        let spec = blocks::spec(module, [rows, cols], ty).unwrap();
        assert_eq!(spec.name, format!("{name}.{}", ty.name()));
        decoded.insert(name.to_string(), blocks.dequantise());
        entries.push(Entry {
            name: spec.name,
            dtype: spec.dtype,
            shape: spec.shape,
            bytes: blocks.into_bytes(),
        });
    }
    (entries, decoded)
}

fn write(model: &TestModel, entries: &[Entry], dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let mut config = model.checkpoint().config().raw().clone();
    let section = json!({"quant_method": blocks::METHOD});
    config.insert("quantization_config".into(), section);
    let config = serde_json::Value::Object(config);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let data = entries.iter().map(|entry| {
        let data = TensorData::Bytes {
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &entry.bytes,
        };
        (&entry.name, data)
    });
    write_file(dir.join("model.safetensors"), data, &BTreeMap::new()).unwrap();
}

fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

fn logits(decoder: &Decoder<'_>) -> Vec<f32> {
    let model = Model::load(decoder).unwrap();
    let mut cache = model.full_cache(1).unwrap();
    let prompt = model.forward_all(&[&[1, 7, 3, 4, 0]], &mut cache).unwrap();
    let next = model.forward_all(&[&[2]], &mut cache).unwrap();
    let all = Tensor::cat(&[prompt, next], 1).unwrap();
    all.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn weights_in_blocks_decode_to_their_values_and_are_multiplied_as_they_are() {
    let model = model();
    let (entries, decoded) = entries(&model);
    let dir = model.path("blocks");
    write(&model, &entries, &dir);
    let checkpoint = causal_lm::open(&dir).unwrap();
    for (name, expected) in &decoded {
        let found = checkpoint.tensor_as(name, DType::F32, &Device::Cpu);
        let found: Vec<f32> = found.unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(&found, expected, "{name}");
        let cols = checkpoint.info(name).unwrap().shape[1];
        let rows = checkpoint.rows(name, &[3, 0]).unwrap();
        let expected = [&expected[3 * cols..4 * cols], &expected[..cols]].concat();
        let rows: Vec<f32> = rows
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        assert_eq!(rows, expected, "rows of {name}");
    }
    let as_tensors = decoder(&checkpoint);
    let packed = decoder(&checkpoint).packed(Execution::default());
    let block = packed.block(0).unwrap();
    for (linear, ty) in [
        (LinearName::Q, BlockType::Q5_0),
        (LinearName::Down, BlockType::Q5_K),
    ] {
        assert_eq!(block.linear(linear).unwrap().kind(), Some(Kind::Blocks(ty)));
    }
    let (found, expected) = (logits(&packed), logits(&as_tensors));
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    for (a, b) in found.iter().zip(&expected) {
        assert!((a - b).abs() < 1e-5 * largest, "{a} {b}");
    }
    assert!(packed.weight_bytes().unwrap() < as_tensors.weight_bytes().unwrap() / 3);
}

#[test]
fn tensors_that_are_no_blocks_are_refused_by_name() {
    let model = model();
    let (whole, _) = entries(&model);
    let refused = |change: &dyn Fn(&mut Entry)| -> String {
        let mut entries = whole.clone();
        let of = |entry: &&mut Entry| entry.name.contains("layers.1.mlp.down_proj");
        change(entries.iter_mut().find(of).unwrap());
        let dir = model.path("broken");
        write(&model, &entries, &dir);
        let loaded = causal_lm::open(&dir).and_then(|checkpoint| {
            let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
            Model::load(&decoder.packed(Execution::default())).map(|_| ())
        });
        loaded.unwrap_err().to_string()
    };
    let name = "model.layers.1.mlp.down_proj";
    for (change, says) in [
        (
            (&|entry: &mut Entry| entry.dtype = Dtype::I8) as &dyn Fn(&mut Entry),
            "expected uint8",
        ),
        (
            &|entry| {
                entry.shape[1] -= 1;
                entry.bytes.truncate(entry.shape[0] * entry.shape[1]);
            },
            "whole blocks of 176 bytes",
        ),
        (
            &|entry| entry.bytes[..2].copy_from_slice(&half::f16::NAN.to_le_bytes()),
            "row 0",
        ),
    ] {
        let found = refused(change);
        assert!(found.contains(name) && found.contains(says), "{found}");
    }
    let rows = refused(&|entry| {
        entry.shape[0] -= 1;
        entry.bytes.truncate(entry.shape[0] * entry.shape[1]);
    });
    assert!(rows.contains("down_proj"), "{rows}");
}
