//! Models that another tool compressed, and mixtures.

use crate::scene::{Scene, error, rows};
use crate::{llama, lowrank, number, odd_width};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use tensor_io::Checkpoint;

#[test]
fn experts_of_a_mixture_are_said_to_be_left_and_folders_that_would_hide_it_are_refused() {
    let scene = Scene::new(json!({
        "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
        "num_local_experts": 4,
    }));
    let run = [
        "--compress",
        "rtn-int4-g32",
        "--method",
        "none",
        "--rank",
        "2",
    ];
    let output = lowrank(&scene, &run);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let fact = report["sections"][0]["protocol"]["experts"]
        .as_str()
        .unwrap();
    // 2 x 4 experts of 3 x 32 x 32 weights, beside 2 x 3,072 of attention, 2 x 128 of routers, 160 of norms and 512 of
    // embedding and head.
    let share = 100.0 * 24_576.0 / f64::from(24_576 + 6_144 + 256 + 160 + 512);
    assert!(
        fact.starts_with(&format!("left as they are, {share:.0} % of the parameters")),
        "{fact}"
    );
    let save = scene.path("saved").display().to_string();
    for form in ["gptq", "gptq-v2", "compressed-tensors"] {
        let refused = error(&lowrank(
            &scene,
            &[&run[..], &["--save", &save, "--save-as", form]].concat(),
        ));
        assert!(
            refused.contains(form) && refused.contains("experts stay floats"),
            "{refused}"
        );
    }
    let kept = lowrank(
        &scene,
        &[&run[..], &["--save", &save, "--save-as", "compressed"]].concat(),
    );
    assert!(
        kept.status.success(),
        "{}",
        String::from_utf8_lossy(&kept.stderr)
    );
}

#[test]
fn a_gptq_folder_of_another_tool_is_repaired_with_its_own_size() {
    let scene = llama();
    let (made, save) = (scene.path("made"), scene.path("save"));
    let compress = [
        "--compress",
        "rtn-int4-g16-sym",
        "--method",
        "none",
        "--rank",
        "2",
    ];
    let to = ["--save-as", "gptq-v2", "--save", made.to_str().unwrap()];
    let own = rows(&lowrank(&scene, &[&compress[..], &to].concat()));
    let folder = made.join("gptq-v2");
    let given = [
        "--compressed",
        folder.to_str().unwrap(),
        "--method",
        "none,eora",
        "--rank",
        "4",
        "--save",
        save.to_str().unwrap(),
    ];
    let found = rows(&lowrank(&scene, &given));
    let (none, eora) = (&found[1], &found[2]);
    assert_eq!(none["compress"], "gptq-v2");
    for field in ["loss", "perplexity"] {
        assert_eq!(none[field], own[1][field], "{field}");
    }
    let bytes = Checkpoint::open(&folder).unwrap().total_bytes();
    assert_eq!(none["bytes"], bytes);
    assert_eq!(
        number(eora, "bytes"),
        bytes as f64 + number(eora, "bytes_factors")
    );
    assert!(number(eora, "loss") < number(none, "loss"));
    // The adapter names the folder that it was fitted to.
    let adapter = save.join("gptq-v2-eora-4/adapter/adapter_config.json");
    let adapter: Value = serde_json::from_slice(&std::fs::read(adapter).unwrap()).unwrap();
    assert_eq!(adapter["base_model_name_or_path"], folder.to_str().unwrap());
    // More bits instead of factors.
    let control = found.iter().find(|row| row["role"] == "control").unwrap();
    assert!(
        control["compress"].as_str().unwrap().starts_with("rtn-int"),
        "{control}"
    );
    let other = error(&lowrank(&odd_width(), &given[..6]));
    assert!(other.contains("--compressed"), "{other}");
}

#[test]
fn every_folder_that_is_saved_is_what_was_measured_when_it_comes_back() {
    let scene = llama();
    for (compressor, form) in [
        // Whose first version stores zero points less one.
        ("rtn-int4-g16-sym", "gptq"),
        ("gptq-int4-g16-sym-act", "gptq"),
        ("rtn-int4-g16", "compressed-tensors"),
        ("rtn-int8-g32-sym", "compressed-tensors"),
        // Floats that are zero or as they were.
        ("wanda-2:4", "compressed"),
    ] {
        let what = format!("{compressor} {form}");
        let made = scene.path(&what.replace(' ', "-"));
        let compress = [
            "--compress",
            compressor,
            "--method",
            "none",
            "--no-controls",
        ];
        let to = ["--save-as", form, "--save", made.to_str().unwrap()];
        let own = rows(&lowrank(&scene, &[&compress[..], &to].concat()));
        let folder = made.join(form);
        let given = ["--compressed", folder.to_str().unwrap(), "--no-controls"];
        let methods = ["--method", "none,eora", "--rank", "4"];
        let found = rows(&lowrank(&scene, &[&given[..], &methods].concat()));
        let (none, eora) = (&found[1], &found[2]);
        assert_eq!(
            (&none["method"], &none["compress"]),
            (&json!("none"), &json!(form)),
            "{what}"
        );
        for field in ["loss", "perplexity", "perplexity_dense"] {
            assert_eq!(none[field], own[1][field], "{what}: {field}");
        }
        assert_ne!(none["perplexity"], none["perplexity_dense"], "{what}");
        let bytes = Checkpoint::open(&folder).unwrap().total_bytes();
        assert_eq!(none["bytes"], bytes, "{what}");
        assert!(number(eora, "loss") < number(none, "loss"), "{what}");
        // The folder itself says the same.
        let alone = rows(&crate::eval_model(&scene, &folder, &[]));
        let ratio = number(&alone[0], "perplexity") / number(none, "perplexity");
        assert!((ratio - 1.0).abs() < 1e-5, "{what}: {ratio}");
    }
}

