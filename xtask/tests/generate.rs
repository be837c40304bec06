//! `generate` as its users run it: the text that the model writes in whatever form it is stored, and what its cache takes.

#[path = "common/scene.rs"]
mod scene;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device};
use causal_lm::testing::logits;
use causal_lm::{Decoder, TextTokenizer};
use scene::{Scene, rows};
use serde_json::{Value, json};
use tensor_io::Checkpoint;

/// New tokens of each text.
const NEW: usize = 24;

/// A model of whole blocks of GGUF with a tokenizer for its files: two layers with two KV heads of eight elements.
fn scene() -> Scene {
    let scene = Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 9, "max_position_embeddings": 128,
    }))
    .with_characters();
    // Tokens become characters again, as in a GGUF file.
    let path = scene.path("model/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    tokenizer["decoder"] = tokenizer["pre_tokenizer"].clone();
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    scene
}

fn xtask(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .output()
        .unwrap()
}

/// A suite on the scene's model, saved in a folder of that name.
fn saved(scene: &Scene, suite: &str, name: &str, more: &str) -> (PathBuf, Vec<Value>) {
    let (save, path) = (scene.path(name), |name: &str| scene.path(name));
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", suite, "--json", "--samples", "2", "--window", "16"])
        .args(["--calib-samples", "8"])
        .args(["--model".as_ref(), path("model").as_os_str()])
        .args(["--text".as_ref(), path("text.txt").as_os_str()])
        .args(["--calib".as_ref(), path("calib.txt").as_os_str()])
        .args(["--save".as_ref(), save.as_os_str()])
        .args(more.split(' '))
        .output()
        .unwrap();
    let rows = rows(&output);
    (save, rows)
}

/// What `generate` writes to stdout and stderr after a prompt.
fn generated(model: &Path, prompt: &str, more: &str) -> (String, String) {
    let own = ["generate", "--raw", "--model", model.to_str().unwrap()];
    let more: Vec<&str> = more.split_whitespace().collect();
    let output = xtask(&[&own[..], &["--prompt", prompt], &more].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{}: {said}", model.display());
    (String::from_utf8(output.stdout).unwrap(), said)
}

/// The text that the logits of a model say, each token after a run over all before it.
fn most_likely(model: &Path, prompt: &str) -> String {
    let checkpoint: Checkpoint = causal_lm::open(model).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let tokenizer = TextTokenizer::open(model).unwrap();
    let mut tokens = tokenizer.encode_with_special_tokens(prompt).unwrap();
    let start = tokens.len();
    for _ in 0..NEW {
        let logits = logits(&decoder, &tokens);
        let last = &logits[logits.len() - decoder.config().vocab..];
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b]));
        tokens.push(u32::try_from(best.unwrap()).unwrap());
    }
    tokenizer.decode(&tokens[start..]).unwrap()
}

const PROMPT: &str = "a b c";

/// Both ways to ask for the most likely tokens write what the logits say, in floats.
fn assert_writes_what_its_logits_say(model: &Path) -> String {
    let expected = most_likely(model, PROMPT);
    for more in ["", "--temperature 0 --seed 7"] {
        let floats = format!("--arithmetic f32 --kv-dtype f32 --max-new-tokens {NEW} {more}");
        let (written, _) = generated(model, PROMPT, &floats);
        assert_eq!(written, format!("{expected}\n"), "{}", model.display());
    }
    expected
}

#[test]
fn a_gguf_file_and_a_packed_folder_write_what_their_logits_say() {
    let scene = scene();
    let dense = assert_writes_what_its_logits_say(&scene.path("model"));
    // More than one token over and over.
    assert!(dense.chars().collect::<HashSet<_>>().len() > 1, "{dense}");
    let (gguf, _) = saved(
        &scene,
        "lowrank",
        "blocks",
        "--held-out-samples 4 --method none --compress q8_0 --no-controls --save-as gguf",
    );
    assert_writes_what_its_logits_say(&gguf.join("model.gguf"));
    let (packed, _) = saved(
        &scene,
        "lowrank",
        "packed",
        "--held-out-samples 4 --method none --compress rtn-int4-g32-sym --no-controls --save-as \
         compressed-tensors,gguf",
    );
    let folder = assert_writes_what_its_logits_say(&packed.join("compressed-tensors"));
    // Not that of the floats.
    assert_ne!(folder, dense);
    assert_writes_what_its_logits_say(&packed.join("model.gguf"));
}

#[test]
fn a_pruned_model_writes_what_its_logits_say_in_a_folder_and_in_gguf() {
    let scene = scene();
    let dense = most_likely(&scene.path("model"), PROMPT);
    let (pruned, rows) = saved(&scene, "structured", "uneven", "--method flap --ratio 0.3");
    let layers = rows[1]["layers"].as_array().unwrap();
    assert_ne!(
        (&layers[0]["heads"], &layers[0]["neurons"]),
        (&layers[1]["heads"], &layers[1]["neurons"])
    );
    assert_ne!(assert_writes_what_its_logits_say(&pruned), dense);
    let (even, _) = saved(
        &scene,
        "structured",
        "even",
        "--method flap --ratio 0.5 --uniform --align 32 --export gguf:f32",
    );
    let folder = assert_writes_what_its_logits_say(&even);
    assert_eq!(
        assert_writes_what_its_logits_say(&even.join("model-f32.gguf")),
        folder
    );
}

#[test]
fn the_printed_bytes_of_the_cache_are_those_of_its_tokens() {
    let scene = scene();
    let model = scene.path("model");
    let tokenizer = TextTokenizer::open(&model).unwrap();
    let prompt = tokenizer.encode_with_special_tokens(PROMPT).unwrap().len();
    let printed = |new: usize, more: &str| {
        let (_, said) = generated(&model, PROMPT, &format!("--max-new-tokens {new} {more}"));
        assert!(said.starts_with(&format!("{new} tokens, ")), "{said}");
        let (_, cache) = said.split_once(", cache ").unwrap();
        cache.split(", ").next().unwrap().to_owned()
    };
    let expected =
        |bytes: usize, stored: &str| format!("{:.2} KiB ({stored})", bytes as f64 / 1024.0);
    // Layers, KV heads, and eight elements of keys and of values.
    let per_token = 2 * 2 * 2 * 8;
    // Of all tokens but the last, which nothing is written after.
    let held = |tokens: usize| tokens + 1 - prompt;
    for (preset, stored, size) in [("f32", "F32", 4), ("f16", "F16", 2), ("bf16", "Bf16", 2)] {
        // Room is made for 32 tokens at a time.
        for (tokens, room) in [(32, 32), (33, 64), (64, 64)] {
            let printed = printed(held(tokens), &format!("--kv-dtype {preset}"));
            assert_eq!(printed, expected(per_token * size * room, stored));
        }
    }
    // Without a preset they are integers, but for the first four tokens and up to 64 of the newest.
    assert_eq!(
        printed(held(4 + 32), ""),
        expected(per_token * 2 * (4 + 32), "Int8")
    );
    // Behind 96 tokens that followed the first four, two blocks of 32 are: eight codes and a scale of 16 bits for a head.
    let packed = 2 * 2 * 2 * 64 * (8 + 2);
    let bytes = per_token * 2 * (4 + 64) + packed;
    for more in ["", "--kv-dtype int8"] {
        assert_eq!(printed(held(4 + 96), more), expected(bytes, "Int8"));
    }
}
