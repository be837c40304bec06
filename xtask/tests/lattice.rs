//! `eval lattice` as its users run it.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn lattice(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "lattice", "--json"])
        .args(args)
        .output()
        .unwrap()
}

fn report(output: &Output) -> Value {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_run_has_the_controls_and_tells_one_shot_from_fine_tuned() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().to_str().unwrap();
    let task = [
        "--task",
        "mod2",
        "--method",
        "lattice-context,strength",
        "--sparsity",
        "0.5",
    ];
    let report = report(&lattice(
        &[&task[..], &["--seeds", "2", "--out", folder]].concat(),
    ));
    let rows = report["rows"].as_array().unwrap();
    for method in [
        "lattice-context",
        "strength",
        "random",
        "threshold",
        "zero-whh",
    ] {
        for stage in ["one-shot", "fine-tuned"] {
            let row = rows
                .iter()
                .find(|row| row["method"] == method && row["stage"] == stage)
                .unwrap_or_else(|| panic!("no row of {method}, {stage}"));
            assert!(row["accuracy"].as_f64().is_some(), "{method} {stage}");
            assert_eq!(row["spread"]["accuracy"]["runs"], 2);
            assert_eq!(
                row["finetune_epochs"].as_u64(),
                Some(u64::from(stage == "fine-tuned"))
            );
        }
    }
    assert!(
        rows.iter().any(|row| row["method"] == "neurons removed"
            && row["tokens_per_second"].as_f64() > Some(0.0))
    );
    let page = std::fs::read_to_string(out.path().join("report.html")).unwrap();
    assert!(page.contains("Hasse diagram"));
}

#[test]
fn wrong_settings_and_files_are_named() {
    for (args, code, names) in [
        (&["--sparsity", "1"][..], 2, "--sparsity"),
        (&["--task", "mod4"], 2, "mod4"),
        (&["--method", "flap"], 2, "flap"),
        (
            &[
                "--weights",
                "absent.safetensors",
                "--vocab",
                "v.json",
                "--text",
                "t.txt",
            ],
            1,
            "absent.safetensors",
        ),
        (&["--weights", "absent.safetensors"], 2, "--vocab"),
        (&["--device", "cuda"], 2, "--device"),
        (&["--window", "64"], 2, "--window"),
        (&["--samples", "8"], 2, "--samples"),
        (
            &["--method", "span,block-8x4", "--wiring", "feedback:8+8"],
            2,
            "block-8x4",
        ),
    ] {
        let output = lattice(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(names), "{args:?}: {stderr}");
    }
}

#[test]
fn flags_that_would_have_no_effect_are_refused() {
    for (line, names) in [
        ("--method span --compete global", "--compete"),
        ("--method span --densities 0.5,0.5,0.5,0.5", "--densities"),
        (
            "--method magnitude --compete global --densities 0.5,0.5,0.5,0.5",
            "--densities",
        ),
        ("--method span --keep-diagonal", "--keep-diagonal"),
        (
            "--method block-8x4 --scope i2h --keep-diagonal",
            "--keep-diagonal",
        ),
        ("--method span --rewire 0.5", "--rewire"),
        ("--repair none --ridge 0.1", "--ridge"),
        ("--repair merge --no-constant", "--no-constant"),
        ("--method magnitude --merge-passes 3", "--merge-passes"),
        ("--finetune-epochs 0 --gradual 0.5", "--gradual"),
        ("--gradual-every 5", "--gradual"),
        ("--task mod2 --augment none", "--augment"),
        ("--method er --scope both", "--scope both"),
        ("--sparsity 0.5 --densities 0.5", "--densities"),
        ("--save out", "--weights"),
        (
            "--weights a.onnx --task vad:x --save out --cells c",
            "--save",
        ),
        ("--weights a.onnx --task vad:x --hidden 8", "--hidden"),
        ("--weights a.onnx --task vad:x --epochs 8", "--epochs"),
        (
            "--weights a.onnx --task vad:x --examples 8,8,8",
            "--examples",
        ),
        ("--examples 8,8", "--examples"),
        ("--hidden 8+0", "--hidden"),
    ] {
        let args: Vec<&str> = line.split(' ').collect();
        let output = lattice(&args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}: {stderr}");
        assert!(stderr.contains(names), "{line}: {stderr}");
    }
}

