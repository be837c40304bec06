//! Models that run from packed weights, beside the same weights as tensors.

mod adapters;
mod caches;
mod groups;
mod stored;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use packed::{Kind, Team};
use serde_json::json;
use tensor_io::{Checkpoint, Config};

use causal_lm::testing::{self, TestModel};
use causal_lm::{
    Arithmetic, Decoder, DenseReason, Error, Execution, LinearName, Model, NoProgress, NoTap,
    WeightSummary, Windows, open_adapted, run_blocks,
};

use adapters::write_adapter;
use groups::with_scale;
use stored::{STORED, Stored, write_compressed};

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

fn wide() -> Config {
    let changes = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16,
    });
    testing::config("llama", changes)
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
