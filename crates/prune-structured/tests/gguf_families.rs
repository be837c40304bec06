//! GGUF files of every architecture: what comes back is the model that went in, and what the format cannot say is refused.

use candle_core::{DType, Device};
use causal_lm::testing::{self, TestModel, gap, write_byte_tokenizer};
use causal_lm::{Decoder, ModelConfig};
use prune_structured::experts::{
    ExpertOptions, ExpertSettings, Keep, method, plan as expert_plan, write as write_experts,
};
use prune_structured::gguf::{self, Precision};
use prune_structured::{Error, NoProgress};
use serde_json::{Value, json};
use std::path::Path;
use tensor_io::gguf::{Gguf, Metadata, Value as GgufValue};
use tensor_io::{Checkpoint, Config};

const DENSE: &str = include_str!("golden/families.json");
const MIXTURES: &str = include_str!("golden/experts.json");

/// Name and config of every model.
fn configs() -> Vec<(String, Config)> {
    let all: Vec<Value> = [DENSE, MIXTURES]
        .into_iter()
        .flat_map(|text| serde_json::from_str::<Vec<Value>>(text).unwrap())
        .collect();
    all.into_iter()
        .map(|model| {
            let name = model["name"].as_str().or(model["model"].as_str()).unwrap();
            let config = Config::new(model["config"].as_object().unwrap().clone());
            (name.into(), config)
        })
        .collect()
}

fn config(name: &str, changes: Value) -> Config {
    let (_, mut config) = configs()
        .into_iter()
        .find(|(found, _)| found == name)
        .unwrap_or_else(|| panic!("no {name}"));
    for (field, value) in changes.as_object().unwrap() {
        config.set(field, value.clone());
    }
    config
}

/// A model with the weights of golden files and a tokenizer.
fn model(config: &Config) -> TestModel {
    let model = TestModel::golden(config);
    write_byte_tokenizer(model.dir(), ModelConfig::new(config).unwrap().vocab);
    model
}

fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

fn logits(decoder: &Decoder<'_>) -> Vec<f32> {
    let tokens: Vec<u32> = (0..12).map(|i| i * 7 % 40).collect();
    testing::logits(decoder, &tokens)
}

fn export(model: &TestModel, precision: Precision, dst: &Path) -> Result<(), Box<Error>> {
    let exported = gguf::export(&model.decoder(), precision, dst, &NoProgress);
    exported.map(drop).map_err(Box::new)
}

/// What is said of a model that cannot be exported.
fn refusal(config: &Config) -> String {
    let model = model(config);
    let dst = model.path("never.gguf");
    let error = export(&model, Precision::F32, &dst).unwrap_err();
    assert!(matches!(*error, Error::Export { .. }), "{error}");
    assert!(!dst.exists());
    error.to_string()
}

/// Scaled full layers of Gemma 4.
fn gemma4_rotation(rule: &str, partial: f64) -> Value {
    json!({"rope_parameters": {
        "full_attention": {"rope_type": rule, "rope_theta": 1e6, "partial_rotary_factor": partial, "factor": 2.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }})
}

/// Models that the format holds, with what differs from the golden one, and the architecture.
fn exported() -> Vec<(&'static str, Value, &'static str)> {
    vec![
        ("gemma2", json!({}), "gemma2"),
        ("gemma3", json!({}), "gemma3"),
        ("gemma3_text", json!({}), "gemma3"),
        (
            "gemma3_text",
            json!({"final_logit_softcapping": 20.0}),
            "gemma3",
        ),
        (
            "gemma3_text",
            json!({"layer_types": vec!["full_attention"; 4]}),
            "gemma3",
        ),
        ("gemma4_text", json!({}), "gemma4"),
        (
            "gemma4_text",
            json!({"final_logit_softcapping": null}),
            "gemma4",
        ),
        ("gemma4_text", gemma4_rotation("linear", 1.0), "gemma4"),
        (
            "gemma4_text",
            gemma4_rotation("proportional", 0.25),
            "gemma4",
        ),
        ("glm4", json!({}), "glm4"),
        ("gpt_neox-sequential", json!({}), "gptneox"),
        ("gpt_neox", json!({}), "gptneox"),
        ("granite", json!({}), "granite"),
        ("granitemoehybrid-dense", json!({}), "granite"),
        (
            "granitemoehybrid-dense",
            json!({"position_embedding_type": "nope"}),
            "granite",
        ),
        ("ministral3", json!({}), "mistral3"),
        ("olmo2", json!({}), "olmo2"),
        ("olmo3", json!({}), "olmo2"),
        ("phi3-longrope", json!({}), "phi3"),
        ("phi3-shortrope", json!({}), "phi3"),
        // Nothing but a factor on attention.
        (
            "phi3-longrope",
            json!({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.0, 1.0], "long_factor": [1.0, 1.0, 1.0], "original_max_position_embeddings": 8}}),
            "phi3",
        ),
        ("phi3-window4", json!({"sliding_window": null}), "phi3"),
        (
            "smollm3",
            json!({"no_rope_layers": [1, 1, 1, 0]}),
            "smollm3",
        ),
        ("granitemoe", json!({}), "granitemoe"),
        ("mixtral", json!({}), "llama"),
        (
            "mixtral-top1-window4",
            json!({"sliding_window": null}),
            "llama",
        ),
        ("olmoe", json!({}), "olmoe"),
        ("qwen2_moe", json!({}), "qwen2moe"),
        ("qwen2_moe", json!({"qkv_bias": false}), "qwen2moe"),
        ("qwen3_moe", json!({}), "qwen3moe"),
        (
            "qwen3_moe",
            json!({"tie_word_embeddings": true}),
            "qwen3moe",
        ),
    ]
}

