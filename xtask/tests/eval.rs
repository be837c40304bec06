//! The suites as their users run them: on a model made for the test, and on trained models where they lie beside the
//! project.

#[path = "common/scene.rs"]
mod scene;

use std::path::Path;
use std::process::{Command, Output};

use scene::{Scene, error, rows};
use serde_json::json;
use tensor_io::Checkpoint;

fn llama() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }))
}

fn mixtral() -> Scene {
    Scene::new(json!({
        "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 16,
        "num_local_experts": 6, "num_experts_per_tok": 2,
    }))
}

/// Runs `eval structured` on the scene with more arguments.
fn structured(scene: &Scene, more: &[&str]) -> Output {
    let (model, text, calib) = (
        scene.path("model"),
        scene.path("text.txt"),
        scene.path("calib.txt"),
    );
    let args = ["eval", "structured", "--calib-samples", "20", "--json"];
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .args([
            "--model".as_ref(),
            model.as_os_str(),
            "--text".as_ref(),
            text.as_os_str(),
        ])
        .args(["--calib".as_ref(), calib.as_os_str()])
        .args(more)
        .output()
        .unwrap()
}

/// All bytes of a checkpoint folder's weights.
fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}

#[test]
fn every_method_and_ratio_has_a_row_that_agrees_with_its_checkpoint() {
    let scene = llama();
    let save = scene.path("pruned");
    let methods = "flap,flap-compat,wanda-sp,magnitude,random";
    let rows = rows(&structured(
        &scene,
        &[
            "--method",
            methods,
            "--ratio",
            "0.2,0.4",
            "--save",
            save.to_str().unwrap(),
        ],
    ));
    assert_eq!(rows.len(), 1 + 5 * 2);
    assert_eq!(rows[0]["method"], "dense");
    for row in &rows[1..] {
        assert!(row["perplexity"].as_f64().unwrap() > 1.0);
        assert_eq!(row["perplexity_dense"], rows[0]["perplexity"]);
        assert!(row["params"].as_u64() < row["params_dense"].as_u64());
        let (method, ratio) = (
            row["method"].as_str().unwrap(),
            row["ratio"].as_f64().unwrap(),
        );
        if method == "random" {
            assert_eq!(row["spread"]["perplexity"]["runs"], 3);
            continue;
        }
        let pruned = Checkpoint::open(save.join(format!("{method}-{ratio}"))).unwrap();
        assert_eq!(row["params"].as_u64(), Some(pruned.parameters()));
        assert_eq!(row["bytes"].as_u64(), Some(pruned.total_bytes()));
    }
}

#[test]
fn mixtures_are_pruned_by_methods_of_their_own() {
    let scene = mixtral();
    let save = scene.path("pruned");
    let methods = "reap,stun,hc-smoe,neurons,random,joint,topk-scale";
    let more = [
        "--method",
        methods,
        "--ratio",
        "0.5",
        "--align",
        "8",
        "--quantise",
        "rtn-int4,gptq-int4+eora-2",
        "--save",
        save.to_str().unwrap(),
    ];
    let rows = rows(&structured(&scene, &more));
    assert_eq!(rows.len(), 1 + 7 + 2);
    let names: Vec<&str> = rows
        .iter()
        .map(|row| row["method"].as_str().unwrap())
        .collect();
    assert_eq!(names[7], "topk-scale, 1 for each token");
    for row in &rows {
        assert!(row["perplexity"].as_f64().unwrap() > 1.0);
        assert!(row["params_active"].as_u64() < row["params"].as_u64());
        assert!(row["experts"].is_string(), "{row}");
    }
    assert_eq!(rows[1]["experts"], "3 of 32, 2 chosen");
    assert_eq!(rows[4]["experts"], "6 of 16, 2 chosen");
    for (row, folder) in [(&rows[1], "reap-0.5"), (&rows[4], "neurons-0.5")] {
        let pruned = Checkpoint::open(save.join(folder)).unwrap();
        assert_eq!(row["params"].as_u64(), Some(pruned.parameters()));
        assert_eq!(row["bytes"].as_u64(), Some(pruned.total_bytes()));
        assert_eq!(row["removed"], 0.5);
        assert_eq!(row["loads_in"], "stock");
    }
    assert_eq!(rows[5]["spread"]["perplexity"]["runs"], 3);
    assert!(rows[8]["bytes"].as_u64() < rows[1]["bytes"].as_u64());
    assert!(rows[9]["loss"].as_f64() < rows[8]["loss"].as_f64());
}

