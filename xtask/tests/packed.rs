//! Compressed models as users run them: opened as they are saved, with quality, adapters and generation.

#[path = "common/scene.rs"]
mod scene;

use std::path::Path;
use std::process::{Command, Output};

use scene::{Scene, error, rows};
use serde_json::{Value, json};

fn xtask(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .output()
        .unwrap()
}

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn number(row: &Value, field: &str) -> f64 {
    let value = row[field].as_f64();
    value.unwrap_or_else(|| panic!("{field} in {row}"))
}

#[test]
fn what_is_saved_packed_is_evaluated_and_generates_packed() {
    let scene = Scene::new(json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 64,
    }));
    let (text, calib, save) = (
        scene.path("text.txt"),
        scene.path("calib.txt"),
        scene.path("save"),
    );
    let (dense, text) = (scene.path("model"), str(&text));
    rows(&xtask(&[
        "eval",
        "lowrank",
        "--json",
        "--model",
        str(&dense),
        "--text",
        text,
        "--calib",
        str(&calib),
        "--calib-samples",
        "20",
        "--held-out-samples",
        "8",
        "--compress",
        "gptq-int3-g32",
        "--method",
        "eora",
        "--rank",
        "4",
        "--no-controls",
        "--save-as",
        "adapter,compressed,gptq-v2,merged",
        "--save",
        str(&save),
    ]));
    let perplexity = |model: &Path, more: &[&str]| -> Value {
        let args = ["eval", "perplexity", "--json", "--window", "32"];
        let own = ["--model", str(model), "--text", text];
        rows(&xtask(&[&args[..], &own, more].concat()))[0].clone()
    };
    let near = |a: &Value, b: &Value| {
        let (a, b) = (number(a, "perplexity"), number(b, "perplexity"));
        assert!((a / b - 1.0).abs() < 0.01, "{a} is not near {b}");
    };
    let (packed, adapter) = (save.join("gptq-v2"), save.join("adapter"));
    let alone = perplexity(&packed, &[]);
    near(&alone, &perplexity(&save.join("compressed"), &[]));
    let repaired = perplexity(&packed, &["--adapter", str(&adapter)]);
    near(&repaired, &perplexity(&save.join("merged"), &[]));
    assert_ne!(repaired["perplexity"], alone["perplexity"]);
    let scaled = |scale: &str| {
        perplexity(
            &packed,
            &["--adapter", str(&adapter), "--adapter-scale", scale],
        )
    };
    assert_eq!(scaled("1")["perplexity"], repaired["perplexity"]);
    assert_eq!(scaled("0")["perplexity"], alone["perplexity"]);
    assert_ne!(scaled("0.5")["perplexity"], repaired["perplexity"]);
    let int8 = perplexity(&packed, &["--arithmetic", "int8"]);
    near(&int8, &alone);
    assert_ne!(int8["perplexity"], alone["perplexity"]);
    assert_eq!(
        (&alone["arithmetic"], &int8["arithmetic"]),
        (&json!("f32"), &json!("int8"))
    );
    // Floats run in f32 whatever is asked for, and the row says so.
    let floats = perplexity(&dense, &["--arithmetic", "int8"]);
    assert_eq!(floats["arithmetic"], json!("f32"));
    assert_ne!(floats["linears"], int8["linears"]);
    let original = perplexity(&dense, &[]);
    assert!(number(&alone, "weight_bytes") < 0.5 * number(&original, "weight_bytes"));
    assert!(number(&repaired, "weight_bytes") > number(&alone, "weight_bytes"));

    let kv = rows(&xtask(&[
        "eval",
        "kv",
        "--json",
        "--model",
        str(&packed),
        "--text",
        text,
        "--window",
        "48",
        "--samples",
        "2",
        "--policy",
        "streaming",
        "--budget",
        "16",
        "--adapter",
        str(&adapter),
    ]));
    // The full cache, the policy, and every token in 8 and 4 bits beside.
    assert_eq!(kv.len(), 5);
    for row in &kv {
        assert_eq!(row["weight_bytes"], repaired["weight_bytes"]);
    }

    let generate = |more: &[&str]| -> (String, String) {
        let own = [
            "generate",
            "--model",
            str(&packed),
            "--max-new-tokens",
            "24",
        ];
        let output = xtask(&[&own[..], more].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        (String::from_utf8(output.stdout).unwrap(), said)
    };
    let evicting = [
        "--adapter",
        str(&adapter),
        "--policy",
        "streaming",
        "--budget",
        "12",
    ];
    let prompt = ["--prompt", "a b c"];
    let (written, said) = generate(&[&evicting[..], &prompt].concat());
    assert!(!written.trim().is_empty());
    for part in [
        "24 tokens",
        "prompt of 3 tokens",
        "tokens/s",
        "weights",
        "(Int8)",
        "int8 arithmetic",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(generate(&[&evicting[..], &prompt].concat()).0, written);

    // A template that says "d" after the message.
    let template =
        "{% for m in messages %}{{ bos_token }} {{ m['content'].strip() }}{% endfor %} d";
    std::fs::write(packed.join("chat_template.jinja"), template).unwrap();
    let answered = generate(&["--prompt", " a b ", "--arithmetic", "f32"]).0;
    let continued = generate(&["--raw", "--prompt", "<s> a b d", "--arithmetic", "f32"]).0;
    assert_eq!(answered, continued);
    std::fs::write(
        packed.join("chat_template.jinja"),
        "{{ raise_exception('no users') }}",
    )
    .unwrap();
    let refused = xtask(&["generate", "--model", str(&packed), "--prompt", "a"]);
    let refused = error(&refused);
    assert!(
        refused.contains("chat template") && refused.contains("no users"),
        "{refused}"
    );
}

#[test]
fn a_level_of_instructions_that_does_not_exist_is_refused_with_those_that_do() {
    let run = |level: &str| {
        Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["generate", "--model", "nothing", "--prompt", "x"])
            .env("PACKED_LEVEL", level)
            .output()
            .unwrap()
    };
    let message = error(&run("avx-512"));
    for part in ["PACKED_LEVEL", "`avx-512`", "portable"] {
        assert!(message.contains(part), "{message}");
    }
    for known in ["portable", ""] {
        assert!(error(&run(known)).contains("nothing"));
    }
}

#[test]
fn what_cannot_be_opened_is_one_clear_line() {
    let scene = Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 32,
    }));
    let cut = scene.path("cut.gguf");
    std::fs::write(&cut, b"GGUF\x03\0\0\0\x01\0\0\0").unwrap();
    for command in ["generate", "eval"] {
        let mut args = match command {
            "eval" => vec!["eval", "perplexity", "--text", "x"],
            _ => vec!["generate", "--prompt", "x"],
        };
        args.extend(["--model", str(&cut)]);
        let message = error(&xtask(&args));
        assert!(message.contains("cut.gguf"), "{message}");
    }
    let model = scene.path("model");
    let missing = scene.path("nothing");
    let adapter = ["--adapter", str(&missing), "--prompt", "a"];
    let message = error(&xtask(
        &[&["generate", "--model", str(&model)][..], &adapter].concat(),
    ));
    assert!(
        message.contains("--adapter") && message.contains("nothing"),
        "{message}"
    );
    let long = ["a"; 40].join(" ");
    let message = error(&xtask(&[
        "generate",
        "--model",
        str(&model),
        "--prompt",
        &long,
    ]));
    assert!(
        message.contains("40 tokens") && message.contains("32 positions"),
        "{message}"
    );
}
