//! Caches that evict or quantise, in packed models and in windows that are decoded.

use candle_core::{DType, Device, Tensor};
use kv_lazy::policy::Budget;
use kv_lazy::{CacheConfig, CacheSet};
use serde_json::json;

use causal_lm::testing::{self, TestModel};
use causal_lm::{Decoder, Execution, Model, NoProgress, NoTap, Windows, run_blocks};

use crate::stored::{STORED, write_compressed};
use crate::{TOKENS, decoder, gap, wide};

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
