//! Rows, tables and files of compressors and repairs.

use crate::scene::{error, rows};
use crate::{eval, llama, lowrank, number};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tensor_io::Checkpoint;

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

/// The bytes of all tensors in a safetensors file, as its header says where they are.
fn tensor_bytes(file: &Path) -> u64 {
    let bytes = std::fs::read(file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let end = 8 + header as usize;
    let tensors: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    let tensors = tensors.as_object().unwrap().iter();
    let tensors = tensors.filter(|(name, _)| *name != "__metadata__");
    let sizes = tensors.map(|(name, tensor)| {
        let [start, end] = [0, 1].map(|i| tensor["data_offsets"][i].as_u64().unwrap());
        let shape = tensor["shape"].as_array().unwrap().iter();
        let elements: u64 = shape.map(|n| n.as_u64().unwrap()).product();
        let size = match tensor["dtype"].as_str().unwrap() {
            "I64" => 8,
            "I32" | "F32" => 4,
            "F16" | "BF16" => 2,
            "I8" | "U8" => 1,
            other => panic!("{name}: {other}"),
        };
        assert_eq!(end - start, elements * size, "{name}");
        end - start
    });
    let total: u64 = sizes.sum();
    assert_eq!(total, (bytes.len() - end) as u64);
    total
}

#[test]
fn the_reported_size_of_compressed_tensors_is_that_of_the_tensors_in_the_file() {
    let scene = llama();
    for compressor in [
        "rtn-int4-g16-sym",
        "rtn-int4-g16",
        "rtn-int8-g32-sym",
        "gptq-int4-g16-sym-act",
    ] {
        let save = scene.path(compressor);
        let flags = [
            "--compress",
            compressor,
            "--method",
            "none,eora",
            "--rank",
            "3",
        ];
        let to = ["--no-controls", "--save-as", "compressed-tensors", "--save"];
        let saved = [&to[..], &[save.to_str().unwrap()]].concat();
        let found = rows(&lowrank(&scene, &[&flags[..], &saved].concat()));
        for (row, folder) in found[1..].iter().zip(["none", "eora-3"]) {
            let folder = save.join(format!("{compressor}-{folder}/compressed-tensors"));
            let bytes = tensor_bytes(&folder.join("model.safetensors"));
            assert_eq!(
                row["bytes_saved"]["compressed-tensors"], bytes,
                "{folder:?}"
            );
            let names = row["bytes_saved"].as_object().unwrap().keys();
            assert_eq!(names.collect::<Vec<_>>(), ["compressed-tensors"]);
        }
        assert_eq!(found.len(), 3);
    }
}

#[test]
fn too_few_calibration_tokens_are_said_with_the_damping_that_was_enough() {
    let scene = llama();
    let calib = scene.path("calib.txt");
    // One window has half as many tokens as a linear has inputs.
    let run = |compressor: &str, windows: &str| {
        let few = [
            "--calib",
            calib.to_str().unwrap(),
            "--calib-samples",
            windows,
        ];
        let flags = [
            "--compress",
            compressor,
            "--method",
            "none",
            "--no-controls",
        ];
        let rest = ["--held-out-samples", "4"];
        rows(&eval(
            &scene,
            "lowrank",
            &[&few[..], &flags, &rest].concat(),
        ))[1]
            .clone()
    };
    let row = run("gptq-int4-damp0", "1");
    assert_eq!(row["damping_raised"], 14);
    let damping = number(&row, "damping");
    // Tenfold from 1e-8, as often as it takes.
    let steps = (damping / 1e-8).log10();
    assert!(
        (steps - steps.round()).abs() < 1e-9 && steps > -0.5,
        "{damping}"
    );
    let note = format!(
        "gptq-int4-damp0: damping had to grow in 14 of 14 linears, up to {} of the mean diagonal: the calibration tokens are too few",
        format!("1e{}", steps.round() - 8.0).parse::<f64>().unwrap(),
    );
    assert_eq!(row["notes"], serde_json::json!([note]));
    // What it ended with is enough to begin with.
    let enough = run(&format!("gptq-int4-damp{damping}"), "1");
    assert_eq!(
        (&enough["damping_raised"], &enough["damping"]),
        (&0.into(), &damping.into())
    );
    assert!(enough.get("notes").is_none(), "{enough}");
    // Enough tokens need none, and the usual damping is said as well.
    let many = run("gptq-int4", "40");
    assert_eq!(
        (&many["damping_raised"], &many["damping"]),
        (&0.into(), &0.01.into())
    );
    assert!(many.get("notes").is_none(), "{many}");
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
