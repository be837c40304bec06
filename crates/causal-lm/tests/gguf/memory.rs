//! What loading takes, counted by the allocator.

use candle_core::{DType, Device};
use causal_lm::gguf::Architecture;
use causal_lm::{Decoder, Execution, Kind, LinearName};
use packed::BlockType;
use serde_json::json;
use tensor_io::Checkpoint;

use crate::allocator::measured;
use crate::random_gguf::{self, RandomGguf};

fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn an_expert_is_read_without_the_others_of_its_stack() {
    const EXPERTS: usize = 16;
    let config = json!({
        "model_type": "granitemoe", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "tie_word_embeddings": true,
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for ty in [BlockType::Q8_0, BlockType::F16] {
        RandomGguf::new(config.clone(), Architecture::GraniteMoe, ty).write(&path);
        let checkpoint = causal_lm::open(&path).unwrap();
        let weights = 3 * 128 * 128;
        for (decoder, bytes_of_weight) in [
            (decoder(&checkpoint).packed(Execution::default()), 2),
            (decoder(&checkpoint), 4),
        ] {
            for expert in [0, 7, EXPERTS - 1] {
                let (peak, loaded, _) = measured(|| decoder.expert(0, expert).unwrap());
                // The expert and what one of its matrices is made from.
                let most = 3 * bytes_of_weight * weights + 64 * 1024;
                assert!(peak < most, "{ty} {expert}: {peak} of {most}");
                let whole = decoder.block(0).unwrap().experts.unwrap();
                let rows = |mlp: &causal_lm::block::Mlp| -> Vec<f32> {
                    let weights = [mlp.gate.as_ref().unwrap(), &mlp.up, &mlp.down];
                    let values = weights.map(|linear| linear.weight().unwrap());
                    let values = values.map(|w| w.flatten_all().unwrap().to_vec1().unwrap());
                    values.concat()
                };
                assert_eq!(rows(&loaded), rows(&whole.experts[expert]));
            }
        }
    }
}

#[test]
fn floats_of_16_bits_stay_part_of_the_mapped_file_where_they_are_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for ty in [BlockType::BF16, BlockType::F16] {
        random_gguf::llama([256, 512, 1, 4, 2, 64], ty).write(&path);
        let checkpoint = causal_lm::open(&path).unwrap();
        let packed = decoder(&checkpoint).packed(Execution::default());
        let (_, block, held) = measured(|| packed.block(0).unwrap());
        for linear in [LinearName::Q, LinearName::V, LinearName::Down] {
            let kind = block.linear(linear).unwrap().kind();
            assert_eq!(kind, Some(Kind::Dense(ty)));
        }
        // Rows of q and k are in another order than in the file; norms are tensors.
        let reordered = 2 * (256 + 128) * 256;
        let all = reordered + 2 * (256 + 128) * 256 + 2 * 3 * 256 * 512;
        let norms = 2 * 4 * 256;
        assert!(held < reordered + norms + 16 * 1024, "{ty}: {held}");
        assert_eq!(block.bytes(), all + norms);
        let decoded = decoder(&checkpoint);
        for linear in LinearName::ALL {
            let values = |decoder: &Decoder<'_>| -> Vec<f32> {
                let weight = decoder.weight(0, linear).unwrap().unwrap();
                weight.flatten_all().unwrap().to_vec1().unwrap()
            };
            assert_eq!(values(&packed), values(&decoded), "{linear}");
        }
    }
}
