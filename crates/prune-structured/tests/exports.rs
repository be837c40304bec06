//! Exports as their readers see them, and what equal widths and refinement promise.

mod common;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Tensor};
use causal_lm::config::WIDTHS_KEY;
use causal_lm::testing::TestModel;
use common::{KINDS, decoder, gap, logits, overwrite, tiny, windows};
use prune_structured::compensation::{Alternating, NoCompensation};
use prune_structured::gguf::{self, Precision};
use prune_structured::output::Refits;
use prune_structured::structprune;
use prune_structured::{
    Calibration, Collect, Cost, Error, Form, Loading, NoProgress, Plan, Recipe, Settings, nemotron,
    write,
};
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};
use tensor_io::gguf::Gguf;
use tensor_io::{Checkpoint, WriteOptions};

fn calibrate(model: &TestModel) -> Calibration {
    let collect = Collect::default();
    Calibration::run(&model.decoder(), &windows(12), &collect, &NoProgress).unwrap()
}

fn recipe(name: &str, uniform: bool) -> Recipe {
    let mut recipe = Recipe::named(name, 3).unwrap();
    recipe.shape.uniform = uniform;
    recipe.compensation = Some(NoCompensation.into());
    recipe
}

fn save(
    model: &TestModel,
    plan: &Plan,
    calibration: &Calibration,
    form: Form,
    name: &str,
) -> PathBuf {
    save_refined(model, plan, (calibration, None), form, name)
}

fn save_refined(
    model: &TestModel,
    plan: &Plan,
    (calibration, refits): (&Calibration, Option<&Refits>),
    form: Form,
    name: &str,
) -> PathBuf {
    let dst = model.path(name);
    let settings = Settings::new(calibration)
        .refits(refits)
        .form(form)
        .files(overwrite());
    write(&model.decoder(), plan, &dst, &settings, &NoProgress).unwrap();
    dst
}

fn make(
    model: &TestModel,
    calibration: &Calibration,
    recipe: &Recipe,
    ratio: f64,
) -> Result<Plan, Box<Error>> {
    Plan::make(&model.decoder(), calibration, recipe, ratio, &NoProgress).map_err(Box::new)
}

/// A pruned model in a folder with a byte-level tokenizer of as many tokens as it has rows.
fn pruned(model: &TestModel, recipe: &Recipe, ratio: f64) -> PathBuf {
    let calibration = calibrate(model);
    let mut plan = make(model, &calibration, recipe, ratio).unwrap();
    if !recipe.shape.uniform {
        // Small models may come out equally wide by chance.
        plan.layers[1].neurons.pop();
    }
    let folder = save(model, &plan, &calibration, Form::Sliced, "pruned");
    tokenizer(&folder, &byte_level(true));
    folder
}