#[test]
fn an_adapter_that_was_saved_by_a_relative_path_leads_to_its_base_from_elsewhere() {
    let scene = llama();
    let at = scene.path("");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .current_dir(&at)
        .args(["eval", "lowrank", "--json", "--model", "model"])
        .args(["--text", "text.txt", "--calib", "calib.txt"])
        .args(["--calib-samples", "20", "--held-out-samples", "8"])
        .args(["--compress", "rtn-int4-g16-sym", "--no-controls"])
        .args(["--method", "eora", "--rank", "4"])
        .args(["--save-as", "adapter,gptq", "--save", "here/saved"])
        .output()
        .unwrap();
    let eora = &rows(&output)[1];
    let adapter = at.join("here/saved/adapter");
    let config = std::fs::read(adapter.join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let base = config["base_model_name_or_path"].as_str().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let measured = |model: &str| -> Value {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .current_dir(elsewhere.path())
            .args(["eval", "perplexity", "--json", "--model", model])
            .args(["--adapter".as_ref(), adapter.as_os_str()])
            .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
            .output()
            .unwrap();
        rows(&output);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let gptq = at.join("here/saved/gptq");
    for model in [base, gptq.to_str().unwrap()] {
        let report = measured(model);
        assert_eq!(report["sections"][0].get("remarks"), None, "{model}");
        let ratio = number(&report["rows"][0], "perplexity") / number(eora, "perplexity");
        assert!((ratio - 1.0).abs() < 1e-5, "{model}: {ratio}");
    }
    // The factors fit the original as well, and the report says that they were not made for it.
    let report = measured(scene.path("model").to_str().unwrap());
    let remarks = report["sections"][0]["remarks"].to_string();
    assert!(
        remarks.contains(&format!("names {base} as the model")),
        "{remarks}"
    );
}

#[shared_data::needed("models/stories260K", "data/text")]
#[test]
fn a_gguf_file_is_repaired_beside_its_original_and_gets_a_lora_of_its_own_kind() {
    let folder = tempfile::tempdir().unwrap();
    let shared = Path::new(shared_data::path!(""));
    let run = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args([
                "eval",
                "lowrank",
                "--json",
                "--window",
                "256",
                "--samples",
                "8",
            ])
            .args([
                "--calib-samples",
                "24",
                "--held-out-samples",
                "8",
                "--no-controls",
            ])
            .arg("--model")
            .arg(shared.join("models/stories260K"))
            .arg("--text")
            .arg(shared.join("data/text/tinystories_valid_30KB.txt"))
            .arg("--calib")
            .arg(shared.join("data/text/tinystories_train_1MiB.txt"))
            .args(more)
            .output()
            .unwrap();
        rows(&output)
    };
    let (made, save) = (folder.path().join("made"), folder.path().join("save"));
    // Four bits, and f16 for down_proj, whose rows are no whole blocks.
    let compress = ["--compress", "q4_0", "--method", "none", "--rank", "8"];
    let to = ["--save-as", "gguf", "--save", made.to_str().unwrap()];
    let own = run(&[&compress[..], &to].concat());
    let file = made.join("model.gguf");
    let given = [
        "--compressed",
        file.to_str().unwrap(),
        "--method",
        "none,eora",
        "--rank",
        "8",
        "--save",
        save.to_str().unwrap(),
    ];
    let found = run(&given);
    let (none, eora) = (&found[1], &found[2]);
    let gguf = tensor_io::gguf::Gguf::open(&file).unwrap();
    assert_eq!(none["bytes"], gguf.total_bytes());
    // Embeddings and norms are those of the original, so that the rows are those of the compressor.
    assert!((number(none, "perplexity") / number(&own[1], "perplexity") - 1.0).abs() < 1e-4);
    assert!(number(eora, "loss") < 0.9 * number(none, "loss"));
    assert!(number(eora, "perplexity") < number(none, "perplexity"));
    let lora = save.join("model.gguf-eora-8/lora.gguf");
    let lora = tensor_io::gguf::Gguf::open(lora).unwrap();
    assert_eq!(eora["bytes_factors"], lora.total_bytes());
    let architecture = lora.metadata().get_str("general.architecture").unwrap();
    assert_eq!(
        architecture,
        gguf.metadata().get_str("general.architecture").unwrap()
    );
}