#[test]
fn variants_of_narrower_experts_have_names_and_say_how_they_compensate_and_what_they_removed() {
    let scene = mixtral();
    let more = [
        "--method",
        "neurons,reap",
        "--ratio",
        "0.4",
        "--align",
        "8",
        "--compensate",
        "auto,none",
    ];
    let rows = rows(&structured(&scene, &more));
    let of = |name: &str| rows.iter().find(|row| row["method"] == name).unwrap();
    assert_eq!(rows.len(), 4);
    assert_eq!(of("neurons")["compensation"], "least squares");
    assert_eq!(of("neurons+none")["compensation"], "none");
    assert_ne!(
        of("neurons")["perplexity"],
        of("neurons+none")["perplexity"]
    );
    // 16 of 32 neurons stay: blocks of 8 are whole.
    assert_eq!(of("neurons")["removed"], 0.5);
    let alone = [&more[..6], &["--compensate", "least-squares"]].concat();
    let alone = scene::rows(&structured(&scene, &alone));
    assert_eq!(alone[1]["perplexity"], of("neurons")["perplexity"]);
}

#[test]
fn what_dropping_leaves_is_compressed_in_the_same_run() {
    let scene = mixtral();
    let save = scene.path("pruned");
    let more = [
        "--method",
        "stun,random",
        "--ratio",
        "0.5",
        "--then",
        "wanda-50,gptq-int4+eora-2",
        "--save",
        save.to_str().unwrap(),
    ];
    let rows = rows(&structured(&scene, &more));
    let names: Vec<&str> = rows
        .iter()
        .map(|row| row["method"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "dense",
            "stun",
            "stun+wanda-50",
            "stun+gptq-int4+eora-2",
            "random",
            "random+wanda-50",
            "random+gptq-int4+eora-2"
        ]
    );
    for (dropped, quantised) in [(1, 3), (4, 6)] {
        let [dropped, quantised] = [dropped, quantised].map(|row: usize| &rows[row]);
        assert!(quantised["bytes"].as_u64() < dropped["bytes"].as_u64());
        assert_eq!(quantised["params"], dropped["params"]);
        assert!(quantised["ratio"].as_f64() > Some(0.5));
    }
    assert_eq!(rows[5]["spread"]["perplexity"]["runs"], 3);
    // Half of the weights that are left are zeros.
    let sparse = Checkpoint::open(save.join("stun-0.5+wanda-50")).unwrap();
    assert_eq!(rows[2]["bytes_saved"]["compressed"], sparse.total_bytes());
    let name = "model.layers.0.block_sparse_moe.experts.0.w1.weight";
    let weight = sparse.bytes(name).unwrap();
    let width = sparse.info(name).unwrap().bytes / sparse.info(name).unwrap().elements();
    let zeros = weight.chunks(width).filter(|x| x.iter().all(|b| *b == 0));
    assert_eq!(zeros.count() * 2, sparse.info(name).unwrap().elements());
    let more = ["--method", "stun", "--ratio", "0.5", "--owl", "--then"];
    let with = |then| structured(&scene, &[&more[..], &[then]].concat());
    assert!(
        self::rows(&with("wanda-50"))[2]["perplexity"]
            .as_f64()
            .unwrap()
            > 1.0
    );
    assert!(error(&with("rtn-int4")).contains("OWL"));
}

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
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        let line = error(&structured(&scene, &words));
        assert!(
            line.contains(flag) && line.contains(value),
            "{words:?}: {line}"
        );
        assert!(!line.contains("calib.txt"), "{words:?}: {line}");
    }
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
    // The budget depends on the window, which the text has to be cut for.
    let scene = llama();
    let calib = scene.path("calib.txt");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args([
            "eval",
            "chain",
            "--json",
            "--compress",
            "rtn-int4-g8",
            "--budget",
            "1",
        ])
        .args(["--model".as_ref(), scene.path("model").as_os_str()])
        .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
        .args(["--calib".as_ref(), calib.as_os_str()])
        .output()
        .unwrap();
    let line = error(&output);
    assert!(
        line.contains("--budget 1") && line.contains("too small"),
        "{line}"
    );
}

#[test]
fn without_a_method_the_recommended_one_runs() {
    for (scene, method) in [(llama(), "rd-dp"), (mixtral(), "neurons")] {
        let more = ["--ratio", "0.25", "--search-samples", "4"];
        let rows = rows(&structured(&scene, &more));
        let names = rows.iter().map(|row| row["method"].as_str().unwrap());
        assert_eq!(names.collect::<Vec<_>>(), ["dense", method]);
    }
}