#[test]
fn values_that_no_run_can_use_are_refused() {
    let most = u64::MAX;
    for (line, names) in [
        (
            format!("--seed {most}"),
            String::from("at most 9223372036854775807"),
        ),
        (format!("--seed {} --seeds 5", most - 3), "--seed".into()),
        (format!("--seeds {most}"), "at most 10000".into()),
        (format!("--structures {most}"), "at most 10000".into()),
        (format!("--hidden {most}"), "at most 16384".into()),
        (format!("--hidden 8+{most}"), "at most 16384".into()),
        (
            format!("--wiring feedback:{most}+1"),
            "at most 16384".into(),
        ),
        (format!("--examples {most},1,1"), "--examples".into()),
        (format!("--epochs {most}"), "--epochs".into()),
        (
            format!("--finetune-epochs {most}"),
            "--finetune-epochs".into(),
        ),
        (
            "--task reber,reber".into(),
            "--task: reber is given twice".into(),
        ),
        (
            "--task mod2 --task mod2".into(),
            "--task: mod2 is given twice".into(),
        ),
        ("--cell gru,gru".into(), "--cell: gru".into()),
        ("--method span,span".into(), "--method: span".into()),
        ("--sparsity 0.5,0.50".into(), "--sparsity: 0.5".into()),
        ("--repair none,none".into(), "--repair: none".into()),
    ] {
        let args: Vec<&str> = line.split(' ').collect();
        let output = lattice(&args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}: {stderr}");
        assert!(stderr.contains(&names), "{line}: {stderr}");
    }
}

#[test]
fn a_network_that_fails_leaves_the_others() {
    let line = "--method span --sparsity 0.5 --epochs 1 --seeds 1 --finetune-epochs 0 --task";
    let run = |tasks: &str| {
        let args: Vec<&str> = line.split(' ').chain([tasks]).collect();
        let output = lattice(&args);
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("absent.txt"), "{stderr}");
        output.stdout
    };
    for tasks in ["mod2,text:absent.txt", "text:absent.txt,mod2"] {
        let report: Value = serde_json::from_slice(&run(tasks)).unwrap();
        let rows = report["rows"].as_array().unwrap();
        assert!(rows.iter().any(|row| row["method"] == "span"), "{tasks}");
        let failures = report["sections"][0]["failures"].as_array().unwrap();
        assert_eq!(failures.len(), 1);
        let failure = failures[0].as_str().unwrap();
        assert!(
            failure.starts_with("text:absent.txt, lstm, seed 0: "),
            "{failure}"
        );
    }
    assert!(run("text:absent.txt").is_empty());
    // Where a run says how long it will take, too.
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "lattice"])
        .args(line.split(' ').chain(["text:absent.txt,mod2", "--out"]))
        .arg(tempfile::tempdir().unwrap().path())
        .output()
        .unwrap();
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    assert!(String::from_utf8_lossy(stdout).contains(" span "));
    assert!(String::from_utf8_lossy(stderr).contains("absent.txt"));
}

#[test]
fn pruning_repair_and_training_are_set_on_the_command_line() {
    let line = "--task mod2,reber --method magnitude,span,block-8x4 --sparsity 0.5 --scope both --weigh-inputs --keep-diagonal \
        --merge-passes 2 --ridge 1e-3 --gradual 0.5 --gradual-every 2 --hidden 16 --epochs 1 --examples 200,50,60 --seeds 1";
    let args: Vec<&str> = line.split_whitespace().collect();
    let report = report(&lattice(&args));
    let rows = report["rows"].as_array().unwrap();
    let has = |method: &str, repair: &str, stage: &str| {
        let same = |row: &&Value| {
            row["method"] == method && row["repair"] == repair && row["stage"] == stage
        };
        rows.iter().find(same).cloned()
    };
    let gradual = has("magnitude", "none", "gradual").unwrap();
    assert_eq!(gradual["of W_hh and W_ih"], "50.0 %");
    assert!(has("span", "merge", "one-shot").unwrap()["neurons"] == "11");
    let block = has("block-8x4", "refit", "one-shot").unwrap();
    assert!(block["int8"].as_f64().is_some() && block["removed exactly"].as_u64().is_some());
    assert!(has("span", "none", "gradual").is_none());
}

