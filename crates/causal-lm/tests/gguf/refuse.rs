//! Files that are well-formed and cannot be run: each an error that names file and key or tensor.

use candle_core::{DType, Device};
use causal_lm::gguf::Architecture;
use causal_lm::{Decoder, Execution};
use packed::BlockType;
use tensor_io::gguf::{Gguf, Value};

use crate::allocator::measured;
use crate::common::Golden;
use crate::made::{File, Made};

/// The error that a file gives after a change, on opening or when its first block is loaded.
fn refusal(change: impl FnOnce(&mut File)) -> String {
    let golden = Golden::all()
        .into_iter()
        .find(|(name, _)| name == "llama-gqa")
        .unwrap()
        .1;
    let mut file = File::of(&golden, Architecture::Llama, BlockType::Q8_0);
    change(&mut file);
    let dir = tempfile::tempdir().unwrap();
    let path = file.write(dir.path());
    let opened = causal_lm::open(&path).and_then(|checkpoint| {
        let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
        decoder.block(0)?;
        decoder.embed(&[&[0, 1]])?;
        decoder.head().map(drop)
    });
    let error = opened.unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

fn key(key: &str, value: impl Into<Value>) -> impl FnOnce(&mut File) {
    let (key, value) = (key.to_string(), value.into());
    move |file| match key.strip_prefix("llama.") {
        Some(own) => file.set(own, value),
        None => {
            file.metadata.retain(|(other, _)| *other != key);
            file.metadata.push((key, value));
        }
    }
}

fn without(key: &str) -> impl FnOnce(&mut File) {
    let key = key.to_string();
    move |file| file.metadata.retain(|(other, _)| *other != key)
}

macro_rules! assert_says {
    ($error:expr, $($part:expr),+) => {
        let error = $error;
        $(assert!(error.contains($part), "{error}");)+
    };
}

#[test]
fn what_is_no_model_of_a_known_kind() {
    assert_says!(
        refusal(key("general.type", "adapter")),
        "model.gguf",
        "\"adapter\"",
        "\"model\""
    );
    assert_says!(
        refusal(key("general.architecture", "rwkv")),
        "\"rwkv\"",
        "llama, deci, qwen2, qwen3"
    );
    assert_says!(
        refusal(without("general.architecture")),
        "`general.architecture` is missing"
    );
    assert_says!(refusal(key("llama.expert_count", 8u32)), "8 experts");
}

#[test]
fn missing_keys_and_lists_of_another_length() {
    for missing in [
        "block_count",
        "embedding_length",
        "context_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ] {
        let missing = format!("llama.{missing}");
        assert_says!(
            refusal(without(&missing)),
            "model.gguf",
            missing.as_str(),
            "missing"
        );
    }
    assert_says!(
        refusal(key("llama.attention.head_count", vec![4u32, 4])),
        "llama.attention.head_count",
        "list of 3",
        "list of 2"
    );
    assert_says!(
        refusal(key("llama.block_count", "three")),
        "llama.block_count",
        "three"
    );
    assert_says!(refusal(key("llama.block_count", 0u32)), "llama.block_count");
    assert_says!(
        refusal(key("llama.block_count", u32::MAX)),
        "llama.block_count"
    );
}

#[test]
fn metadata_that_contradict_the_tensors_or_each_other() {
    assert_says!(
        refusal(key("llama.vocab_size", 41u32)),
        "llama.vocab_size is 41",
        "40 rows"
    );
    assert_says!(
        refusal(key("llama.attention.value_length", 16u32)),
        "value_length is 16"
    );
    assert_says!(
        refusal(key("llama.rope.dimension_count", 4u32)),
        "rope.dimension_count is 4"
    );
    assert_says!(
        refusal(key("llama.feed_forward_length", 47u32)),
        "gate_proj"
    );
    assert_says!(refusal(key("llama.block_count", 4u32)), "model.layers.3.");
    assert_says!(refusal(key("llama.block_count", 2u32)), "model.layers.2.");
    assert_says!(
        refusal(key("llama.attention.head_count_kv", 0u32)),
        "layer 0",
        "linear"
    );
    assert_says!(
        refusal(key("llama.attention.head_count_kv", 3u32)),
        "3 key/value heads"
    );
    let narrow = |file: &mut File| {
        key("llama.attention.key_length", 7u32)(file);
        key("llama.attention.value_length", 7u32)(file);
    };
    assert_says!(refusal(narrow), "attn_k.weight", "no heads of 7");
    let no_width = |file: &mut File| {
        without("llama.attention.key_length")(file);
        key("llama.attention.head_count", 5u32)(file);
    };
    assert_says!(refusal(no_width), "llama.attention.key_length");
}

#[test]
fn scaling_rules_that_are_not_known() {
    let rule = |kind: &'static str, factor: f32| {
        move |file: &mut File| {
            key("llama.rope.scaling.type", kind)(file);
            key("llama.rope.scaling.factor", factor)(file);
        }
    };
    assert_says!(refusal(rule("longrope", 2.0)), "longrope");
    assert_says!(refusal(rule("linear", -1.0)), "factor");
    let extrapolates = |file: &mut File| {
        rule("yarn", 2.0)(file);
        key("llama.rope.scaling.yarn_ext_factor", 0.5f32)(file);
    };
    assert_says!(refusal(extrapolates), "yarn_ext_factor");
}

