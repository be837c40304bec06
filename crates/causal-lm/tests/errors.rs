//! Bad checkpoints, configs and inputs: each an error that says what and where, never a panic.

use candle_core::{DType, Device, Tensor};
use causal_lm::{
    Decoder, Error, Hidden, Model, NoProgress, NoTap, TextTokenizer, Windows, run_blocks, synthetic,
};
use serde_json::{Value, json};
use std::path::PathBuf;
use tensor_io::{Checkpoint, Config, WriteOptions};

fn base() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10, "max_position_embeddings": 32,
    })
}

fn config(changes: Value) -> Config {
    let mut fields = base().as_object().unwrap().clone();
    fields.extend(changes.as_object().unwrap().clone());
    Config::new(fields)
}

/// A random model of `base`, its tensors changed by `change`, then its config by `changes`.
fn folder(changes: Value, change: impl Fn(&str, Tensor) -> Tensor) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let mut random = synthetic::random(2);
    let make = |name: &str, shape: &[usize]| Ok(change(name, random(name, shape)?));
    synthetic::write(
        &config(json!({})),
        DType::F32,
        &model,
        &WriteOptions::default(),
        make,
    )
    .unwrap();
    let text = serde_json::to_string(config(changes).raw()).unwrap();
    std::fs::write(model.join("config.json"), text).unwrap();
    (dir, model)
}

/// What opening a model with this config reports.
fn opening(changes: Value) -> Error {
    let (_dir, model) = folder(changes, |_, tensor| tensor);
    let checkpoint = Checkpoint::open(model).unwrap();
    Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap_err()
}

#[test]
fn unsupported_types_and_options_are_named() {
    assert!(
        matches!(opening(json!({"model_type": "gpt2"})), Error::UnsupportedModel { found } if found == "gpt2")
    );
    for (changes, field) in [
        (json!({"hidden_act": "relu"}), "hidden_act"),
        (
            json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
            "rope_type",
        ),
        (
            json!({"use_bidirectional_attention": true}),
            "use_bidirectional_attention",
        ),
        (
            json!({"use_bidirectional_attention": "all"}),
            "use_bidirectional_attention",
        ),
        (
            json!({"quantization_config": {"quant_method": "fp8"}}),
            "quantization_config.quant_method",
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
    ] {
        match opening(changes) {
            Error::UnsupportedOption { field: found, .. } => assert_eq!(found, field),
            other => panic!("{field}: {other}"),
        }
    }
}

#[test]
fn configs_that_cannot_be_a_model_are_refused() {
    for changes in [
        json!({"num_key_value_heads": 3}),
        json!({"head_dim": 5}),
        json!({"hidden_size": 0}),
        json!({"rope_theta": 0.5}),
        json!({"rms_norm_eps": -1.0}),
        json!({"rope_scaling": {"rope_type": "linear"}}),
        json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1,
            "original_max_position_embeddings": 16}}),
        json!({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}),
        json!({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 0.0}}),
        json!({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
        json!({"eos_token_id": ["end"]}),
        // One above what a token id can be: not token 0.
        json!({"eos_token_id": 1u64 << 32}),
        json!({"eos_token_id": [2, 1u64 << 32]}),
        json!({"bos_token_id": 1u64 << 32}),
        json!({"per_layer_widths": {"num_attention_heads": [4], "num_key_value_heads": [2], "intermediate_size": [24]}}),
    ] {
        let error = opening(changes.clone());
        assert!(
            matches!(error, Error::InvalidConfig { .. }),
            "{changes}: {error}"
        );
    }
    let missing = Config::new(
        base()
            .as_object()
            .unwrap()
            .iter()
            .filter(|(k, _)| *k != "vocab_size")
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect(),
    );
    let error = causal_lm::ModelConfig::new(&missing).unwrap_err();
    assert!(error.to_string().contains("vocab_size"), "{error}");
}

#[test]
fn tensors_that_contradict_the_config_are_named_with_both_shapes() {
    match opening(json!({"intermediate_size": 20})) {
        Error::Shape {
            tensor,
            found,
            expected,
        } => {
            assert_eq!(tensor, "model.layers.0.mlp.gate_proj.weight");
            assert_eq!((found, expected), (vec![24, 16], vec![20, 16]));
        }
        other => panic!("{other}"),
    }
    let missing = opening(json!({"num_hidden_layers": 3}));
    assert!(missing.to_string().contains("model.layers.2."), "{missing}");
    match opening(json!({"num_hidden_layers": 1})) {
        Error::UnexpectedTensor { tensor, model_type } => {
            assert!(tensor.starts_with("model.layers.1."), "{tensor}");
            assert_eq!(model_type, "llama");
        }
        other => panic!("{other}"),
    }
    let bias = opening(json!({"attention_bias": true}));
    assert!(bias.to_string().contains("q_proj.bias"), "{bias}");
}

