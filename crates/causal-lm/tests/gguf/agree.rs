//! A model gives the same from a GGUF file as from a folder.

use candle_core::{DType, Device};
use causal_lm::gguf::Architecture;
use causal_lm::{Decoder, Windows, testing};
use packed::BlockType;
use tensor_io::gguf::BlockLayout;
use tensor_io::{Checkpoint, CheckpointWriter, TensorSpec, WriteOptions};

use crate::common::{Golden, mean_nll};
use crate::made::{File, Widths};

fn golden(name: &str) -> Golden {
    let all = Golden::all();
    all.into_iter().find(|(found, _)| found == name).unwrap().1
}

fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    let decoder = Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap();
    testing::logits(&decoder, tokens)
}

#[test]
fn the_container_and_the_blocks_agree_on_every_type() {
    for ty in BlockType::ALL {
        let layout = BlockLayout::named(ty.name()).unwrap();
        assert_eq!(
            (layout.id, layout.name, layout.values, layout.bytes),
            (ty.id(), ty.name(), ty.block_len(), ty.block_bytes())
        );
    }
}

/// Models whose rotary embedding every architecture can store, with the architecture that is written and the model type that is
/// read back.
const MODELS: [(&str, Architecture, &str); 6] = [
    ("llama-gqa", Architecture::Llama, "llama"),
    ("llama-mha-tied", Architecture::Llama, "llama"),
    ("llama-bias-headdim16", Architecture::Llama, "llama"),
    ("qwen2", Architecture::Llama, "qwen2"),
    ("qwen2", Architecture::Qwen2, "qwen2"),
    ("qwen3", Architecture::Qwen3, "qwen3"),
];

#[test]
fn logits_of_f32_files_agree_with_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for (name, architecture, model_type) in MODELS {
        let golden = golden(name);
        let path = File::of(&golden, architecture, BlockType::F32).write(dir.path());
        let checkpoint = causal_lm::open(&path).unwrap();
        assert_eq!(checkpoint.config().str("model_type").unwrap(), model_type);
        let found = logits(&checkpoint, &golden.tokens());
        for (found, expected) in found.iter().zip(golden.logits().concat()) {
            assert!(
                (found - expected).abs() < 2e-5,
                "{name}: {found} is not {expected}"
            );
        }
    }
}

/// The folder that holds what the checkpoint decodes to.
fn to_folder(checkpoint: &Checkpoint, dir: &std::path::Path) -> Checkpoint {
    let spec = |name: &str| {
        let info = checkpoint.info(name).unwrap();
        TensorSpec::new(name, info.dtype, info.shape.clone())
    };
    let specs = checkpoint.names().map(spec).collect();
    let options = WriteOptions::default().with_overwrite(true);
    let mut writer = CheckpointWriter::create(dir, checkpoint.config(), specs, &options).unwrap();
    writer.carry_from(checkpoint).unwrap();
    for name in checkpoint.names() {
        writer.copy_tensor(name, checkpoint).unwrap();
    }
    Checkpoint::open(writer.finish().unwrap().dir).unwrap()
}

#[test]
fn every_type_gives_the_logits_of_its_decoded_weights_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for (name, architecture, _) in MODELS {
        let golden = golden(name);
        for ty in [
            BlockType::F16,
            BlockType::BF16,
            BlockType::Q4_0,
            BlockType::Q4_1,
            BlockType::Q5_0,
            BlockType::Q5_1,
            BlockType::Q8_0,
            BlockType::IQ4_NL,
        ] {
            let path = File::of(&golden, architecture, ty).write(dir.path());
            let file = causal_lm::open(&path).unwrap();
            let folder = to_folder(&file, &dir.path().join("folder"));
            let (a, b) = (
                logits(&file, &golden.tokens()),
                logits(&folder, &golden.tokens()),
            );
            assert_eq!(a, b, "{name} {ty}");
            // Errors of the types differ, but none is as large as the logits.
            let exact = golden.logits().concat();
            let distance: f32 = a.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum();
            let size: f32 = exact.iter().map(|x| x * x).sum();
            assert!(
                (distance / size).sqrt() < 0.35,
                "{name} {ty}: {}",
                (distance / size).sqrt()
            );
        }
    }
}

#[test]
fn the_k_types_run_in_a_wider_model() {
    let dir = tempfile::tempdir().unwrap();
    let golden = golden("llama-gqa");
    let widths = Widths {
        hidden: 256,
        head_dim: 64,
        heads: vec![4; 2],
        kv_heads: vec![2; 2],
        neurons: vec![256; 2],
    };
    for ty in [
        BlockType::Q2_K,
        BlockType::Q3_K,
        BlockType::Q4_K,
        BlockType::Q5_K,
        BlockType::Q6_K,
    ] {
        let path = File::with_widths(&golden, Architecture::Llama, ty, &widths).write(dir.path());
        let file = causal_lm::open(&path).unwrap();
        let folder = to_folder(&file, &dir.path().join("folder"));
        let found = logits(&file, &golden.tokens());
        assert_eq!(found, logits(&folder, &golden.tokens()), "{ty}");
        assert!(file.total_bytes() < folder.total_bytes() / 4, "{ty}");
    }
}

