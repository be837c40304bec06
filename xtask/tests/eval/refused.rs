//! What is refused, and when.

use crate::scene::{Scene, error, rows};
use crate::{llama, mixtral, structured};
use serde_json::json;
use std::process::Command;

/// A scene whose calibration text is too short: whatever gets as far as cutting it says so.
fn without_calibration(scene: Scene) -> Scene {
    std::fs::write(scene.path("calib.txt"), "a b").unwrap();
    scene
}

#[test]
fn what_is_known_beforehand_is_refused_before_calibration_by_flag_and_value() {
    let scene = without_calibration(llama());
    let run = |words: &str| {
        let words: Vec<&str> = words.split(' ').collect();
        error(&structured(&scene, &words))
    };
    assert!(run("--method flap --ratio 0.2").contains("calib.txt"));
    std::fs::create_dir(scene.path("there")).unwrap();
    std::fs::create_dir(scene.path("plans")).unwrap();
    std::fs::write(scene.path("plans/flap-0.2.json"), "{}").unwrap();
    let there = scene.path("there").display().to_string();
    let model = scene.path("model").display().to_string();
    let plans = scene.path("plans").display().to_string();
    for (words, flag, value) in [
        (
            "--method structprune-softmax --ratio 0.2 --temperature 0",
            "--temperature",
            "0",
        ),
        (
            "--method structprune --ratio 0.2 --max-ratio 5",
            "--max-ratio",
            "5",
        ),
        (
            "--method structprune --ratio 0.5 --max-ratio 0.1",
            "--ratio",
            "0.5",
        ),
        (
            "--method flap --ratio 0.2 --min-neurons 10000",
            "--min-neurons",
            "10000",
        ),
        (
            "--method flap --ratio 0.2 --min-attention 9",
            "--min-attention",
            "9",
        ),
        (
            "--method flap --ratio 0.2 --align 10000",
            "--align",
            "10000",
        ),
        ("--method rd-dp --ratio 0.2 --ridge nan", "--ridge", "NaN"),
        ("--method rd-dp --ratio 0.2 --ridge=-1", "--ridge", "-1"),
        ("--method rd-dp --ratio 0.2 --ridge inf", "--ridge", "inf"),
        ("--method flap,rd-dp --ratio 0.2,0.99", "--ratio", "0.99"),
        (
            "--method flap --ratio 0.2 --uniform --min-neurons 56",
            "--ratio",
            "0.2",
        ),
        ("--method tyr --ratio 0.2 --uniform", "--uniform", "true"),
        ("--method tyr --ratio 0.2 --offspring 0", "--offspring", "0"),
        (
            "--method tyr --ratio 0.2 --offspring 18446744073709551615",
            "--offspring",
            "at most 1,000,000",
        ),
        (
            "--method tyr --ratio 0.2 --generations 18446744073709551615",
            "--generations",
            "at most 1,000,000",
        ),
        (
            "--method rd-dp --ratio 0.2 --top-k 0",
            "--top-k",
            "at least 1",
        ),
        ("--method flap --ratio 0.2 --seeds 7", "--seeds", "flap"),
        (
            "--method flap --ratio 0.2 --overwrite",
            "--overwrite",
            "--save-plans",
        ),
        (
            "--method magnitude,reap,topk-plain --ratio 0.2",
            "--method reap",
            "dense model",
        ),
        (
            "--method magnitude --ratio 0.2 --compensate none,expert-scale",
            "--compensate expert-scale",
            "dense model",
        ),
        (
            "--method magnitude --ratio 0.2 --compensate auto,expert-scale",
            "--compensate expert-scale",
            "dense model",
        ),
        (
            "--ratio 0.2 --compensate expert-scale",
            "--compensate expert-scale",
            "dense model",
        ),
        (
            "--method magnitude --ratio 0.2 --compensate auto,novice",
            "--compensate novice",
            "dense model",
        ),
        (
            &format!("--method flap --ratio 0.2 --save {model} --overwrite"),
            "--save",
            "--model",
        ),
        (
            &format!("--method flap --ratio 0.2 --save {model}/../model --overwrite"),
            "--save",
            "--model",
        ),
        (
            "--method rd-dp --ratio 0.2 --compensate bias",
            "--compensate",
            "bias",
        ),
        (
            "--method flap,flap --ratio 0.2",
            "--method",
            "flap is given twice",
        ),
        (
            "--method flap --ratio 0.2,0.4,0.20",
            "--ratio",
            "0.2 is given twice",
        ),
        (
            "--method flap --ratio 0.2 --temperature 2",
            "--temperature",
            "flap",
        ),
        (
            "--method flap --ratio 0.2 --max-ratio 0.5",
            "--max-ratio",
            "flap",
        ),
        (
            "--method magnitude --ratio 0.2 --ridge 0.1",
            "--ridge",
            "magnitude",
        ),
        ("--method flap --ratio 0.2 --convex", "--convex", "flap"),
        (
            "--method rd-dp --ratio 0.2 --iterations 2",
            "--iterations",
            "rd-dp",
        ),
        (
            "--method flap --ratio 0.2 --quantise rtn-int4",
            "--quantise",
            "mixture",
        ),
        (
            "--method flap --ratio 0.2 --progressive",
            "--progressive",
            "mixture",
        ),
        (
            "--method flap --ratio 0.2 --topk-rank 8",
            "--topk-rank",
            "mixture",
        ),
        (
            "--method flap --ratio 0.2 --reconstruct never",
            "--reconstruct",
            "mixture",
        ),
        (
            "--method flap --ratio 0.2 --pool-tokens 4",
            "--pool-tokens",
            "mixture",
        ),
        (
            "--method flap --ratio 0.2 --expert-prior 0",
            "--expert-prior",
            "mixture",
        ),
        (
            "--method flap --ratio 0.2 --no-gate-weight",
            "--no-gate-weight",
            "mixture",
        ),
        (
            "--method flap --ratio 0.2 --save new --layout fused",
            "--layout",
            "mixture",
        ),
        (
            &format!("--method flap --ratio 0.2 --save {there}"),
            "--save",
            "exists",
        ),
        (
            "--method flap --ratio 0.2 --save /proc/none/pruned",
            "--save",
            "/proc/none",
        ),
        (
            "--method flap --ratio 0.2 --save a --dry-run",
            "--save",
            "--dry-run",
        ),
        (
            &format!("--method flap --ratio 0.2 --save-plans {plans}"),
            "--save-plans",
            "exists",
        ),
        (
            "--method flap --ratio 0.2 --save-plans /proc/none",
            "--save-plans",
            "/proc/none",
        ),
    ] {
        let line = run(words);
        assert!(
            line.contains(flag) && line.contains(value),
            "{words}: {line}"
        );
        assert!(!line.contains("calib.txt"), "{words}: {line}");
    }
    // What may be replaced is no fault.
    let words =
        format!("--method flap --ratio 0.2 --overwrite --save-plans {plans} --save {there}");
    assert!(run(&words).contains("calib.txt"));
    let scene = without_calibration(Scene::new(json!({
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    })));
    let save = scene.path("new").display().to_string();
    let more = [
        "--method",
        "flap",
        "--ratio",
        "0.2",
        "--save",
        &save,
        "--export",
        "nemotron-nas",
    ];
    let line = error(&structured(&scene, &more));
    assert!(
        line.contains("--export") && line.contains("qwen3"),
        "{line}"
    );
}