fn byte_level(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn tokenizer(folder: &Path, pre_tokenizer: &Json) {
    let vocab: serde_json::Map<String, Json> =
        (0..40).map(|i| (format!("t{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 40, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(
        folder.join("tokenizer_config.json"),
        r#"{"bos_token": "<s>"}"#,
    )
    .unwrap();
}

fn rows(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn equal_widths_come_within_one_step_of_every_layer_under_any_allocation() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        let calibration = calibrate(&model);
        for name in ["flap", "wanda-sp", "structprune", "structprune-softmax"] {
            for align in [1, 4] {
                let mut recipe = recipe(name, true);
                recipe.shape.align_neurons = align;
                let plan = make(&model, &calibration, &recipe, 0.3).unwrap();
                assert!(plan.is_uniform(), "{kind} {name}: {:?}", plan.widths());
                assert_eq!(
                    Loading::of(&model.decoder(), &plan, Form::Sliced),
                    Loading::Stock
                );
                let cost = Cost::of(&model.decoder(), &plan).unwrap();
                let sum = |blocks: &[prune_structured::BlockCost]| -> f64 {
                    blocks.iter().map(|b| b.parameters as f64).sum()
                };
                let neurons = |plan: &Plan| plan.widths()[0].neurons;
                assert_eq!(neurons(&plan) % align, 0);
                // Three layers, 24 wide; biases of a neuron make it 74 parameters at most.
                let step = 3.0 * 74.0 * align as f64;
                let kept = sum(&cost.after) - 0.7 * sum(&cost.before);
                assert!(
                    kept.abs() <= step + 0.3 * 3.0 * 48.0,
                    "{kind} {name}: off by {kept}"
                );
            }
        }
    }
}

#[test]
fn equal_widths_that_miss_the_ratio_are_an_error() {
    let model = tiny("llama", DType::F32);
    let calibration = calibrate(&model);
    let mut recipe = recipe("flap", true);
    recipe.shape.min_attention = 4;
    recipe.shape.min_neurons = 36;
    let plan = make(&model, &calibration, &recipe, 0.1);
    assert!(matches!(
        plan,
        Err(error) if matches!(*error, Error::Uniform { .. } | Error::Unreachable { .. })
    ));
}

#[test]
fn a_gguf_holds_the_models_values_and_widths() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        for (uniform, method) in [(true, "wanda-sp"), (false, "structprune")] {
            let folder = pruned(&model, &recipe(method, uniform), 0.3);
            let checkpoint = Checkpoint::open(&folder).unwrap();
            let decoder = decoder(&checkpoint);
            // Folders are replaced, but not files of others in them.
            let file = folder.join(format!("{method}.gguf"));
            if kind == "qwen3" && !uniform {
                let refused = gguf::export(&decoder, Precision::F32, &file, &NoProgress);
                assert!(matches!(refused, Err(Error::Export { .. })));
                assert!(!file.exists());
                continue;
            }
            for precision in Precision::ALL {
                let exported = gguf::export(&decoder, precision, &file, &NoProgress).unwrap();
                assert_eq!(exported.bytes, std::fs::metadata(&file).unwrap().len());
                assert_eq!(exported.parameters, checkpoint.parameters());
                let mut reader = std::fs::File::open(&file).unwrap();
                let content = Content::read(&mut reader).unwrap();
                check_widths(&content, &decoder, uniform);
                assert_eq!(content.tensor_infos.len(), checkpoint.names().count());
                check_values(&content, &mut reader, &decoder, precision);
            }
        }
    }
}

#[test]
fn a_gguf_that_is_opened_and_exported_again_keeps_its_blocks_and_its_tokenizer() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        let folder = pruned(&model, &recipe("wanda-sp", true), 0.3);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let (first, second) = (folder.join("first.gguf"), folder.join("second.gguf"));
        for precision in Precision::ALL {
            gguf::export(&decoder(&checkpoint), precision, &first, &NoProgress).unwrap();
            let opened = causal_lm::open(&first).unwrap();
            let exported = gguf::export(&decoder(&opened), precision, &second, &NoProgress);
            assert_eq!(
                exported.unwrap().bytes,
                std::fs::metadata(&second).unwrap().len()
            );
            let [a, b] = [&first, &second].map(|path| Gguf::open(path).unwrap());
            assert_eq!(
                a.content_hash().unwrap(),
                b.content_hash().unwrap(),
                "{kind} {}",
                precision.name()
            );
            for key in a.metadata().keys().filter(|key| *key != "general.name") {
                let [a, b] = [&a, &b].map(|file| file.metadata().get(key).unwrap());
                assert_eq!(a, b, "{kind} {} {key}", precision.name());
            }
        }
    }
}