#[test]
fn weights_that_are_not_finite_are_found_where_they_are() {
    let (_dir, model) = folder(json!({}), |_, tensor| tensor);
    let file = model.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    // The last tensor of the file is the head: its last entry.
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    let checkpoint = Checkpoint::open(model).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let error = decoder.head().unwrap_err();
    assert!(
        matches!(error, Error::Checkpoint(tensor_io::Error::NonFinite { .. })),
        "{error}"
    );
    assert!(error.to_string().contains("lm_head.weight"), "{error}");
}

#[test]
fn activations_that_overflow_are_found_with_layer_window_and_position() {
    // Neuron outputs of the second layer are multiplied beyond f32 for one token only.
    let (_dir, model) = folder(json!({}), |name, tensor| match name {
        "model.layers.1.mlp.down_proj.weight" => {
            (tensor * 3e38).unwrap().clamp(-3e38, 3e38).unwrap()
        }
        _ => tensor,
    });
    let checkpoint = Checkpoint::open(model).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let windows = Windows::cut(&[1, 2, 3, 4, 5, 6, 7, 8], 4, None).unwrap();
    match run_blocks(&decoder, &windows, &mut NoTap, &NoProgress).unwrap_err() {
        Error::NonFinite { stage, window, .. } => {
            assert_eq!(stage, "layer 1");
            assert!(window < 2);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn tokens_and_steps_out_of_range_are_refused() {
    let (_dir, model) = folder(json!({}), |_, tensor| tensor);
    let checkpoint = Checkpoint::open(model).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let windows = Windows::cut(&[1, 2, 3, 99], 4, None).unwrap();
    assert!(matches!(
        Hidden::embed(&decoder, &windows),
        Err(Error::TokenOutOfRange {
            token: 99,
            vocab: 10
        })
    ));
    let model = Model::load(&decoder).unwrap();
    let mut cache = model.full_cache(2).unwrap();
    assert!(matches!(
        model.forward(&[&[1], &[1, 2]], &mut cache),
        Err(Error::Windows(_))
    ));
    assert!(matches!(
        model.forward(&[], &mut cache),
        Err(Error::Windows(_))
    ));
}

#[test]
fn a_tap_can_stop_a_run_and_its_error_names_the_layer() {
    struct Refuse;
    impl causal_lm::Tap for Refuse {
        fn observe(
            &mut self,
            layer: usize,
            site: causal_lm::Site,
            _: &Tensor,
        ) -> causal_lm::TapResult {
            match (layer, site) {
                (1, causal_lm::Site::Down) => Err("enough".into()),
                _ => Ok(()),
            }
        }
    }
    let (_dir, model) = folder(json!({}), |_, tensor| tensor);
    let checkpoint = Checkpoint::open(model).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let windows = Windows::cut(&[1, 2, 3, 4], 4, None).unwrap();
    let error = causal_lm::run_blocks(&decoder, &windows, &mut Refuse, &NoProgress).unwrap_err();
    assert_eq!(error.to_string(), "layer 1: enough");
    causal_lm::run_blocks(&decoder, &windows, &mut NoTap, &NoProgress).unwrap();
}

#[test]
fn tokenizer_and_text_files_are_named_when_they_cannot_be_used() {
    let (dir, model) = folder(json!({}), |_, tensor| tensor);
    let error = TextTokenizer::open(&model).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(
        model.join("tokenizer_config.json"),
        r#"{"bos_token": {"content": "<s>"}}"#,
    )
    .unwrap();
    let error = TextTokenizer::open(&model).unwrap_err();
    assert!(error.to_string().contains("<s>"), "{error}");
    std::fs::write(
        model.join("tokenizer_config.json"),
        r#"{"bos_token": {"content": "b"}}"#,
    )
    .unwrap();
    let tokenizer = TextTokenizer::open(&model).unwrap();
    assert_eq!(tokenizer.bos(), Some(1));
    let text = dir.path().join("text.txt");
    assert!(matches!(
        tokenizer.encode_file(&text),
        Err(Error::Text { .. })
    ));
    std::fs::write(&text, "").unwrap();
    assert!(matches!(
        tokenizer.encode_file(&text),
        Err(Error::Text { .. })
    ));
    std::fs::write(&text, [0xff, 0xfe]).unwrap();
    assert!(matches!(
        tokenizer.encode_file(&text),
        Err(Error::Text { .. })
    ));
    std::fs::write(&text, "\u{feff}a\r\nb").unwrap();
    assert_eq!(tokenizer.encode_file(&text).unwrap(), [0, 1]);
    assert_eq!(causal_lm::read_text(&text).unwrap(), "a\nb");
}

#[test]
fn bos_is_what_the_first_file_names_or_what_the_tokenizer_puts_in_front() {
    let (_dir, model) = folder(json!({}), |_, tensor| tensor);
    let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let write = |single: Value| {
        let ids = |token: &str, id: u32| json!({"id": token, "ids": [id], "tokens": [token]});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": null,
            "post_processor": {
                "type": "TemplateProcessing", "single": single, "pair": [text, text],
                "special_tokens": {"<s>": ids("<s>", 1), "</s>": ids("</s>", 2)},
            },
            "model": {"type": "WordLevel", "vocab": {"a": 0, "<s>": 1, "</s>": 2}, "unk_token": "a"},
        });
        std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    };
    let bos = || TextTokenizer::open(&model).unwrap().bos();
    write(json!([special("<s>"), text, special("</s>")]));
    assert_eq!(bos(), Some(1), "the template alone");
    write(json!([text, special("</s>")]));
    assert_eq!(bos(), None, "a template that only ends texts");
    let name = |file: &str, names: Value| {
        std::fs::write(model.join(file), names.to_string()).unwrap();
    };
    name("special_tokens_map.json", json!({"bos_token": "<s>"}));
    assert_eq!(bos(), Some(1), "the map alone");
    name("tokenizer_config.json", json!({"model_max_length": 32}));
    assert_eq!(bos(), Some(1), "a config that does not say");
    name("tokenizer_config.json", json!({"bos_token": null}));
    assert_eq!(bos(), None, "a config that says there is none");
    name(
        "tokenizer_config.json",
        json!({"bos_token": {"content": "a"}}),
    );
    assert_eq!(bos(), Some(0), "the config first");
    // A byte-order mark in front of a chat template is no text.
    std::fs::write(model.join("chat_template.jinja"), "\u{feff}{{ a }}").unwrap();
    let tokenizer = TextTokenizer::open(&model).unwrap();
    assert_eq!(tokenizer.chat_template(), Some("{{ a }}"));
}

#[test]
fn sizes_that_no_model_has_are_refused_before_anything_is_allocated() {
    for (field, value) in [
        ("num_hidden_layers", 1_000_000_000u64),
        ("num_hidden_layers", 1 << 63),
        ("head_dim", 1 << 30),
        ("head_dim", 1 << 62),
        ("num_attention_heads", 1 << 61),
        ("num_key_value_heads", 1 << 61),
        ("hidden_size", 1 << 40),
        ("intermediate_size", 1 << 63),
        ("vocab_size", u64::MAX),
    ] {
        let error = opening(json!({field: value})).to_string();
        assert!(error.contains(field), "{field} {value}: {error}");
    }
}

#[test]
fn blocks_and_experts_beyond_the_tensors_of_a_checkpoint_are_refused_before_they_are_named() {
    let error = opening(json!({"num_hidden_layers": 60_000})).to_string();
    for part in ["num_hidden_layers", "60000", "tensors"] {
        assert!(error.contains(part), "{error}");
    }
    let mixture = |experts: u64| {
        let changes = json!({"model_type": "mixtral", "num_local_experts": experts});
        opening(changes).to_string()
    };
    let error = mixture(1 << 40);
    assert!(
        error.contains("num_local_experts") && error.contains("at most"),
        "{error}"
    );
    let error = mixture(4096);
    assert!(
        error.contains("num_experts") && error.contains("8192 in all"),
        "{error}"
    );
    let wide = json!({"num_attention_heads": [4, 4], "num_key_value_heads": [2, 2],
        "intermediate_size": [24, 24], "num_experts": [2, 1u64 << 40], "expert_size": [24, 24]});
    let changes = json!({"model_type": "mixtral", "per_layer_widths": wide});
    let error = opening(changes).to_string();
    assert!(
        error.contains("per_layer_widths") && error.contains("at most"),
        "{error}"
    );
}

#[test]
fn an_embedding_and_a_head_take_another_matrix_of_their_shape_alone() {
    let (_dir, model) = folder(json!({}), |_, tensor| tensor);
    let checkpoint = Checkpoint::open(model).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let tokens: [&[u32]; 1] = [&[3, 9, 0]];
    let stored = decoder.embed(&tokens).unwrap();
    let table = checkpoint.tensor_as(
        &decoder.config().names.embedding(),
        DType::F32,
        &Device::Cpu,
    );
    let doubled = (table.unwrap() * 2.0).unwrap();
    let embedding = decoder.embedding().unwrap();
    let rows = embedding.with_table(doubled.clone()).unwrap().rows(&tokens);
    let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let expected = values(&(stored * 2.0).unwrap());
    assert_eq!(values(&rows.unwrap()), expected);

    let wrong = Tensor::zeros((9, 16), DType::F32, &Device::Cpu).unwrap();
    let embedding = decoder.embedding().unwrap();
    let refused = embedding.with_table(wrong.clone()).err().unwrap();
    assert!(matches!(refused, Error::Shape { .. }), "{refused}");
    let head = decoder.head().unwrap();
    assert!(head.clone().with_vocab(doubled).is_ok());
    let refused = head.with_vocab(wrong).err().unwrap();
    assert!(matches!(refused, Error::Shape { .. }), "{refused}");
}

#[test]
fn a_random_model_beyond_memory_is_refused_by_tensor_and_leaves_nothing() {
    for changes in [
        json!({"vocab_size": 16_777_216, "hidden_size": 16_384}),
        json!({"intermediate_size": 16_777_216, "hidden_size": 16_384}),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let written = synthetic::write(
            &config(changes),
            DType::BF16,
            dir.path().join("model"),
            &WriteOptions::default(),
            synthetic::random(0),
        );
        let error = written.unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