#[test]
fn of_mixtures_too_is_refused_before_calibration_what_is_known_beforehand() {
    let scene = without_calibration(mixtral());
    for (words, flag, value) in [
        ("--method reap --ratio 0.9", "--ratio", "1 experts stay"),
        ("--method neurons --ratio 0.5 --align 64", "--align", "64"),
        (
            "--method neurons --ratio 0.5 --align 8 --ridge nan",
            "--ridge",
            "NaN",
        ),
        ("--method reap --ratio 0.5 --align 8", "--align", "reap"),
        (
            "--method reap --ratio 0.5 --temperature 2",
            "--temperature",
            "reap",
        ),
        (
            "--method reap,reap --ratio 0.5",
            "--method",
            "reap is given twice",
        ),
        ("--method reap --ratio 0.5 --masked", "--masked", "zeroed"),
        ("--method reap --ratio 0.5 --seeds 7", "--seeds", "reap"),
        (
            "--method reap,magnitude --ratio 0.5",
            "--method magnitude",
            "mixture of experts",
        ),
        (
            "--method reap,neurons --ratio 0.5 --compensate least-squares",
            "--compensate least-squares",
            "reap",
        ),
        (
            "--method reap --ratio 0.5 --compensate auto,least-squares",
            "--compensate least-squares",
            "mixture of experts",
        ),
        (
            "--method reap --ratio 0.5 --pool-tokens 8",
            "--pool-tokens",
            "reap",
        ),
        (
            "--method reap --ratio 0.5 --then rtn-int4 --expert-prior 8",
            "--expert-prior",
            "reap, rtn-int4",
        ),
        (
            "--method neurons --ratio 0.5 --align 8 --score magnitude --compensate none --no-gate-weight",
            "--no-gate-weight",
            "neurons",
        ),
        (
            "--method topk-scale --quantise none --no-gate-weight",
            "--no-gate-weight",
            "topk-scale",
        ),
        (
            "--method random,stun --ratio 0.5 --progressive",
            "--progressive",
            "random, stun",
        ),
        (
            "--method topk-lowrank --save new",
            "--save",
            "no stock format has a place for",
        ),
        (
            "--method reap,topk-lowrank --ratio 0.5 --save-plans new",
            "--save-plans",
            "topk-lowrank",
        ),
        ("--method topk-lowrank --topk-rank 33", "--topk-rank", "33"),
        (
            "--method topk-scale --topk-rank 8",
            "--topk-rank",
            "topk-scale",
        ),
        (
            "--method reap,m-smoe --ratio 0.5 --reconstruct small-clusters",
            "--reconstruct",
            "reap, m-smoe",
        ),
        (
            "--method stun --ratio 0.5 --reconstruct few-clusters --compensate expert-scale",
            "stun",
            "neither gone nor run",
        ),
        (
            "--method reap --ratio 0.5 --owl --then rtn-int4",
            "--then rtn-int4",
            "OWL",
        ),
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        let line = error(&structured(&scene, &words));
        assert!(
            line.contains(flag) && line.contains(value),
            "{words:?}: {line}"
        );
        assert!(!line.contains("calib.txt"), "{words:?}: {line}");
    }
    let granite = without_calibration(Scene::new(json!({
        "model_type": "granitemoe", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 16,
        "num_local_experts": 6, "num_experts_per_tok": 2,
    })));
    let save = granite.path("new").display().to_string();
    let words = [
        "--method",
        "reap",
        "--ratio",
        "0.5",
        "--save",
        &save,
        "--layout",
        "per-expert",
    ];
    let line = error(&structured(&granite, &words));
    assert!(
        line.contains("--layout") && line.contains("granitemoe"),
        "{line}"
    );
    assert!(!line.contains("calib.txt"), "{line}");
}

