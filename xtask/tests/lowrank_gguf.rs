//! `eval lowrank` with models in GGUF blocks, as its users run it.

#[path = "common/scene.rs"]
mod scene;

use std::path::Path;
use std::process::{Command, Output};

use candle_core::{DType, Device};
use scene::{Scene, error, rows};
use serde_json::{Value, json};
use tensor_io::Checkpoint;
use tensor_io::gguf::Gguf;
use tensor_io::imatrix::Imatrix;

/// A model whose rows are whole blocks of 32, and not of 256, with a tokenizer that GGUF files can hold.
fn scene(tied: bool) -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 9, "max_position_embeddings": 16,
        "tie_word_embeddings": tied,
    }))
    .with_characters()
}

fn command(scene: &Scene, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command
        .args(["eval", "lowrank", "--no-controls", "--rank", "4"])
        .args(["--calib-samples", "20", "--held-out-samples", "8"])
        .args(["--model".as_ref(), scene.path("model").as_os_str()])
        .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
        .args(["--calib".as_ref(), scene.path("calib.txt").as_os_str()])
        .args(more);
    command
}

fn run(scene: &Scene, more: &[&str]) -> Output {
    command(scene, more).arg("--json").output().unwrap()
}

/// The row behind that of the dense model.
fn row(scene: &Scene, more: &[&str]) -> Value {
    rows(&run(scene, more))[1].clone()
}

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn number(row: &Value, field: &str) -> f64 {
    let value = row[field].as_f64();
    value.unwrap_or_else(|| panic!("{field} in {row}"))
}

fn perplexity(scene: &Scene, model: &Path) -> f64 {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "perplexity", "--json", "--arithmetic", "f32"])
        .args(["--model".as_ref(), model.as_os_str()])
        .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
        .output()
        .unwrap();
    number(&rows(&output)[0], "perplexity")
}

fn type_of(file: &Gguf, tensor: &str) -> &'static str {
    file.info(tensor).unwrap().layout.name
}