#[test]
fn a_file_gives_the_logits_of_the_model_that_it_was_made_from() {
    for (name, changes, architecture) in exported() {
        let case = format!("{name} {changes}");
        let model = model(&config(name, changes));
        let file = model.path("model.gguf");
        export(&model, Precision::F32, &file).unwrap_or_else(|error| panic!("{case}: {error}"));
        let metadata = Gguf::open(&file).unwrap();
        let found = metadata
            .metadata()
            .required("general.architecture", Metadata::get_str);
        assert_eq!(found.unwrap(), architecture, "{case}");
        let checkpoint = causal_lm::open(&file).unwrap_or_else(|error| panic!("{case}: {error}"));
        let expected = logits(&model.decoder());
        let largest = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
        let near = gap(&logits(&decoder(&checkpoint)), &expected);
        assert!(near <= 2e-6 * largest.max(1.0), "{case}: {near}");
    }
}

#[test]
fn a_file_that_is_opened_and_exported_again_keeps_its_blocks() {
    for (name, changes, _) in exported() {
        let case = format!("{name} {changes}");
        let model = model(&config(name, changes));
        for precision in [Precision::F32, Precision::Q8_0, Precision::ALL[7]] {
            let [first, second] = ["first.gguf", "second.gguf"].map(|file| model.path(file));
            export(&model, precision, &first).unwrap();
            let opened = causal_lm::open(&first).unwrap();
            gguf::export(&decoder(&opened), precision, &second, &NoProgress)
                .unwrap_or_else(|error| panic!("{case}: {error}"));
            let [a, b] = [&first, &second].map(|path| Gguf::open(path).unwrap());
            for info in a.tensors() {
                // Norms lose a bit when the 1 is taken from them and added again.
                let same = a.bytes(&info.name).unwrap() == b.bytes(&info.name).unwrap();
                let norm = info.name.contains("norm") && name.starts_with("gemma");
                assert!(same || norm, "{case} {} {}", precision.name(), info.name);
            }
            assert_eq!(a.tensors().len(), b.tensors().len(), "{case}");
            for key in a.metadata().keys().filter(|key| *key != "general.name") {
                let [a, b] = [&a, &b].map(|file| file.metadata().get(key).unwrap());
                assert_eq!(a, b, "{case} {} {key}", precision.name());
            }
        }
    }
}

#[test]
fn packed_experts_give_what_their_decoded_weights_give() {
    for name in ["mixtral", "qwen2_moe", "granitemoe"] {
        // Rows of whole blocks.
        let changes = json!({"moe_intermediate_size": 32, "intermediate_size": 32});
        let model = model(&config(name, changes));
        let file = model.path("model.gguf");
        export(&model, Precision::Q8_0, &file).unwrap();
        let checkpoint = causal_lm::open(&file).unwrap();
        let decoded = logits(&decoder(&checkpoint));
        let arithmetic = causal_lm::Arithmetic::F32;
        let packed = decoder(&checkpoint).packed(causal_lm::Execution::new(arithmetic));
        assert!(packed.expert(0, 1).unwrap().down.kind().is_some(), "{name}");
        let near = gap(&logits(&packed), &decoded);
        assert!(near < 1e-4, "{name}: {near}");
        assert!(gap(&decoded, &logits(&model.decoder())) < 0.5, "{name}");
    }
}