fn check_widths(content: &Content, decoder: &causal_lm::Decoder<'_>, uniform: bool) {
    let Value::String(architecture) = &content.metadata["general.architecture"] else {
        panic!("the architecture is a string");
    };
    let qwen3 = decoder.config().qk_norm != causal_lm::config::QkNorm::None;
    let expected = match uniform {
        true if qwen3 => "qwen3",
        true => "llama",
        false => "deci",
    };
    assert_eq!(architecture, expected);
    let widths = &decoder.config().widths;
    type Width = fn(&causal_lm::Widths) -> usize;
    for (key, width) in [
        ("attention.head_count", (|w| w.heads) as Width),
        ("attention.head_count_kv", |w| w.kv_heads),
        ("feed_forward_length", |w| w.neurons),
    ] {
        let stored: Vec<u32> = match &content.metadata[&format!("{architecture}.{key}")] {
            Value::Array(list) => list.iter().map(|v| v.to_u32().unwrap()).collect(),
            one => vec![one.to_u32().unwrap(); widths.len()],
        };
        let expected: Vec<u32> = widths.iter().map(|w| width(w) as u32).collect();
        assert_eq!(stored, expected, "{key}");
    }
    let tokens = content.metadata["tokenizer.ggml.tokens"].to_vec().unwrap();
    assert_eq!(tokens.len(), decoder.config().vocab);
    assert_eq!(
        content.metadata["tokenizer.ggml.bos_token_id"]
            .to_u32()
            .unwrap(),
        40
    );
}

/// Every linear and the embedding, q and k in the order that interleaved rotation asks for.
fn check_values(
    content: &Content,
    reader: &mut std::fs::File,
    decoder: &causal_lm::Decoder<'_>,
    precision: Precision,
) {
    let d = decoder.config().head_dim(0);
    let mut pairs = vec![(
        "token_embd.weight".to_string(),
        decoder.config().names.embedding(),
        false,
    )];
    for layer in 0..decoder.config().layers() {
        for (ours, theirs, rotated) in [
            ("attn_q", "self_attn.q_proj", true),
            ("attn_k", "self_attn.k_proj", true),
            ("attn_v", "self_attn.v_proj", false),
            ("attn_output", "self_attn.o_proj", false),
            ("ffn_gate", "mlp.gate_proj", false),
            ("ffn_up", "mlp.up_proj", false),
            ("ffn_down", "mlp.down_proj", false),
        ] {
            for kind in ["weight", "bias"] {
                pairs.push((
                    format!("blk.{layer}.{ours}.{kind}"),
                    format!("model.layers.{layer}.{theirs}.{kind}"),
                    rotated && decoder.config().qk_norm == causal_lm::config::QkNorm::None,
                ));
            }
        }
    }
    for (ours, theirs, rotated) in pairs {
        if !decoder.checkpoint().contains(&theirs) {
            assert!(!content.tensor_infos.contains_key(&ours), "{ours}");
            continue;
        }
        let stored = content.tensor(reader, &ours, &Device::Cpu).unwrap();
        let stored = stored.dequantize(&Device::Cpu).unwrap();
        let source = decoder
            .checkpoint()
            .tensor_as(&theirs, DType::F32, &Device::Cpu)
            .unwrap();
        assert_eq!(stored.dims(), source.dims(), "{ours}");
        let width = source.dims().get(1).copied().unwrap_or(1);
        let (stored, source) = (rows(&stored), rows(&source));
        let largest = source.iter().fold(0f32, |m, x| m.max(x.abs()));
        let tolerance = match precision {
            _ if width == 1 => 0.0,
            Precision::F32 => 0.0,
            Precision::F16 => largest / 2048.0,
            Precision::Bf16 => largest / 256.0,
            Precision::Q8_0 => largest / 127.0,
            // The largest step of 4 bits between −x and x; rows are too short for the K types.
            _ => largest / 7.0,
        };
        for (i, value) in stored.iter().enumerate() {
            let row = i / width;
            let (head, within) = (row / d, row % d);
            let from = match rotated {
                true => head * d + within / 2 + within % 2 * (d / 2),
                false => row,
            };
            let expected = source[from * width + i % width];
            assert!(
                (value - expected).abs() <= tolerance,
                "{ours}[{i}]: {value} is not {expected}"
            );
        }
    }
}