#[test]
fn a_run_that_goes_on_is_not_refused_for_what_it_has_written() {
    let scene = llama();
    let (cells, save) = (scene.path("cells"), scene.path("pruned"));
    let more = [
        "--method",
        "flap",
        "--ratio",
        "0.2,0.4",
        "--cells",
        cells.to_str().unwrap(),
    ];
    let more = [&more[..], &["--save", save.to_str().unwrap()]].concat();
    let first = rows(&structured(&scene, &more));
    let again = rows(&structured(&scene, &more));
    assert_eq!(first.len(), again.len());
    assert_eq!(first[1]["perplexity"], again[1]["perplexity"]);
    // The row is there, so that nothing would write what is gone.
    std::fs::remove_dir_all(save.join("flap-0.4")).unwrap();
    let refused = error(&structured(&scene, &more));
    for part in ["--save", "flap-0.4", "--cells"] {
        assert!(refused.contains(part), "{refused}");
    }
}

#[test]
fn a_chain_that_cannot_be_run_is_refused_before_calibration() {
    let scene = without_calibration(llama());
    let there = scene.path("there");
    std::fs::create_dir(&there).unwrap();
    let chain = |words: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args([
                "eval",
                "chain",
                "--json",
                "--calib-samples",
                "20",
                "--model",
            ])
            .arg(scene.path("model"))
            .arg("--text")
            .arg(scene.path("text.txt"))
            .arg("--calib")
            .arg(scene.path("calib.txt"))
            .args(words.split_whitespace())
            .output()
            .unwrap();
        error(&output)
    };
    assert!(chain("--compress rtn-int4-g8").contains("calib.txt"));
    for (words, flag, value) in [
        ("--rank 1000000", "--rank", "1000000"),
        ("--ratio 0.999", "--ratio", "0.999"),
        ("--prune tyr", "--prune", "tyr"),
        ("--save /proc/none/chain", "--save", "/proc/none"),
        (&format!("--save {}", there.display()), "--save", "exists"),
    ] {
        let line = chain(&format!("--compress rtn-int4-g8 {words}"));
        assert!(
            line.contains(flag) && line.contains(value),
            "{words}: {line}"
        );
        assert!(!line.contains("calib.txt"), "{words}: {line}");
    }
    for target in ["gguf", "vllm"] {
        let line = chain(&format!("--compress rtn-int4-g8 --for {target}"));
        let flags = format!("--compress rtn-int4-g8 --for {target}");
        assert!(line.contains(&flags), "{line}");
        assert!(!line.contains("calib.txt"), "{line}");
    }
    // The budget depends on the window, which the text has to be cut for.
    let scene = llama();
    let calib = scene.path("calib.txt");
    for (words, flag, value) in [
        ("--policy lazy --budget 1", "--budget 1", "too small"),
        (
            "--policy tova --kv-dtype int4-per-channel",
            "--policy tova",
            "per-channel",
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["eval", "chain", "--json", "--compress", "rtn-int4-g8"])
            .args(words.split_whitespace())
            .args(["--model".as_ref(), scene.path("model").as_os_str()])
            .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
            .args(["--calib".as_ref(), calib.as_os_str()])
            .output()
            .unwrap();
        let line = error(&output);
        assert!(
            line.contains(flag) && line.contains(value),
            "{words}: {line}"
        );
    }
}