#[test]
fn the_default_base_of_an_architecture_is_stated() {
    for (name, base) in [("mixtral", 1e6), ("olmo3", 5e5), ("smollm3", 2e6)] {
        let mut config = config(name, json!({"no_rope_layers": [1, 1, 1, 0]}));
        config.remove("rope_parameters");
        let model = model(&config);
        let file = model.path("model.gguf");
        export(&model, Precision::F32, &file).unwrap();
        let gguf = Gguf::open(&file).unwrap();
        let keys: Vec<&str> = gguf.metadata().keys().collect();
        let key = keys.iter().find(|key| key.ends_with("rope.freq_base"));
        let found = gguf.metadata().get_f64(key.unwrap()).unwrap();
        assert_eq!(found, Some(base), "{name}");
        let near = gap(
            &logits(&decoder(&causal_lm::open(&file).unwrap())),
            &logits(&model.decoder()),
        );
        assert!(near < 1e-5, "{name}: {near}");
    }
}

#[test]
fn what_llama_cpps_graphs_do_otherwise_is_refused() {
    for (name, changes, said) in [
        (
            "qwen2_moe",
            json!({"norm_topk_prob": true}),
            "norm_topk_prob",
        ),
        ("olmoe", json!({"norm_topk_prob": true}), "norm_topk_prob"),
        (
            "qwen3_moe",
            json!({"norm_topk_prob": false}),
            "norm_topk_prob",
        ),
        ("olmoe", json!({"clip_qkv": 0.4}), "clip_qkv"),
        (
            "olmoe",
            json!({"num_key_value_heads": 2}),
            "2 key/value heads",
        ),
        ("olmoe", json!({"head_dim": 4}), "channels"),
        ("qwen2_moe", json!({"head_dim": 4}), "channels"),
        ("mixtral-top1-window4", json!({}), "window of 4"),
        ("qwen3_moe", json!({"mlp_only_layers": [1]}), "dense layers"),
        (
            "qwen2_moe",
            json!({"decoder_sparse_step": 2}),
            "dense layers",
        ),
        ("qwen3_moe", json!({"attention_bias": true}), "bias"),
        ("smollm3", json!({}), "every fourth"),
        ("gemma2", json!({"tie_word_embeddings": false}), "embedding"),
        ("gemma2", json!({"final_logit_softcapping": null}), "cap"),
        (
            "gemma2",
            json!({"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]}),
            "order",
        ),
        (
            "gemma4_text",
            json!({"layer_types": vec!["full_attention"; 4], "per_layer_config": {}}),
            "sliding layer",
        ),
        ("gemma3_text", json!({"attention_bias": true}), "bias"),
        (
            "gemma3_text",
            json!({"hidden_activation": "gelu"}),
            "activation",
        ),
        (
            "phi3-window4",
            json!({"sliding_window": null, "head_dim": 4}),
            "channels",
        ),
        (
            "granite",
            json!({"rope_parameters": null, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
            "scaled rotation",
        ),
        (
            "ministral3",
            json!({"sliding_window": null, "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "truncate": false,
                "original_max_position_embeddings": 4, "rope_theta": 1e6}}),
            "YaRN",
        ),
    ] {
        let found = refusal(&config(name, changes.clone()));
        assert!(found.contains(said), "{name} {changes}: {found}");
    }
}

#[test]
fn experts_that_differ_by_layer_are_refused_and_equal_ones_exported() {
    let model = model(&config("mixtral", json!({})));
    let tokens: Vec<u32> = (0..64).map(|i| i * 11 % 40).collect();
    let windows = causal_lm::Windows::cut(&tokens, 16, None).unwrap();
    let options = ExpertOptions::new(method::Reap, Keep::Experts(3));
    let decoder_of_all = model.decoder();
    let found = expert_plan(&decoder_of_all, &windows, &options, &NoProgress).unwrap();
    for (name, equal) in [("equal", true), ("other", false)] {
        let mut plan = found.plan.clone();
        if !equal {
            let last = plan.layers[2].as_mut().unwrap();
            last.kept.pop();
            last.members.pop();
            last.factors.pop();
            last.neurons.pop();
        }
        let folder = model.path(name);
        let settings = ExpertSettings::default();
        write_experts(&decoder_of_all, &plan, &folder, &settings, &NoProgress).unwrap();
        write_byte_tokenizer(&folder, 40);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let smaller = decoder(&checkpoint);
        let file = model.path("smaller.gguf");
        let exported = gguf::export(&smaller, Precision::F32, &file, &NoProgress);
        match (equal, exported) {
            (true, Ok(_)) => {
                let again = causal_lm::open(&file).unwrap();
                let reopened = decoder(&again);
                assert_eq!(reopened.config().mixtures[0].unwrap().experts, 3);
                assert!(gap(&logits(&reopened), &logits(&smaller)) < 1e-5);
            }
            (false, Err(error)) => {
                let error = error.to_string();
                assert!(
                    error.contains("3 experts") && error.contains("layer 2"),
                    "{error}"
                );
            }
            (_, found) => panic!("{name}: {found:?}"),
        }
    }
}

/// Writes `whole` again with other metadata and without some tensors.
fn rewritten(
    whole: &Gguf,
    path: &Path,
    change: impl Fn(&str, GgufValue) -> Option<GgufValue>,
    keep: impl Fn(&str) -> bool,
) {
    let of_key = |key: &str| {
        let value = whole.metadata().get(key).unwrap().unwrap();
        Some((key.to_string(), change(key, value)?))
    };
    let metadata: Vec<_> = whole.metadata().keys().filter_map(of_key).collect();
    let kept = whole.tensors().iter().filter(|info| keep(&info.name));
    let specs: Vec<_> = kept
        .map(|info| tensor_io::gguf::TensorSpec::new(&info.name, info.layout, info.shape.clone()))
        .collect();
    let mut writer = tensor_io::gguf::Writer::create(path, &metadata, &specs).unwrap();
    for spec in &specs {
        let bytes = whole.bytes(&spec.name).unwrap();
        writer.write(&spec.name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn gemma_4_states_that_it_has_no_cap_because_readers_cap_logits_where_the_key_is_absent() {
    let model = model(&config(
        "gemma4_text",
        json!({"final_logit_softcapping": null}),
    ));
    let file = model.path("model.gguf");
    export(&model, Precision::F32, &file).unwrap();
    let whole = Gguf::open(&file).unwrap();
    let key = "gemma4.final_logit_softcapping";
    assert_eq!(whole.metadata().get_f64(key).unwrap(), Some(0.0));
    let without = model.path("without.gguf");
    let change = |found: &str, value| (found != key).then_some(value);
    rewritten(&whole, &without, change, |_| true);
    for (file, cap) in [(&file, None), (&without, Some(30.0))] {
        let checkpoint = causal_lm::open(file).unwrap();
        assert_eq!(decoder(&checkpoint).config().logit_softcap, cap);
    }
}

#[test]
fn what_cannot_be_exported_is_found_before_the_work() {
    let rotation = json!({"rope_parameters": null, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}});
    for (changes, said) in [
        (rotation, "scaled rotation"),
        (json!({"logits_scaling": 2.0}), ""),
    ] {
        let model = model(&config("granite", changes));
        let decoder = model.decoder();
        match gguf::check(&decoder, &decoder.config().widths) {
            Err(error) => assert!(
                !said.is_empty() && error.to_string().contains(said),
                "{error}"
            ),
            Ok(()) => assert!(said.is_empty()),
        }
    }
}

#[test]
fn files_of_mixtures_that_contradict_themselves_are_refused() {
    let model = model(&config("mixtral", json!({})));
    let file = model.path("model.gguf");
    export(&model, Precision::F32, &file).unwrap();
    let whole = Gguf::open(&file).unwrap();
    let said = |change: &dyn Fn(&str) -> Option<GgufValue>, keep: &dyn Fn(&str) -> bool| {
        let path = model.path("changed.gguf");
        let change = |key: &str, value| change(key).or(Some(value));
        rewritten(&whole, &path, change, keep);
        let opened = causal_lm::open(&path)
            .and_then(|checkpoint| Decoder::new(&checkpoint, DType::F32, &Device::Cpu).map(drop));
        opened.unwrap_err().to_string()
    };
    let all = |_: &str| true;
    let set =
        |wanted: &'static str, value: u32| move |key: &str| (key == wanted).then(|| value.into());
    for (error, expected) in [
        (said(&set("llama.expert_count", 5), &all), "ffn_gate_exps"),
        (
            said(&set("llama.expert_used_count", 9), &all),
            "num_experts_per_tok",
        ),
        (
            said(&|_| None, &|name| !name.contains("blk.1.ffn_up_exps")),
            "model.layers.1.block_sparse_moe.experts.0.w3.weight",
        ),
        (
            said(&|_| None, &|name| !name.contains("blk.0.ffn_gate_inp")),
            "blk.0.ffn_gate_inp.weight",
        ),
        (
            said(&set("llama.feed_forward_length", 24), &all),
            "ffn_gate_exps",
        ),
    ] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