#[test]
fn byte_level_pre_tokenizers_go_by_llama_cpps_names() {
    let model = tiny("llama", DType::F32);
    let folder = pruned(&model, &recipe("wanda-sp", true), 0.3);
    let sequence = |first: Json, use_regex| json!({"type": "Sequence", "pretokenizers": [first, byte_level(use_regex)]});
    let split = |regex: &str| {
        let pattern = json!({"Regex": regex});
        sequence(
            json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false}),
            false,
        )
    };
    let digits =
        |single: bool| sequence(json!({"type": "Digits", "individual_digits": single}), true);
    let qwen2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let llama3 = qwen2.replace(r"|\p{N}|", r"|\p{N}{1,3}|");
    for (pre_tokenizer, name) in [
        (byte_level(true), Some("gpt-2")),
        (digits(true), Some("smollm")),
        (split(qwen2), Some("qwen2")),
        // Without `ignore_merges`.
        (split(&llama3), Some("smaug-bpe")),
        (digits(false), None),
        (split(r"\s+"), None),
        (byte_level(false), None),
    ] {
        tokenizer(&folder, &pre_tokenizer);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let file = folder.join("model.gguf");
        let exported = gguf::export(&decoder(&checkpoint), Precision::F16, &file, &NoProgress);
        assert_eq!(exported.is_ok(), name.is_some(), "{pre_tokenizer}");
        if let Some(name) = name {
            let content = Content::read(&mut std::fs::File::open(&file).unwrap()).unwrap();
            let pre = &content.metadata["tokenizer.ggml.pre"];
            assert_eq!(pre.to_string().unwrap(), name);
            std::fs::remove_file(file).unwrap();
        }
    }
}

#[test]
fn a_tokenizer_that_llama_cpp_has_no_name_for_is_refused_and_leaves_nothing() {
    let model = tiny("llama", DType::F32);
    let folder = pruned(&model, &recipe("wanda-sp", true), 0.3);
    tokenizer(&folder, &json!({"type": "Whitespace"}));
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let file = folder.join("model.gguf");
    let refused = gguf::export(&decoder(&checkpoint), Precision::F16, &file, &NoProgress);
    let Err(Error::ExportFile { path, reason }) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        path.ends_with("tokenizer.json") && reason.contains("Whitespace"),
        "{reason}"
    );
    let left = std::fs::read_dir(&folder).unwrap();
    assert!(
        left.flatten()
            .all(|entry| !entry.file_name().to_string_lossy().contains("gguf"))
    );
}