#[test]
fn a_network_with_feedback_and_random_structures_are_measured_for_each_task_and_cell() {
    let line = "--task mod2 --cell gru,tanh --method span --sparsity 0.5 --wiring feedback:6+6 --structures 1 --epochs 1 \
        --examples 100,50,60 --seeds 1 --finetune-epochs 0";
    let args: Vec<&str> = line.split_whitespace().collect();
    let report = report(&lattice(&args));
    let rows = report["rows"].as_array().unwrap();
    for cell in ["gru", "tanh"] {
        let model = format!("mod2, feedback:6+6 {cell}");
        let merged = |row: &&Value| row["model"] == *model && row["repair"] == "merge";
        let row = rows.iter().find(merged).unwrap();
        let layers: Vec<usize> = row["neurons"]
            .as_str()
            .unwrap()
            .split('+')
            .map(|n| n.parse().unwrap())
            .collect();
        assert_eq!((layers.len(), layers.iter().sum::<usize>()), (2, 8));
        let plain = |row: &&Value| row["model"] == *model && row["method"] == "span";
        let row = rows.iter().find(plain).unwrap();
        assert!(row["reach kept"].is_number() && row["reach kept (2)"].is_number());
        let graphs = |row: &&Value| row["model"] == format!("mod2 {cell}") && row["method"] == "ba";
        assert!(rows.iter().any(|row| graphs(&row)));
    }
}

/// A random LSTM of 6 inputs and 8 neurons, and recorded clips for it.
fn recorded(dir: &Path) -> (String, String) {
    use candle_core::{Device, Tensor};
    use prune_lattice::Cell;
    use prune_lattice::rnn::{InputKind, Rnn, RnnConfig};
    let shape = RnnConfig::new(Cell::Lstm, InputKind::Dense { dim: 6 }, [8], 1);
    let weights = dir.join("model.safetensors");
    Rnn::new(shape, 5).unwrap().save(&weights).unwrap();
    let clips = dir.join("clips");
    std::fs::create_dir(&clips).unwrap();
    for (name, count) in [("train", 6), ("test", 3)] {
        let values: Vec<f32> = (0..count * 40 * 6)
            .map(|k| (k as f32 * 0.71).sin())
            .collect();
        let labels: Vec<u8> = (0..count * 40).map(|k| u8::from(k % 7 < 3)).collect();
        let tensors = std::collections::HashMap::from([
            (
                "features".to_owned(),
                Tensor::from_vec(values, (count, 40, 6), &Device::Cpu).unwrap(),
            ),
            (
                "labels".to_owned(),
                Tensor::from_vec(labels, (count, 40), &Device::Cpu).unwrap(),
            ),
        ]);
        prune_lattice::io::save(&tensors, &clips.join(format!("{name}.safetensors"))).unwrap();
    }
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    (text(&weights), format!("vad:{}", text(&clips)))
}

#[test]
fn a_network_from_a_file_is_measured_once_by_methods_that_draw_nothing_and_saved() {
    use prune_lattice::rnn::{CheckpointNames, Rnn};
    let dir = tempfile::tempdir().unwrap();
    let (weights, task) = recorded(dir.path());
    let saved = dir.path().join("pruned");
    let args = [
        "--weights",
        &weights,
        "--task",
        &task,
        "--method",
        "magnitude,span,random-neurons",
        "--sparsity",
        "0.75",
        "--finetune-epochs",
        "0",
        "--save",
        saved.to_str().unwrap(),
    ];
    let found = report(&lattice(&args));
    let rows = found["rows"].as_array().unwrap();
    let runs = |method: &str| {
        let row = rows.iter().find(|row| row["method"] == method).unwrap();
        row["spread"]["AUC"]["runs"].as_u64()
    };
    assert_eq!((runs("random"), runs("random-neurons")), (Some(3), Some(3)));
    assert_eq!((runs("magnitude"), runs("span")), (None, None));
    let names = CheckpointNames::default().with(|c| c.dense_input = true);
    let open = |name: &str| Rnn::load(&saved.join(name), &names).unwrap();
    let zeros = |rnn: &Rnn| {
        let w = &rnn.params().get("rnn.weight_hh_l0").unwrap().data;
        w.iter().filter(|w| **w == 0.0).count()
    };
    assert_eq!(zeros(&open("magnitude-refit-0.75.safetensors")), 192);
    assert_eq!(open("span-merge-0.75.safetensors").config().hidden, [4]);
    for seed in 0..3 {
        open(&format!("random-0.75-seed{seed}.safetensors"));
    }
    // What is there is not replaced.
    let again = lattice(&args);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("--save"));
}