#[test]
fn what_a_mixture_cannot_do_is_one_line() {
    let (mixture, dense) = (mixtral(), llama());
    let with = |scene: &Scene, more: &[&str]| {
        error(&structured(
            scene,
            &[&["--ratio", "0.5", "--method"], more].concat(),
        ))
    };
    assert!(with(&mixture, &["flap"]).contains("mixture of experts"));
    assert!(with(&dense, &["reap"]).contains("dense model"));
    assert!(with(&mixture, &["reap", "--masked"]).contains("--masked"));
    assert!(with(&mixture, &["neurons", "--align", "64"]).contains("align"));
    let scarce = structured(&mixture, &["--method", "reap", "--ratio", "0.9"]);
    assert!(error(&scarce).contains("each token goes to 2"));
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let scene = llama();
    for compensate in ["bias", "least-squares"] {
        let saved = |threads: &str| {
            let dir = scene.path(&format!("{compensate}-{threads}"));
            let save = dir.to_str().unwrap();
            let arguments = [
                "--method",
                "flap",
                "--ratio",
                "0.3",
                "--compensate",
                compensate,
                "--threads",
                threads,
                "--save",
                save,
            ];
            rows(&structured(&scene, &arguments));
            weights(&dir)
        };
        let one = saved("1");
        assert_eq!(one, saved("2"), "{compensate}");
        assert_eq!(one, saved("5"), "{compensate}");
    }
}

#[test]
fn a_dry_run_counts_what_a_run_writes() {
    let scene = llama();
    let arguments = ["--method", "flap,wanda-sp", "--ratio", "0.3"];
    let dry = rows(&structured(
        &scene,
        &[&arguments[..], &["--dry-run"]].concat(),
    ));
    let wet = rows(&structured(&scene, &arguments));
    assert_eq!(dry.len(), 2);
    for (dry, wet) in dry.iter().zip(&wet[1..]) {
        assert!(dry.get("perplexity").is_none());
        for field in ["method", "ratio", "params", "bytes", "layers"] {
            assert_eq!(dry[field], wet[field], "{field}");
        }
    }
}

/// Sizes of a search that takes a moment.
const SEARCH: [&str; 10] = [
    "--iterations",
    "1",
    "--generations",
    "2",
    "--offspring",
    "4",
    "--stages",
    "32:2,64:1",
    "--search-samples",
    "8",
];

#[test]
fn allocations_by_curves_energies_and_searches_are_measured_like_the_others() {
    let scene = llama();
    let arguments = ["--ratio", "0.3", "--compensate", "least-squares"];
    let run = |more: &[&str]| {
        // Flags of a search are for methods that search.
        let searches = more.iter().any(|word| word.contains("tyr"));
        let search: &[&str] = if searches { &SEARCH } else { &[] };
        rows(&structured(
            &scene,
            &[&arguments[..], search, more].concat(),
        ))
    };
    let found = run(&[
        "--method",
        "tyr,rd-dp,structprune,structprune-softmax",
        "--settle",
    ]);
    let names: Vec<_> = found.iter().map(|row| row["method"].clone()).collect();
    assert_eq!(
        names,
        [
            "dense",
            "tyr",
            "rd-dp",
            "structprune",
            "structprune-softmax"
        ]
    );
    for row in &found[1..] {
        // Widths are whole: no more is removed than asked, and about as much.
        let removed = row["removed"].as_f64().unwrap();
        assert!((0.2..=0.31).contains(&removed), "{row}");
        assert!(row["perplexity"].as_f64().unwrap() > 1.0);
    }
    assert_eq!(found[1]["spread"]["perplexity"]["runs"], 3);
    assert!(found[1]["kl"].as_f64().unwrap() > 0.0);
    for (start, more) in [("flap", &[][..]), ("rd-dp", &["--distortion", "kl"])] {
        let save = scene.path(start);
        let own = [
            "--method",
            "tyr",
            "--search-start",
            start,
            "--seeds",
            "1",
            "--save",
            save.to_str().unwrap(),
        ];
        let found = run(&[&own[..], more].concat());
        assert!(found[1]["kl"].as_f64().unwrap() > 0.0, "{start}");
        // One result lies in the folder itself.
        assert_eq!(
            found[1]["params"].as_u64(),
            Some(Checkpoint::open(save).unwrap().parameters())
        );
    }
    let estimated = run(&["--method", "rd-dp", "--distortion", "hidden"]);
    assert!(estimated[1]["perplexity"].as_f64().unwrap() > 1.0);
}