/// Reads `block_configs` as vLLM does and runs the tensors with those widths.
#[test]
fn block_configs_give_the_widths_and_the_model_runs_with_them() {
    for kind in ["llama", "llama-mha-tied", "llama-biases", "qwen2"] {
        let model = tiny(kind, DType::F32);
        let calibration = calibrate(&model);
        let mut recipe = recipe("structprune", false);
        let dense = model.decoder().config().widths[0];
        recipe.shape.min_attention = match kind {
            "qwen2" => dense.heads / dense.kv_heads,
            _ => dense.kv_heads,
        };
        let plan = make(&model, &calibration, &recipe, 0.2).unwrap();
        assert!(!plan.is_uniform(), "{kind}");
        let folder = save(&model, &plan, &calibration, Form::Sliced, "pruned");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let exported = model.path("nemotron");
        nemotron::export(
            &decoder(&checkpoint),
            &exported,
            &WriteOptions::default(),
            &NoProgress,
        )
        .unwrap();
        assert!(exported.join(nemotron::CONFIG_CLASS_FILE).is_file());
        // The folder itself opens too, and what is pruned of it has widths in lists.
        assert!(gap(&logits(&exported), &logits(&folder)) < 1e-6, "{kind}");
        let again = Checkpoint::open(&exported).unwrap();
        let opened = decoder(&again);
        assert_eq!(opened.config().widths, decoder(&checkpoint).config().widths);
        let collect = Collect::default();
        let seen = Calibration::run(&opened, &windows(12), &collect, &NoProgress).unwrap();
        let narrower = Plan::make(&opened, &seen, &recipe, 0.1, &NoProgress).unwrap();
        let dst = model.path("narrower");
        let settings = Settings::new(&seen).files(overwrite());
        write(&opened, &narrower, &dst, &settings, &NoProgress).unwrap();
        let written = Checkpoint::open(&dst).unwrap();
        assert_eq!(decoder(&written).config().widths, narrower.widths());

        let file = exported.join("config.json");
        let mut config: Json = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(config["model_type"], "nemotron-nas");
        let blocks = config["block_configs"].as_array().unwrap().clone();
        let heads = config["num_attention_heads"].as_u64().unwrap();
        let list = |f: &dyn Fn(&Json) -> u64| blocks.iter().map(f).collect::<Vec<u64>>();
        config[WIDTHS_KEY] = json!({
            "num_attention_heads": list(&|_| heads),
            "num_key_value_heads": list(&|b| heads / b["attention"]["n_heads_in_group"].as_u64().unwrap()),
            "intermediate_size": list(&|b| b["ffn"]["intermediate_size"].as_u64().unwrap()),
        });
        config["model_type"] = json!(if kind == "qwen2" { "qwen2" } else { "llama" });
        std::fs::write(&file, config.to_string()).unwrap();
        assert!(gap(&logits(&exported), &logits(&folder)) < 1e-6, "{kind}");
    }
}

#[test]
fn block_configs_refuse_attention_of_different_widths() {
    let model = tiny("llama", DType::F32);
    let calibration = calibrate(&model);
    let mut plan = make(&model, &calibration, &recipe("flap", true), 0.3).unwrap();
    plan.layers[1].heads = (0..2).collect();
    plan.layers[1].kv_heads = vec![0];
    let folder = save(&model, &plan, &calibration, Form::Sliced, "pruned");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let dst = model.path("nemotron");
    let refused = nemotron::export(
        &decoder(&checkpoint),
        &dst,
        &WriteOptions::default(),
        &NoProgress,
    );
    assert!(matches!(refused, Err(Error::Export { .. })), "{refused:?}");
    assert!(!dst.exists());
}

#[test]
fn a_refined_model_is_the_same_masked_and_sliced_and_keeps_its_widths() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        let calibration = calibrate(&model);
        for rounds in [1, 3] {
            let mut recipe = recipe("structprune", false);
            recipe.compensation = Some(
                Alternating {
                    rounds,
                    ridge: 0.01,
                }
                .into(),
            );
            let plan = make(&model, &calibration, &recipe, 0.3).unwrap();
            let settings = Settings::new(&calibration).files(overwrite());
            let unrefined = model.path("unrefined");
            let unrefined = write(&model.decoder(), &plan, unrefined, &settings, &NoProgress);
            assert!(matches!(unrefined, Err(Error::Missing { .. })));
            let dir = model.path("refits");
            std::fs::create_dir_all(&dir).unwrap();
            let (refined, refits) =
                structprune::refine(&model.decoder(), &windows(12), &plan, &dir, &NoProgress)
                    .unwrap();
            assert_eq!(refined.widths(), plan.widths());
            let made = (&calibration, Some(&refits));
            let sliced = save_refined(&model, &refined, made, Form::Sliced, "sliced");
            let masked = save_refined(&model, &refined, made, Form::Masked, "masked");
            let gap = gap(&logits(&sliced), &logits(&masked));
            assert!(gap < 1e-5, "{kind} {rounds}: {gap}");
            let written = Checkpoint::open(&sliced).unwrap();
            let cost = Cost::of(&model.decoder(), &refined).unwrap();
            assert_eq!(written.parameters(), cost.total_after().parameters);
        }
    }
}