#[test]
fn tensors_without_a_place_and_types_that_are_not_read() {
    let add = |name: &'static str| {
        move |file: &mut File| {
            let made = Made {
                shape: vec![40],
                ty: BlockType::F32,
                bytes: vec![0; 160],
            };
            file.tensors.insert(name.into(), made);
        }
    };
    for name in [
        "output.bias",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.attn_sinks.weight",
    ] {
        assert_says!(refusal(add(name)), name, "no place", "llama");
    }
    let gone = |file: &mut File| drop(file.tensors.remove("blk.1.ffn_down.weight"));
    assert_says!(refusal(gone), "model.layers.1.mlp.down_proj.weight");
}

#[test]
fn weights_that_are_not_finite_by_tensor_row_and_block() {
    // Rows of 32 values are one block of 34 bytes, whose first two are the scale.
    let scale = |name: &'static str, row: usize| {
        move |file: &mut File| {
            let bytes = &mut file.tensors.get_mut(name).unwrap().bytes;
            bytes[row * 34..][..2].copy_from_slice(&0x7C00u16.to_le_bytes());
        }
    };
    assert_says!(
        refusal(scale("blk.0.attn_v.weight", 3)),
        "blk.0.attn_v.weight",
        "row 3, block 0"
    );
    assert_says!(
        refusal(scale("blk.0.attn_q.weight", 5)),
        "blk.0.attn_q.weight",
        "row 5, block 0"
    );
    assert_says!(
        refusal(scale("token_embd.weight", 1)),
        "token_embd.weight",
        "row 1"
    );
    let norm = |file: &mut File| {
        let bytes = &mut file
            .tensors
            .get_mut("blk.0.attn_norm.weight")
            .unwrap()
            .bytes;
        bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    };
    assert_says!(refusal(norm), "input_layernorm.weight", "NaN");
}

#[test]
fn old_frequencies_of_the_rotation_are_passed_over() {
    let golden = Golden::all()
        .into_iter()
        .find(|(name, _)| name == "llama-gqa")
        .unwrap()
        .1;
    let mut file = File::of(&golden, Architecture::Llama, BlockType::F32);
    let made = Made {
        shape: vec![4],
        ty: BlockType::F32,
        bytes: vec![0; 16],
    };
    file.tensors
        .insert("blk.0.attn_rot_embd.weight".into(), made);
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = causal_lm::open(file.write(dir.path())).unwrap();
    Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
}

#[test]
fn a_file_that_is_not_there_or_no_gguf_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.gguf");
    assert_says!(causal_lm::open(&path).unwrap_err().to_string(), "none.gguf");
    std::fs::write(&path, "something else").unwrap();
    assert_says!(
        causal_lm::open(&path).unwrap_err().to_string(),
        "none.gguf",
        "not a GGUF file"
    );
}

#[test]
fn a_file_that_is_cut_off_anywhere_or_damaged_in_its_header_is_one_error_or_runs() {
    let golden = Golden::all();
    let (_, golden) = golden.iter().find(|(name, _)| name == "llama-gqa").unwrap();
    let file = File::of(golden, Architecture::Llama, BlockType::Q8_0);
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(file.write(dir.path())).unwrap();
    let open = |bytes: &[u8]| {
        let copy = bytes.to_vec();
        let (peak, opened, _) = measured(|| {
            let file = Gguf::from_bytes("damaged.gguf", copy)?;
            let checkpoint = causal_lm::gguf::from_file(file)?;
            let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
            decoder.packed(Execution::default()).block(0).map(drop)
        });
        // A name in memory is several times that in the file.
        let most = 8 * bytes.len() + 256 * 1024;
        assert!(peak < most, "{peak} bytes for a file of {}", bytes.len());
        opened
    };
    open(&whole).unwrap();
    // The last tensor need not be padded.
    let data = whole.len() - 32;
    let cuts = (0..64).chain((64..data).step_by(whole.len() / 150));
    for length in cuts {
        let error = open(&whole[..length]).unwrap_err().to_string();
        assert!(
            error.contains("damaged.gguf") && !error.contains('\n'),
            "{length}: {error}"
        );
    }
    // A linear congruential generator.
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for _ in 0..1500 {
        let mut bytes = whole.clone();
        for _ in 0..1 + random(3) {
            let at = random(4096.min(bytes.len()));
            bytes[at] = random(256) as u8;
        }
        if let Err(error) = open(&bytes) {
            let error = error.to_string();
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
