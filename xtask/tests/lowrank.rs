//! `eval lowrank` as its users run it: on a model made for the test, and on a trained one where it lies beside the project.

#[path = "common/scene.rs"]
mod scene;

use std::path::Path;
use std::process::{Command, Output};

use scene::{Scene, error, rows};
use serde_json::{Value, json};
use tensor_io::Checkpoint;

fn llama() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }))
}

/// Runs a suite on the scene with more arguments.
fn eval(scene: &Scene, suite: &str, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", suite, "--json"])
        .args(["--model".as_ref(), scene.path("model").as_os_str()])
        .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
        .args(more)
        .output()
        .unwrap()
}

fn lowrank(scene: &Scene, more: &[&str]) -> Output {
    let calib = scene.path("calib.txt");
    let own = [
        "--calib",
        calib.to_str().unwrap(),
        "--calib-samples",
        "20",
        "--held-out-samples",
        "8",
    ];
    eval(scene, "lowrank", &[&own, more].concat())
}

fn number(row: &Value, field: &str) -> f64 {
    row[field]
        .as_f64()
        .unwrap_or_else(|| panic!("{field} in {row}"))
}

#[test]
fn every_combination_has_a_row_and_repairs_the_same_weights() {
    let scene = llama();
    let more = [
        "--compress",
        "rtn-int3,wanda-2:4",
        "--method",
        "none,svd,eora,eora-drift",
        "--rank",
        "2,4",
    ];
    let rows = rows(&lowrank(&scene, &more));
    assert_eq!(rows[0]["method"], "dense");
    let measured: Vec<&Value> = rows[1..]
        .iter()
        .filter(|row| row["role"] != "control")
        .collect();
    assert_eq!(measured.len(), 2 * (1 + 3 * 2));
    for row in &measured {
        assert_eq!(row["suite"], "lowrank");
        assert_eq!(row["layers"].as_array().unwrap().len(), 14);
        assert_eq!(row["perplexity_dense"], rows[0]["perplexity"]);
        assert!(number(row, "perplexity") > 1.0 && number(row, "seconds") > 0.0);
        assert!(number(row, "bytes") < number(row, "bytes_dense"), "{row}");
        if row["method"] == "none" {
            assert_eq!(row["loss"], row["loss_uncompensated"]);
            assert!(row.get("rank").is_none());
        } else {
            assert!(number(row, "loss") < number(row, "loss_uncompensated"));
        }
    }
    let of = |compress: &str, method: &str, rank: Option<u64>| {
        let same = |row: &&&Value| {
            row["compress"] == compress && row["method"] == method && row["rank"].as_u64() == rank
        };
        *measured.iter().find(same).unwrap()
    };
    for compress in ["rtn-int3", "wanda-2:4"] {
        let none = of(compress, "none", None);
        for rank in [2, 4] {
            let (svd, eora) = (
                of(compress, "svd", Some(rank)),
                of(compress, "eora", Some(rank)),
            );
            // The first linears are fed the same, whatever the method.
            let first = |row: &Value, field: &str| number(&row["layers"][0], field);
            assert_eq!(
                first(svd, "loss_uncompensated"),
                first(eora, "loss_uncompensated")
            );
            assert!(first(eora, "loss_calibration") <= first(svd, "loss_calibration") * 1.000001);
            // (m + n) r values of two bytes: q, k, v, o and the MLP of two blocks.
            let shapes = 2 * (64 + 48 + 48 + 64 + 3 * 96);
            let factors = number(eora, "bytes") - number(none, "bytes");
            assert_eq!(factors, (2 * rank * shapes) as f64, "{rank}");
        }
    }
    let controls: Vec<&Value> = rows.iter().filter(|row| row["role"] == "control").collect();
    assert!(!controls.is_empty());
    for control in controls {
        assert!(control["instead_of"].as_str().unwrap().contains(" + rank "));
    }
}