#[test]
fn a_search_that_is_there_is_taken_up() {
    let scene = llama();
    let state = scene.path("state");
    let resumed = || {
        let arguments = ["--method", "tyr", "--ratio", "0.3", "--resume"];
        rows(&structured(
            &scene,
            &[&arguments[..], &[state.to_str().unwrap()], &SEARCH].concat(),
        ))
    };
    let (first, second) = (resumed(), resumed());
    for field in ["perplexity", "kl", "params"] {
        assert_eq!(first[1][field], second[1][field], "{field}");
        let spread = |rows: &[serde_json::Value]| rows[1]["spread"][field].clone();
        assert_eq!(spread(&first), spread(&second), "{field}");
    }
    // Nothing is compared again.
    assert!(first[1]["candidate_tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(second[1].get("candidate_tokens_per_second").is_none());
    assert_eq!(std::fs::read_dir(&state).unwrap().count(), 3);
}

#[test]
fn one_width_in_all_layers_and_every_export_are_a_flag_each() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    let dir = tempfile::tempdir().unwrap();
    let save = dir.path().join("pruned");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "structured", "--json", "--model"])
        .arg(&model)
        .arg("--text")
        .arg(model.join("evaluation.txt"))
        .arg("--calib")
        .arg(model.join("calibration.txt"))
        .args(["--window", "32", "--samples", "2", "--calib-samples", "4"])
        .args(["--method", "flap", "--ratio", "0.25", "--uniform"])
        .args([
            "--align",
            "32",
            "--export",
            "gguf:q8_0,gguf:f16,nemotron-nas",
        ])
        .arg("--save")
        .arg(&save)
        .output()
        .unwrap();
    let row = &rows(&output)[1];
    assert_eq!(row["loads_in"], "stock");
    let layers = row["layers"].as_array().unwrap();
    for layer in layers {
        assert_eq!(layer["heads"], layers[0]["heads"]);
        assert_eq!(layer["neurons"], layers[0]["neurons"]);
        assert_eq!(layer["neurons"].as_u64().unwrap() % 32, 0);
    }
    for name in ["model-q8_0.gguf", "model-f16.gguf"] {
        let file = std::fs::read(save.join(name)).unwrap();
        assert_eq!(&file[..4], b"GGUF");
        assert!(row[format!("bytes_{name}")].as_u64().unwrap() > 0);
    }
    let exported = Checkpoint::open(save.join("nemotron-nas")).unwrap();
    assert_eq!(row["params"].as_u64(), Some(exported.parameters()));
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

#[test]
fn protocols_differ_in_windows_and_targets_and_rolling_scores_every_token() {
    let scene = llama();
    let report = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["eval", "perplexity", "--json", "--model"])
            .arg(scene.path("model"))
            .arg("--text")
            .arg(scene.path("text.txt"))
            .args(more)
            .output()
            .unwrap();
        rows(&output).remove(0)
    };
    // The text has 800 words of one letter, and 799 spaces.
    let rolling = report(&["--protocol", "rolling"]);
    let number = |row: &serde_json::Value, field: &str| row[field].as_f64().unwrap();
    assert!(
        (number(&rolling, "word_perplexity") / number(&rolling, "perplexity") - 1.0).abs() < 1e-9
    );
    let bits = number(&rolling, "nll") * 800.0 / 1599.0 / 2f64.ln();
    assert!((number(&rolling, "bits_per_byte") / bits - 1.0).abs() < 1e-9);
    assert!((number(&rolling, "byte_perplexity").log2() / bits - 1.0).abs() < 1e-9);
    // The tokenizer of the scene adds no special tokens.
    let (gptq, no_bos) = (report(&["--protocol", "gptq"]), report(&["--no-bos"]));
    assert_eq!(gptq["perplexity"], no_bos["perplexity"]);
    let windows = report(&[]);
    assert_ne!(gptq["perplexity"], windows["perplexity"]);
    assert_eq!(
        windows["perplexity"],
        report(&["--protocol", "windows"])["perplexity"]
    );
    assert!(windows.get("bits_per_byte").is_none());
}

#[shared_data::needed("models", "data/text")]
#[test]
fn perplexities_of_trained_models_are_those_of_transformers() {
    let shared = Path::new(shared_data::path!(""));
    for (model, text, more, expected) in [
        (
            "stories260K",
            "tinystories_valid_30KB",
            &["--window", "256"][..],
            6.316452,
        ),
        (
            "stories260K",
            "tinystories_valid_30KB",
            &["--window", "256", "--no-bos"],
            5.723490,
        ),
        (
            "aidreams260K",
            "tinystories_valid_30KB",
            &["--window", "128"],
            230.885091,
        ),
        (
            "aidreams260K",
            "tinystories_valid_30KB",
            &["--window", "128", "--no-bos"],
            216.223067,
        ),
        (
            "small-lm",
            "tinystories_valid_30KB",
            &["--window", "256"],
            49.146425,
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["eval", "perplexity", "--json", "--model"])
            .arg(shared.join("models").join(model))
            .arg("--text")
            .arg(shared.join("data/text").join(text).with_extension("txt"))
            .args(more)
            .output()
            .unwrap();
        let found = rows(&output)[0]["perplexity"].as_f64().unwrap();
        assert!(
            (found / expected - 1.0).abs() < 1e-5,
            "{model}: {found} is not {expected}"
        );
    }
}