#[test]
fn bad_input_is_one_line_that_names_it() {
    let scene = llama();
    let text = scene.path("text.txt");
    let flags = ["--method", "flap", "--ratio", "0.3"];
    let with = |more: &[&str]| error(&structured(&scene, &[&flags[..], more].concat()));
    assert!(with(&["--window", "17"]).contains("--window 17"));
    assert!(with(&["--method", "tyr", "--compensate", "bias"]).contains("least squares"));
    assert!(with(&["--method", "tyr", "--uniform"]).contains("uniform"));
    assert!(with(&["--min-attention", "5"]).contains("min_attention 5"));
    std::fs::create_dir(scene.path("there")).unwrap();
    std::fs::write(scene.path("there/file"), "mine").unwrap();
    assert!(with(&["--save", scene.path("there").to_str().unwrap()]).contains("there"));
    std::fs::copy(&text, scene.path("calib.txt")).unwrap();
    std::fs::remove_file(&text).unwrap();
    assert!(with(&[]).contains("text.txt"));
    std::fs::rename(scene.path("calib.txt"), &text).unwrap();
    std::os::unix::fs::symlink(&text, scene.path("calib.txt")).unwrap();
    assert!(with(&[]).contains("has text of --text"));
    std::fs::remove_file(scene.path("calib.txt")).unwrap();
    std::fs::write(scene.path("calib.txt"), "a b c d ".repeat(100)).unwrap();
    let weights = scene.path("model/model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() - 1]).unwrap();
    assert!(with(&[]).contains("model.safetensors"));
}