#[test]
fn the_printed_table_keeps_within_the_terminal_and_ends_in_a_verdict() {
    let scene = llama();
    let (calib, model, text) = (
        scene.path("calib.txt"),
        scene.path("model"),
        scene.path("text.txt"),
    );
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args([
            "eval",
            "lowrank",
            "--calib-samples",
            "20",
            "--held-out-samples",
            "8",
        ])
        .args(["--compress", "sparsegpt-2:4+gptq-int4-g16,rtn-int3"])
        .args(["--method", "none,svd,eora,eora-drift", "--rank", "2,4"])
        .args(["--calib".as_ref(), calib.as_os_str()])
        .args(["--model".as_ref(), model.as_os_str()])
        .args(["--text".as_ref(), text.as_os_str()])
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}");
    for line in printed.lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
    // Compression, method and rank with both output errors, perplexity and size on one line each.
    for compress in ["sparsegpt-2:4+gptq-int4-g16", "rtn-int3"] {
        for method in ["none", "svd", "eora", "eora-drift"] {
            let ranks: &[&str] = if method == "none" {
                &["–"]
            } else {
                &["2", "4"]
            };
            for rank in ranks {
                let is_row =
                    |words: &[&str]| words.len() >= 7 && words[..3] == [compress, method, rank];
                let words = printed
                    .lines()
                    .map(|line| line.split_whitespace().collect::<Vec<_>>());
                let rows = words.filter(|words| is_row(words));
                let row = rows.into_iter().next();
                let row = row.unwrap_or_else(|| panic!("{compress} {method} {rank}:\n{printed}"));
                for value in &row[3..6] {
                    assert!(value.parse::<f64>().is_ok(), "{row:?}");
                }
            }
        }
    }
    let flat = printed.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        flat.contains("EoRA <= SVD < none in ") && flat.contains(" of 4 cells"),
        "{printed}"
    );
}

#[test]
fn saved_results_open_and_a_resumed_run_says_the_same() {
    let scene = llama();
    let (save, state) = (scene.path("save"), scene.path("state"));
    let args = [
        "--compress",
        "gptq-int4-g16",
        "--method",
        "eora",
        "--rank",
        "3",
        "--no-controls",
        "--requantise",
        "gptq-int4-g16",
        "--resume",
        state.to_str().unwrap(),
    ];
    let saving = [
        &args[..],
        &[
            "--save-as",
            "adapter,compressed,gptq-v2,compressed-tensors,imatrix,merged,requantised,probe",
            "--save",
            save.to_str().unwrap(),
        ],
    ]
    .concat();
    let first = rows(&lowrank(&scene, &saving));
    for folder in [
        "compressed",
        "gptq-v2",
        "compressed-tensors",
        "merged",
        "requantised",
    ] {
        let checkpoint = Checkpoint::open(save.join(folder)).unwrap();
        let packed = checkpoint.config().get("quantization_config").is_some();
        assert_eq!(
            packed,
            ["gptq-v2", "compressed-tensors", "requantised"].contains(&folder),
            "{folder}"
        );
    }
    let adapter = std::fs::read(save.join("adapter/adapter_config.json")).unwrap();
    let adapter: Value = serde_json::from_slice(&adapter).unwrap();
    // An absolute path, which holds wherever the adapter is loaded from.
    let base = Path::new(adapter["base_model_name_or_path"].as_str().unwrap());
    assert!(base.is_absolute() && base.ends_with("save/gptq-v2"));
    Checkpoint::open(base).unwrap();
    let imatrix = tensor_io::imatrix::Imatrix::read(save.join("imatrix.gguf")).unwrap();
    assert!(imatrix.entries.contains_key("blk.0.ffn_down.weight"));
    lowrank_eora::output::Probe::open(save.join("probe.safetensors")).unwrap();
    assert!(number(&first[1], "loss_requantised") > number(&first[1], "loss"));

    std::fs::remove_file(state.join("gptq-int4-g16-eora-3/block-00001.safetensors")).unwrap();
    let again = rows(&lowrank(&scene, &args));
    for field in ["loss", "perplexity", "bytes"] {
        assert_eq!(first[1][field], again[1][field], "{field}");
    }
    let other = error(&lowrank(&scene, &[&args[..], &["--sequential"]].concat()));
    assert!(
        other.contains("another run") && other.contains("within_block"),
        "{other}"
    );
    let taken = error(&lowrank(&scene, &saving));
    assert!(taken.contains("exists already"), "{taken}");
}

#[test]
fn hidden_states_are_measured_where_asked_for() {
    let scene = llama();
    let row = &rows(&eval(&scene, "perplexity", &["--hidden-metrics"]))[0];
    for metric in ["mnn", "nuclear", "entropy"] {
        assert!(
            (0.0..=1.0).contains(&number(row, metric)),
            "{metric}: {row}"
        );
    }
    assert!(
        rows(&eval(&scene, "perplexity", &[]))[0]
            .get("mnn")
            .is_none()
    );
}