/// The weights of all linears of two checkpoints are the same values.
fn assert_same_linears(a: &Checkpoint, b: &Checkpoint) {
    let linear = |name: &&str| name.contains("proj");
    let names: Vec<&str> = a.names().filter(linear).collect();
    assert_eq!(names.len(), 14);
    for name in names {
        let values = |checkpoint: &Checkpoint| -> Vec<f64> {
            let tensor = checkpoint
                .tensor_as(name, DType::F64, &Device::Cpu)
                .unwrap();
            tensor.flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(values(a), values(b), "{name}");
    }
}

#[test]
fn a_packed_folder_becomes_a_gguf_file_with_the_same_codes() {
    let scene = scene(false);
    let made = scene.path("made");
    let compress = ["--compress", "gptq-int4-g64-sym", "--method", "none"];
    let to = [
        "--save-as",
        "gptq-v2,compressed-tensors",
        "--save",
        str(&made),
    ];
    row(&scene, &[&compress[..], &to].concat());
    for format in ["gptq-v2", "compressed-tensors"] {
        let (folder, save) = (made.join(format), scene.path(&format!("{format}-saved")));
        let given = ["--compressed", str(&folder), "--method", "none"];
        let to = ["--save-as", "gguf", "--save", str(&save)];
        let found = row(&scene, &[&given[..], &to].concat());
        let path = save.join("model.gguf");
        let (file, opened) = (Gguf::open(&path).unwrap(), causal_lm::open(&path).unwrap());
        assert_same_linears(&causal_lm::open(&folder).unwrap(), &opened);
        assert_eq!(type_of(&file, "blk.1.ffn_down.weight"), "Q4_0");
        assert_eq!(type_of(&file, "token_embd.weight"), "Q4_0");
        // Rows of 64 are no whole blocks of Q6_K.
        assert_eq!(type_of(&file, "output.weight"), "Q8_0");
        assert_eq!(found["bytes"], file.total_bytes());
        assert_eq!(found["bytes_saved"]["gguf"], file.total_bytes());
        let measured = perplexity(&scene, &path);
        assert!((number(&found, "perplexity") / measured - 1.0).abs() < 1e-4);
    }
    // Without its original, as it was published.
    let (folder, save) = (made.join("gptq-v2"), scene.path("alone"));
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args([
            "eval", "lowrank", "--json", "--rank", "1", "--method", "none",
        ])
        .args([
            "--calib-samples",
            "8",
            "--held-out-samples",
            "4",
            "--rest",
            "stored",
        ])
        .args(["--model", str(&folder), "--compressed", str(&folder)])
        .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
        .args(["--calib".as_ref(), scene.path("calib.txt").as_os_str()])
        .args(["--save-as", "gguf", "--save", str(&save)])
        .output()
        .unwrap();
    assert_eq!(number(&rows(&output)[1], "loss"), 0.0);
    let path = save.join("model.gguf");
    assert_eq!(
        type_of(&Gguf::open(&path).unwrap(), "output.weight"),
        "BF16"
    );
    assert_same_linears(
        &causal_lm::open(&folder).unwrap(),
        &causal_lm::open(&path).unwrap(),
    );
}

#[test]
fn a_grid_without_a_block_type_is_refused_before_a_text_is_read() {
    let scene = scene(false);
    for (compressor, reason) in [
        ("rtn-int4-g32", "f16 does not hold"),
        ("rtn-int8-g32", "8 bits and zero points"),
        ("gptq-int4-g32-sym-act", "neighbouring inputs"),
    ] {
        let made = scene.path(compressor);
        let compress = ["--compress", compressor, "--method", "none"];
        let to = ["--save-as", "gptq-v2", "--save", str(&made)];
        row(&scene, &[&compress[..], &to].concat());
        let folder = made.join("gptq-v2");
        let save = scene.path("never");
        let given = ["--compressed", str(&folder), "--method", "none"];
        let to = ["--save-as", "gguf", "--save", str(&save)];
        let nothing = ["--samples", "1000000"];
        let refused = error(&run(&scene, &[&given[..], &to, &nothing].concat()));
        for words in ["--save-as gguf", "self_attn.q_proj", reason] {
            assert!(refused.contains(words), "{compressor}: {refused}");
        }
        assert!(!save.exists());
    }
}

#[test]
fn types_that_do_not_fit_the_rows_are_said_before_the_run_and_in_the_report_and_the_file() {
    let scene = scene(true);
    let save = scene.path("save");
    let flags = ["--compress", "q4_k_m", "--method", "none"];
    let to = ["--save-as", "gguf", "--save", str(&save)];
    let output = run(&scene, &[&flags[..], &to].concat());
    let found = rows(&output)[1].clone();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let facts = &report["sections"][0]["protocol"];
    let said = facts["tensors of q4_k_m"]
        .as_str()
        .unwrap_or_else(|| panic!("{facts}"));
    let path = save.join("model.gguf");
    let file = Gguf::open(&path).unwrap();
    // More bits for v and down_proj of the second block of two; down_proj has rows of 256.
    let types = "11 Q5_0, 1 Q4_K, 1 Q6_K, 2 Q8_0, 5 F32";
    for entry in types.split(", ") {
        let (count, ty) = entry.split_once(' ').unwrap();
        let found = file.tensors().iter().filter(|t| t.layout.name == ty);
        assert_eq!(found.count().to_string(), count, "{ty}");
    }
    let bits = 8.0 * file.total_bytes() as f64 / file.parameters() as f64;
    let printed = command(&scene, &flags).output().unwrap();
    let stderr = String::from_utf8(printed.stderr).unwrap();
    for words in [
        types.to_string(),
        format!("{bits:.2} bits per weight"),
        "11 linears are Q5_0 instead of Q4_K: rows of 64 values are no whole blocks of 256".into(),
        "1 linear is Q8_0 instead of Q6_K".into(),
    ] {
        assert!(said.contains(&words), "{said}");
        assert_eq!(stderr.matches(&words).count(), 1, "{stderr}");
    }
    let metadata = file.metadata();
    let stored = metadata.get_str("eora.types").unwrap().unwrap();
    assert!(said.starts_with(stored), "{stored}");
    // Not Q4_K_M: most weights are Q5_0.
    assert_eq!(metadata.get_u64("general.file_type").unwrap(), Some(8));
    assert_eq!(found["bytes"], file.total_bytes());
    assert!((number(&found, "bits_per_weight") - bits).abs() < 1e-9);
    let measured = perplexity(&scene, &path);
    assert!((number(&found, "perplexity") / measured - 1.0).abs() < 1e-4);
}

#[test]
fn a_head_is_rounded_as_llama_cpp_does_unless_it_is_to_stay() {
    for tied in [true, false] {
        let scene = scene(tied);
        let flags = ["--compress", "q4_0", "--method", "none"];
        let saved = |more: &[&str], name: &str| {
            let save = scene.path(name);
            let to = ["--save-as", "gguf,compressed", "--save", str(&save)];
            let found = row(&scene, &[&flags[..], &to, more].concat());
            let path = save.join("model.gguf");
            let measured = perplexity(&scene, &path);
            assert!((number(&found, "perplexity") / measured - 1.0).abs() < 1e-4);
            let floats = perplexity(&scene, &save.join("compressed"));
            // Rounded once more to the dtype of the model.
            assert!((floats / measured - 1.0).abs() < 1e-2);
            let file = Gguf::open(path).unwrap();
            assert_eq!(found["bytes"], file.total_bytes());
            file
        };
        let file = saved(&[], "rounded");
        let head = if tied {
            "token_embd.weight"
        } else {
            "output.weight"
        };
        assert_eq!(type_of(&file, head), "Q8_0");
        if !tied {
            assert_eq!(type_of(&file, "token_embd.weight"), "Q4_0");
        }
        let stays = saved(&["--rest", "stored"], "stored");
        assert_eq!(type_of(&stays, head), "BF16");
        assert_eq!(type_of(&stays, "token_embd.weight"), "BF16");
        assert!(file.total_bytes() < stays.total_bytes());
        // The measured model is the saved one without being saved, too.
        let unsaved = row(&scene, &flags);
        assert_eq!(unsaved["bytes"], file.total_bytes());
    }
}

#[test]
fn a_lora_in_gguf_holds_the_factors_as_they_were_measured() {
    let scene = scene(true);
    for (storage, ty) in [
        ("f16", "F16"),
        ("bf16", "BF16"),
        ("f32", "F32"),
        ("int", "F32"),
    ] {
        let save = scene.path(storage);
        let flags = [
            "--compress",
            "q4_0",
            "--method",
            "eora",
            "--factors",
            storage,
        ];
        let to = [
            "--save-as",
            "gguf,lora-gguf,compressed,adapter",
            "--save",
            str(&save),
        ];
        let found = row(&scene, &[&flags[..], &to].concat());
        let lora = Gguf::open(save.join("lora.gguf")).unwrap();
        assert_eq!(
            type_of(&lora, "blk.0.ffn_down.weight.lora_a"),
            ty,
            "{storage}"
        );
        if storage != "int" {
            assert_eq!(found["bytes_factors"], lora.total_bytes());
        }
        // The same values as in the folder for PEFT.
        let base = causal_lm::open(scene.path("model")).unwrap();
        let read = |name: &str| causal_lm::Adapter::open(save.join(name), &base).unwrap();
        let (in_gguf, in_folder) = (read("lora.gguf"), read("adapter"));
        assert_eq!(in_gguf.names().count(), 14);
        for name in in_gguf.names() {
            let factors = |adapter: &causal_lm::Adapter| {
                let factors = adapter.factors(name).unwrap().unwrap();
                (factors.a, factors.b, factors.scale)
            };
            assert_eq!(factors(&in_gguf), factors(&in_folder), "{storage} {name}");
        }
        let metadata = lora.metadata();
        assert_eq!(metadata.get_str("eora.compressor").unwrap(), Some("q4_0"));
        assert_eq!(metadata.get_str("eora.method").unwrap(), Some("eora"));
    }
}

#[test]
fn an_importance_matrix_of_a_file_takes_the_place_of_calibration() {
    let scene = scene(false);
    let made = scene.path("made");
    let flags = ["--compress", "q4_0-imatrix", "--method", "none"];
    let to = [
        "--save-as",
        "gguf,imatrix,imatrix-dat",
        "--save",
        str(&made),
    ];
    let own = row(&scene, &[&flags[..], &to].concat());
    let said = |path: &Path, key: &str| {
        let file = Gguf::open(path).unwrap();
        let metadata = file.metadata();
        let value = metadata.get(&format!("quantize.imatrix.{key}")).unwrap();
        value.unwrap_or_else(|| panic!("{key}"))
    };
    assert_eq!(
        said(&made.join("model.gguf"), "file"),
        "imatrix.gguf".into()
    );
    assert_eq!(
        said(&made.join("model.gguf"), "dataset"),
        "calib.txt".into()
    );
    assert_eq!(
        said(&made.join("model.gguf"), "entries_count"),
        14u32.into()
    );

    let bytes = |path: &Path| {
        let file = Gguf::open(path).unwrap();
        let names = file.tensors().iter().filter(|t| t.name.starts_with("blk."));
        names
            .flat_map(|t| file.bytes(&t.name).unwrap().to_vec())
            .collect::<Vec<u8>>()
    };
    let with = |imatrix: &Path, name: &str| {
        let save = scene.path(name);
        let more = [
            "--imatrix",
            str(imatrix),
            "--save-as",
            "gguf",
            "--save",
            str(&save),
        ];
        let found = row(&scene, &[&flags[..], &more].concat());
        (found, save.join("model.gguf"))
    };
    // The same matrix in both forms is that of calibration, but for its rounding to sums and to means of 32 bits.
    let (new, from_new) = with(&made.join("imatrix.gguf"), "new");
    let (_, from_old) = with(&made.join("imatrix.dat"), "old");
    let (a, b) = (bytes(&from_new), bytes(&from_old));
    let differ = a.iter().zip(&b).filter(|(a, b)| a != b).count();
    assert!(
        a.len() == b.len() && differ < a.len() / 100,
        "{differ} bytes"
    );
    assert!((number(&new, "loss") / number(&own, "loss") - 1.0).abs() < 0.01);
    assert_eq!(said(&from_old, "file"), "imatrix.dat".into());
    assert_eq!(said(&from_new, "chunks_count"), 1u32.into());

    // Another matrix gives other codes.
    let mut imatrix = Imatrix::read(made.join("imatrix.gguf")).unwrap();
    for entry in imatrix.entries.values_mut() {
        entry
            .means
            .iter_mut()
            .step_by(2)
            .for_each(|mean| *mean *= 1e4);
    }
    let odd = scene.path("odd.gguf");
    imatrix.write_gguf(&odd).unwrap();
    let (_, from_odd) = with(&odd, "odd");
    assert!(bytes(&from_odd) != bytes(&from_new));

    // What is missing or of another size is named.
    imatrix.entries.remove("blk.1.ffn_down.weight");
    imatrix.write_gguf(&odd).unwrap();
    let refused = error(&run(
        &scene,
        &[&flags[..], &["--imatrix", str(&odd)]].concat(),
    ));
    assert!(
        refused.contains("--imatrix")
            && refused.contains("odd.gguf: no entry for blk.1.ffn_down.weight"),
        "{refused}"
    );
    let wide = tensor_io::imatrix::Importance::new(vec![1.0; 128], 3);
    imatrix.entries.insert("blk.1.ffn_down.weight".into(), wide);
    imatrix.write_gguf(&odd).unwrap();
    let refused = error(&run(
        &scene,
        &[&flags[..], &["--imatrix", str(&odd)]].concat(),
    ));
    assert!(
        refused.contains("expected 256 columns") && refused.contains("128"),
        "{refused}"
    );
    // It has to be of use.
    let plain = [
        "--compress",
        "q4_0",
        "--method",
        "none",
        "--imatrix",
        str(&odd),
    ];
    assert!(error(&run(&scene, &plain)).contains("q4_k-imatrix"));
}

#[test]
fn calibration_in_bf16_changes_the_result_a_little_and_is_another_run() {
    let scene = scene(true);
    let state = scene.path("state");
    let flags = [
        "--compress",
        "rtn-int3-g32",
        "--method",
        "eora",
        "--resume",
        str(&state),
    ];
    let exact = row(&scene, &flags);
    let other = error(&run(
        &scene,
        &[&flags[..], &["--arithmetic", "bf16"]].concat(),
    ));
    assert!(
        other.contains("another run") && other.contains("computed_in"),
        "{other}"
    );
    let rounded = row(&scene, &[&flags[..4], &["--arithmetic", "bf16"]].concat());
    assert_ne!(exact["loss"], rounded["loss"]);
    for field in ["loss", "perplexity"] {
        let (exact, rounded) = (number(&exact, field), number(&rounded, field));
        assert!(
            (rounded / exact - 1.0).abs() < 0.02,
            "{field}: {rounded} {exact}"
        );
    }
}