#[shared_data::needed("models/silero_vad", "data/vad")]
#[test]
fn the_shipped_silero_vad_is_pruned_in_its_own_file() {
    let shared = Path::new(shared_data::path!(""));
    let dir = tempfile::tempdir().unwrap();
    let task = format!("vad:{}", shared.join("data/vad").display());
    let saved = dir.path().join("pruned");
    let run = |weights: &Path, more: &[&str]| {
        let network = [
            "--weights",
            weights.to_str().unwrap(),
            "--node",
            "If_0_then_branch__Inline_0__/decoder/rnn/LSTM",
            "--read-out",
            "If_0_then_branch__Inline_0__decoder.decoder.2",
            "--read-out-activation",
            "relu",
            "--task",
            &task,
            "--seeds",
            "1",
            "--sparsity",
            "0.75",
            "--finetune-epochs",
            "0",
        ];
        report(&lattice(&[&network[..], more].concat()))
    };
    let auc = |report: &Value, method: &str, repair: &str| {
        let rows = report["rows"].as_array().unwrap();
        let row = rows
            .iter()
            .find(|row| row["method"] == method && row["repair"] == repair);
        row.unwrap()["AUC"].as_f64().unwrap()
    };
    let shipped = shared.join("models/silero_vad/silero_vad.onnx");
    let folder = saved.to_str().unwrap();
    let pruned = run(&shipped, &["--method", "magnitude", "--save", folder]);
    assert!((auc(&pruned, "dense", "none") - 0.998_203).abs() < 1e-5);
    // The written file holds the network of the row, and nothing else has changed.
    let file = saved.join("magnitude-refit-0.75.onnx");
    let again = run(&file, &["--method", "dense", "--repair", "none"]);
    let (row, written) = (
        auc(&pruned, "magnitude", "refit"),
        auc(&again, "dense", "none"),
    );
    assert!((row - written).abs() < 1e-6, "{row} {written}");
    let sizes = [shipped, file].map(|f| std::fs::metadata(f).unwrap().len());
    assert_eq!(sizes[0], sizes[1]);
}

#[shared_data::needed("models/tfcharrnn_shakespeare", "data/text")]
#[test]
fn the_loss_of_a_trained_character_network_is_in_bits() {
    let shared = Path::new(shared_data::path!(""));
    let model = shared.join("models/tfcharrnn_shakespeare");
    let path = |file: &str| model.join(file).to_str().unwrap().to_owned();
    // A piece of the text keeps the test short.
    let text = std::fs::read_to_string(shared.join("data/text/tinyshakespeare.txt")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let piece = dir.path().join("text.txt");
    std::fs::write(&piece, &text[..40_000]).unwrap();
    let (weights, vocab) = (path("model.safetensors"), path("vocab.json"));
    let files = [
        "--weights",
        &weights,
        "--vocab",
        &vocab,
        "--text",
        piece.to_str().unwrap(),
    ];
    let run = [
        "--method",
        "magnitude",
        "--sparsity",
        "0.5",
        "--seeds",
        "1",
        "--finetune-epochs",
        "0",
    ];
    let report = report(&lattice(&[&files[..], &run].concat()));
    let bits = |method: &str| {
        let rows = report["rows"].as_array().unwrap();
        rows.iter().find(|row| row["method"] == method).unwrap()["bits"]
            .as_f64()
            .unwrap()
    };
    assert!(bits("dense") > 1.0 && bits("dense") < 3.0);
    assert!(bits("dense") < bits("magnitude") && bits("magnitude") < bits("zero-whh"));
}