#[test]
fn wrong_names_and_texts_are_one_clear_line() {
    let scene = llama();
    let usage = lowrank(
        &scene,
        &["--compress", "gptq-int5", "--method", "eora", "--rank", "2"],
    );
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("int5"));
    let usage = lowrank(
        &scene,
        &["--compress", "rtn-int4", "--method", "eoro", "--rank", "2"],
    );
    assert!(String::from_utf8_lossy(&usage.stderr).contains("eora-drift"));
    let text = scene.path("text.txt");
    let same = [
        "--calib",
        text.to_str().unwrap(),
        "--compress",
        "rtn-int4",
        "--method",
        "eora",
        "--rank",
        "2",
    ];
    let same = error(&eval(&scene, "lowrank", &same));
    assert!(same.contains("has text of --text"), "{same}");
    let packed = [
        "--compress",
        "wanda-2:4",
        "--method",
        "eora",
        "--rank",
        "2",
        "--save",
        "x",
        "--save-as",
        "gptq",
    ];
    let packed = error(&lowrank(&scene, &packed));
    assert!(packed.contains("--save-as gptq"), "{packed}");
    let odd = ["--compress", "wanda-2:5", "--method", "eora", "--rank", "2"];
    let odd = error(&lowrank(&scene, &odd));
    assert!(odd.contains("model.layers.0.self_attn.q_proj"), "{odd}");
}

/// A scene whose MLP is 172 wide, which is no multiple of 8 codes of 4 bits in a word.
fn odd_width() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 172, "num_hidden_layers": 1,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }))
}

#[test]
fn what_cannot_be_written_or_run_is_refused_before_a_text_is_read() {
    let scene = odd_width();
    let save = scene.path("save");
    let save = save.to_str().unwrap();
    let wide = [
        "--compress",
        "gptq-int4-g128-sym",
        "--method",
        "eora",
        "--rank",
        "2",
    ];
    let cases: [(&[&str], &[&str]); 12] = [
        (
            &["--save-as", "gptq,adapter"],
            &["--save-as gptq", "mlp.gate_proj", "172 outputs"],
        ),
        (
            &["--save-as", "adapter"],
            &["--save-as adapter", "not saved", "compressed"],
        ),
        (
            &["--save-as", "lora-gguf"],
            &["--save-as lora-gguf", "add gguf"],
        ),
        (
            &["--save-as", "gguf"],
            &["--save-as gguf", "down_proj", "blocks of 32"],
        ),
        (
            &["--save-as", "requantised"],
            &["--save-as requantised", "--requantise"],
        ),
        (
            &["--method", "none", "--save-as", "adapter"],
            &["--save-as adapter", "none"],
        ),
        (
            &["--compress", "rtn-int4", "--save-as", "gptq"],
            &["--save-as gptq", "gptq-v2"],
        ),
        (
            &["--compress", "wanda-2:4", "--save-as", "gptq"],
            &["wanda-2:4", "groups"],
        ),
        (
            &["--compress", "wanda-2:5"],
            &["--compress wanda-2:5", "q_proj"],
        ),
        (&["--rank", "1000000"], &["--rank 1000000", "is 32"]),
        (&["--rank", "2,4,2"], &["--rank", "2 is given twice"]),
        (
            &["--method", "eora,svd,eora"],
            &["--method", "eora is given twice"],
        ),
    ];
    for (change, expected) in cases {
        let replaced = |flag: &str| change.contains(&flag);
        let kept = wide.chunks(2).filter(|pair| !replaced(pair[0])).flatten();
        let saved = match change.contains(&"--save-as") {
            true => vec!["--save", save],
            false => Vec::new(),
        };
        let flags: Vec<&str> = kept
            .copied()
            .chain(saved)
            .chain(change.iter().copied())
            .collect();
        // Nothing is there to calibrate on: the refusal comes first.
        let more = [&["--calib", "/nowhere/calib.txt"], &flags[..]].concat();
        let refused = error(&eval(&scene, "lowrank", &more));
        for words in expected {
            assert!(refused.contains(words), "{change:?}: {refused}");
        }
        assert!(!refused.contains("calib.txt"), "{refused}");
    }
    // A flag without what it changes is wrong usage.
    for lost in [&["--save-as", "compressed"][..], &["--overwrite"]] {
        let usage = lowrank(&scene, &[&wide[..], lost].concat());
        assert_eq!(usage.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&usage.stderr).contains("--save"));
    }
    let both = lowrank(&scene, &[&wide[..], &["--compressed", "x"]].concat());
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn without_factors_the_default_outputs_are_those_of_the_compressed_model() {
    let scene = llama();
    let save = scene.path("save");
    let flags = ["--compress", "rtn-int4", "--method", "none", "--rank", "2"];
    let row = &rows(&lowrank(
        &scene,
        &[&flags[..], &["--save", save.to_str().unwrap()]].concat(),
    ))[1];
    let saved: Vec<&String> = row["bytes_saved"].as_object().unwrap().keys().collect();
    assert_eq!(saved, ["compressed", "probe"]);
    assert!(save.join("compressed").is_dir() && !save.join("adapter").exists());
}