#[test]
fn layers_of_different_widths_and_without_a_half_run() {
    let dir = tempfile::tempdir().unwrap();
    let golden = golden("llama-gqa");
    let widths = Widths {
        hidden: 32,
        head_dim: 8,
        heads: vec![4, 0, 2],
        kv_heads: vec![2, 0, 1],
        neurons: vec![48, 32, 0],
    };
    let file = File::with_widths(&golden, Architecture::Deci, BlockType::Q8_0, &widths);
    let checkpoint = causal_lm::open(file.write(dir.path())).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let found: Vec<_> = decoder
        .config()
        .widths
        .iter()
        .map(|w| (w.heads, w.kv_heads, w.neurons))
        .collect();
    assert_eq!(found, [(4, 2, 48), (0, 0, 32), (2, 1, 0)]);
    let folder = to_folder(&checkpoint, &dir.path().join("folder"));
    assert_eq!(
        logits(&checkpoint, &golden.tokens()),
        logits(&folder, &golden.tokens())
    );
}

#[test]
fn perplexity_and_a_content_hash_work_as_for_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let golden = golden("llama-gqa");
    let file =
        causal_lm::open(File::of(&golden, Architecture::Llama, BlockType::F32).write(dir.path()))
            .unwrap();
    let decoder = Decoder::new(&file, DType::F32, &Device::Cpu).unwrap();
    let tokens = golden.tokens();
    let windows = Windows::cut(&tokens, tokens.len(), None).unwrap();
    assert!((mean_nll(&decoder, &windows) - golden.mean_nll()).abs() < 1e-5);
    let hash = file.content_hash().unwrap();
    let other = File::of(&golden, Architecture::Llama, BlockType::Q8_0).write(dir.path());
    assert_ne!(
        causal_lm::open(other).unwrap().content_hash().unwrap(),
        hash
    );
}

#[test]
fn factors_of_the_rotation_are_those_of_the_rule_that_they_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let golden = golden("llama3-rope");
    let config = causal_lm::ModelConfig::new(&golden.config()).unwrap();
    let theta = golden
        .config()
        .section("rope_parameters")
        .unwrap()
        .f64("rope_theta")
        .unwrap();
    let width = config.head_dim(0);
    let plain = |i: usize| theta.powf(-(2.0 * i as f64) / width as f64);
    let factors: Vec<f32> = (0..width / 2)
        .map(|i| (plain(i) / config.ropes[0].inv_freq[i]) as f32)
        .collect();
    let mut file = File::of(&golden, Architecture::Llama, BlockType::F32);
    let made = crate::made::Made {
        shape: vec![factors.len()],
        ty: BlockType::F32,
        bytes: factors.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    file.tensors.insert("rope_freqs.weight".into(), made);
    let checkpoint = causal_lm::open(file.write(dir.path())).unwrap();
    let found = logits(&checkpoint, &golden.tokens());
    for (found, expected) in found.iter().zip(golden.logits().concat()) {
        assert!((found - expected).abs() < 2e-5, "{found} is not {expected}");
    }
    file.set("rope.scaling.type", "linear".into());
    file.set("rope.scaling.factor", 2f32.into());
    let both = causal_lm::open(file.write(dir.path())).unwrap_err();
    assert!(both.to_string().contains("rope_freqs.weight"), "{both}");
}

#[test]
fn scaling_rules_among_the_metadata_are_those_of_the_config() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama-rope-linear-old", "llama-rope-yarn"] {
        let golden = golden(name);
        let raw = golden.config();
        let section = match raw.opt_section("rope_parameters").unwrap() {
            Some(section) => section,
            None => raw.section("rope_scaling").unwrap(),
        };
        let factor = section.f64("factor").unwrap();
        let mut file = File::of(&golden, Architecture::Llama, BlockType::F32);
        let kind = if name.contains("yarn") {
            "yarn"
        } else {
            "linear"
        };
        file.set("rope.scaling.type", kind.into());
        file.set("rope.scaling.factor", (factor as f32).into());
        if let Some(original) = section
            .opt_usize("original_max_position_embeddings")
            .unwrap()
        {
            file.set(
                "rope.scaling.original_context_length",
                (original as u32).into(),
            );
        }
        for beta in ["beta_fast", "beta_slow"] {
            if let Some(value) = section.opt_f64(beta).unwrap() {
                file.set(&format!("rope.scaling.yarn_{beta}"), (value as f32).into());
            }
        }
        if let Some(attention) = section.opt_f64("attention_factor").unwrap() {
            let ours = attention / (1.0 + 0.1 * factor.ln());
            file.set("rope.scaling.attn_factor", (ours as f32).into());
        }
        let checkpoint = causal_lm::open(file.write(dir.path())).unwrap();
        let found = logits(&checkpoint, &golden.tokens());
        for (found, expected) in found.iter().zip(golden.logits().concat()) {
            assert!(
                (found - expected).abs() < 2e-5,
                "{name}: {found} is not {expected}"
            );
        }
    }
}
