//! `eval structured` on mixtures of experts.

use crate::scene::{Scene, error, rows};
use crate::{llama, methods, mixtral, structured};
use std::process::Command;
use tensor_io::Checkpoint;

#[test]
fn mixtures_are_pruned_by_methods_of_their_own() {
    let scene = mixtral();
    let save = scene.path("pruned");
    let more = [
        "--method",
        "reap,stun,hc-smoe,neurons,random,joint,topk-scale",
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
    let names = methods(&rows);
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
    let squares = ["--compensate", "least-squares"];
    let both = error(&structured(&scene, &[&more[..6], &squares].concat()));
    assert!(both.contains("nothing that reap can do"), "{both}");
    let alone = [&["--method", "neurons"][..], &more[2..6], &squares].concat();
    let alone = crate::scene::rows(&structured(&scene, &alone));
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
    let names = methods(&rows);
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

#[test]
fn rows_that_keep_all_router_rows_count_the_bytes_of_their_files_and_say_who_opens_them() {
    let scene = mixtral();
    let save = scene.path("pruned");
    let more = [
        "--method",
        "reap,hc-smoe-tied,m-smoe-tied",
        "--ratio",
        "0.5",
        "--compensate",
        "auto,novice",
        "--then",
        "rtn-int4",
        "--save",
        save.to_str().unwrap(),
    ];
    let rows = rows(&structured(&scene, &more));
    let names = methods(&rows);
    assert_eq!(
        names,
        [
            "dense",
            "reap",
            "reap+rtn-int4",
            "reap+novice",
            "reap+novice+rtn-int4",
            "hc-smoe-tied",
            "hc-smoe-tied+rtn-int4",
            "m-smoe-tied",
            "m-smoe-tied+rtn-int4"
        ]
    );
    let (novices, tied) = (&rows[3..5], &rows[5..7]);
    assert_eq!(
        novices[0]["experts"],
        "3 of 32 and constants for all rows, 2 chosen"
    );
    assert_eq!(tied[0]["experts"], "3 of 32 for all rows, 2 chosen");
    for (row, folder) in [
        (&novices[0], "reap+novice-0.5"),
        (&tied[0], "hc-smoe-tied-0.5"),
    ] {
        let pruned = Checkpoint::open(save.join(folder)).unwrap();
        assert_eq!(row["bytes"].as_u64(), Some(pruned.total_bytes()));
        assert_eq!(row["loads_in"], "loader");
        assert_eq!(row["promoted"], 0.0);
        assert!(row["perplexity"].as_f64().unwrap() > 1.0);
    }
    // Three constants of 32 numbers in each place of an expert of 3 · 32 · 32.
    let removed = novices[0]["removed"].as_f64().unwrap();
    assert!((removed - (0.5 - 0.5 / 96.0)).abs() < 1e-9, "{removed}");
    assert_eq!(tied[0]["removed"], 0.5);
    for rows in [novices, tied] {
        assert!(rows[1]["bytes"].as_u64() < rows[0]["bytes"].as_u64());
        assert!(rows[1]["removed"].as_f64() > rows[0]["removed"].as_f64());
    }
    let merged = ["--method", "hc-smoe-tied", "--compensate", "novice"];
    let merged = error(&structured(&scene, &merged));
    assert!(
        merged.contains("nothing that hc-smoe-tied can do"),
        "{merged}"
    );
    let other = scene.path("exported");
    let exported = [
        "--method",
        "reap",
        "--compensate",
        "novice",
        "--export",
        "gguf:f16",
        "--save",
        other.to_str().unwrap(),
    ];
    let export = error(&structured(&scene, &exported));
    assert!(
        export.contains("--export") && export.contains("reap+novice"),
        "{export}"
    );
    let model = save.join("reap+novice-0.5");
    let again = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "structured", "--method", "reap", "--model"])
        .arg(model)
        .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
        .args(["--calib".as_ref(), scene.path("calib.txt").as_os_str()])
        .output()
        .unwrap();
    let again = error(&again);
    assert!(
        again.contains("expert_map") && again.contains("--model"),
        "{again}"
    );
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
fn experts_are_saved_in_the_layout_that_is_asked_for() {
    let scene = mixtral();
    let save = scene.path("pruned");
    let more = [
        "--method",
        "reap",
        "--ratio",
        "0.5",
        "--quantise",
        "rtn-int4",
        "--then",
        "rtn-int4",
        "--save",
        save.to_str().unwrap(),
        "--layout",
    ];
    let fused = rows(&structured(&scene, &[&more[..], &["fused"]].concat()));
    for folder in ["reap-0.5", "reap-0.5+rtn-int4", "rtn-int4"] {
        let saved = Checkpoint::open(save.join(folder)).unwrap();
        assert!(
            saved.contains("model.layers.1.mlp.experts.gate_up_proj"),
            "{folder}"
        );
        assert!(
            !saved.contains("model.layers.1.block_sparse_moe.gate.weight"),
            "{folder}"
        );
    }
    let overwrite = [&more[..], &["per-expert", "--overwrite"]].concat();
    let alone = rows(&structured(&scene, &overwrite));
    for (fused, alone) in fused.iter().zip(&alone) {
        assert_eq!(fused["perplexity"], alone["perplexity"]);
        assert_eq!(fused["bytes"], alone["bytes"]);
    }
    let saved = Checkpoint::open(save.join("reap-0.5")).unwrap();
    assert!(saved.contains("model.layers.1.block_sparse_moe.experts.0.w1.weight"));
    let unsaved = structured(&scene, &[&more[..4], &["--layout", "fused"]].concat());
    assert_eq!(unsaved.status.code(), Some(2));
}

#[test]
fn statistics_of_experts_are_those_that_are_asked_for() {
    let scene = mixtral();
    let flags = [
        "--method",
        "neurons,reap",
        "--ratio",
        "0.5",
        "--align",
        "8",
        "--then",
        "gptq-int3",
    ];
    let run = |more: &[&str]| {
        let rows = rows(&structured(&scene, &[&flags[..], more].concat()));
        let of = |name: &str| {
            let row = rows.iter().find(|row| row["method"] == name).unwrap();
            row["perplexity"].as_f64().unwrap()
        };
        [of("neurons"), of("reap"), of("reap+gptq-int3")]
    };
    let plain = run(&[]);
    assert_eq!(run(&["--pool-tokens", "1024"]), plain);
    for more in [
        &["--pool-tokens", "2"][..],
        &["--expert-prior", "500"],
        &["--no-gate-weight"],
    ] {
        let changed = run(more);
        assert_ne!(changed[0], plain[0], "{more:?}");
        assert_eq!(changed[1], plain[1], "{more:?}");
        assert_ne!(changed[2], plain[2], "{more:?}");
    }
    let behind = run(&["--progressive"]);
    assert_ne!(behind[0], plain[0]);
}

#[test]
fn clusters_that_are_averaged_are_rows_of_that_name() {
    let scene = mixtral();
    let save = scene.path("pruned");
    let more = ["--method", "reap,stun", "--ratio", "0.5", "--progressive"];
    let averaged = [
        "--reconstruct",
        "small-clusters",
        "--save",
        save.to_str().unwrap(),
    ];
    let plain = rows(&structured(&scene, &more));
    let rows = rows(&structured(&scene, &[&more[..], &averaged].concat()));
    assert_eq!(rows[2]["method"], "stun+averaged-small-clusters");
    assert_eq!(rows[2]["loads_in"], "stock");
    assert_eq!(rows[1]["perplexity"], plain[1]["perplexity"]);
    assert_ne!(rows[2]["perplexity"], plain[2]["perplexity"]);
    assert!(save.join("stun+averaged-small-clusters-0.5").exists());
}

#[test]
fn a_linear_term_beside_fewer_experts_is_measured_in_memory() {
    let scene = mixtral();
    let run = |more: &[&str]| {
        let methods = ["--method", "topk-scale,topk-lowrank"];
        rows(&structured(&scene, &[&methods[..], more].concat()))
    };
    let rows = run(&["--topk-rank", "4"]);
    let [scaled, term] = [&rows[1], &rows[2]];
    assert_eq!(term["method"], "topk-lowrank, 1 for each token");
    assert_eq!(term["role"], "control");
    assert_eq!(term["loads_in"], "memory alone");
    // Two layers of 2 x 4 x 32 numbers in f32.
    let more = |field: &str, count: u64| {
        let of = |row: &serde_json::Value| row[field].as_u64().unwrap();
        assert_eq!(of(term), of(scaled) + count, "{field}");
    };
    more("params", 512);
    more("params_active", 512);
    more("bytes", 2048);
    assert_ne!(term["perplexity"], scaled["perplexity"]);
    let left = |rows: &[serde_json::Value]| rows[2]["residual_left"].as_f64().unwrap();
    assert!(left(&rows) < 1.0);
    assert!(left(&run(&[])) < left(&rows));
}