#[test]
fn reported_sizes_are_those_of_the_files() {
    let scene = llama();
    for (name, change) in [
        ("one-rank", &["--rank", "12"][..]),
        ("allocated", &["--rank", "12", "--allocate", "absolute"]),
        // More than o_proj and k_proj have.
        ("wide-rank", &["--rank", "32"]),
    ] {
        let save = scene.path(name);
        let flags = [
            "--compress",
            "rtn-int4-g16-sym",
            "--method",
            "eora",
            "--no-controls",
            "--save-as",
            "gptq,adapter",
            "--save",
            save.to_str().unwrap(),
        ];
        let row = &rows(&lowrank(&scene, &[&flags[..], change].concat()))[1];
        let bytes = |path: &str| {
            Checkpoint::open_file(save.join(path))
                .unwrap()
                .total_bytes()
        };
        let model = bytes("gptq/model.safetensors");
        let factors = bytes("adapter/adapter_model.safetensors");
        assert_eq!(row["bytes"], model + factors, "{name}");
        assert_eq!(row["bytes_factors"], factors, "{name}");
        assert_eq!(row["bytes_saved"]["gptq"], model);
        assert_eq!(row["bytes_saved"]["adapter"], factors);
    }
}

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
fn a_cell_that_fails_leaves_the_report_of_the_others() {
    let scene = llama();
    let state = scene.path("state");
    let flags = [
        "--compress",
        "rtn-int4",
        "--method",
        "none,svd,eora",
        "--rank",
        "3",
        "--no-controls",
        "--resume",
        state.to_str().unwrap(),
    ];
    let whole = rows(&lowrank(&scene, &flags));
    let block = state.join("rtn-int4-svd-3/block-00001.safetensors");
    let mut bytes = std::fs::read(&block).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&block, bytes).unwrap();
    let output = lowrank(&scene, &flags);
    let line = error(&output);
    assert!(
        line.contains("rtn-int4: svd at rank 3") && line.contains("block-00001"),
        "{line}"
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = report["rows"].as_array().unwrap();
    let methods: Vec<&Value> = found.iter().map(|row| &row["method"]).collect();
    assert_eq!(methods, ["dense", "none", "eora"]);
    assert_eq!(found[2]["perplexity"], whole[3]["perplexity"]);
    let failures = report["sections"][0]["failures"].as_array().unwrap();
    assert_eq!(failures.len(), 1);
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

#[shared_data::needed("models/stories260K", "data/text")]
#[test]
fn on_a_trained_model_eora_has_the_least_held_out_error() {
    let shared = Path::new(shared_data::path!(""));
    let path = |path: &str| shared.join(path).to_str().unwrap().to_owned();
    let text = path("data/text/tinystories_valid_30KB.txt");
    let calib = path("data/text/tinystories_train_1MiB.txt");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args([
            "eval",
            "lowrank",
            "--json",
            "--window",
            "256",
            "--samples",
            "10",
        ])
        .args([
            "--model",
            &path("models/stories260K"),
            "--text",
            &text,
            "--calib",
            &calib,
        ])
        .args([
            "--calib-samples",
            "32",
            "--held-out-samples",
            "16",
            "--no-controls",
        ])
        .args([
            "--compress",
            "wanda-2:4,rtn-int3",
            "--method",
            "none,svd,eora",
            "--rank",
            "8",
        ])
        .output()
        .unwrap();
    let rows = rows(&output);
    for cells in rows[1..].chunks(3) {
        let loss: Vec<f64> = cells.iter().map(|row| number(row, "loss")).collect();
        assert!(loss[2] <= loss[1] && loss[1] < loss[0], "{loss:?}");
        assert!(number(&cells[2], "perplexity") < number(&cells[0], "perplexity"));
    }
}

#[test]
fn a_count_of_nothing_is_wrong_usage_that_says_what_is_expected() {
    let usage = eval(&llama(), "perplexity", &["--samples", "0"]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("at least 1"));
}
