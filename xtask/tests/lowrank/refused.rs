//! What is refused.

use crate::scene::{error, rows};
use crate::{eval, llama, lowrank, odd_width};

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
    for lost in [
        &["--save-as", "compressed"][..],
        &["--overwrite"],
        &["--max-shard-bytes", "1"],
    ] {
        let usage = lowrank(&scene, &[&wide[..], lost].concat());
        assert_eq!(usage.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&usage.stderr).contains("--save"));
    }
    let both = lowrank(&scene, &[&wide[..], &["--compressed", "x"]].concat());
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn what_nothing_reads_and_what_would_be_destroyed_is_refused_before_a_text_is_read() {
    let scene = odd_width();
    let path = |name: &str| scene.path(name).display().to_string();
    let (model, file, save) = (path("model"), path("text.txt"), path("save"));
    std::fs::create_dir_all(scene.path("save/compressed")).unwrap();
    std::fs::write(scene.path("save/compressed/mine"), "mine").unwrap();
    std::fs::create_dir_all(scene.path("save/adapter")).unwrap();
    std::fs::write(scene.path("save/adapter/mine"), "mine").unwrap();
    // A model that is where its result would go.
    let parent = scene.path("result");
    std::fs::create_dir(&parent).unwrap();
    std::os::unix::fs::symlink(scene.path("model"), parent.join("compressed")).unwrap();
    let parent = parent.display().to_string();
    let none = ["--compress", "rtn-int4", "--method", "none"];
    let some = ["--compress", "rtn-int4", "--rank", "2"];
    let cases: [(&[&str], &[&str], &[&str]); 12] = [
        (
            &none,
            &["--allocate", "relative"],
            &["--allocate", "rtn-int4"],
        ),
        (&none, &["--factors", "int"], &["--factors", "rtn-int4"]),
        (&none, &["--sequential"], &["--sequential", "rtn-int4"]),
        (&none, &["--one-pass"], &["--one-pass", "rtn-int4"]),
        (&none, &["--inputs", "dense"], &["--inputs", "rtn-int4"]),
        (&none, &["--requantise", "rtn-int4"], &["--requantise"]),
        (&some, &["--rest", "stored"], &["--rest", "rtn-int4"]),
        (&some, &["--resume", &file], &["--resume", "text.txt"]),
        (
            &some,
            &["--save", &save, "--overwrite", "--save-as", "compressed"],
            &["--save", "save/compressed"],
        ),
        (
            &some,
            &[
                "--save",
                &save,
                "--overwrite",
                "--save-as",
                "adapter,merged",
            ],
            &["--save", "save/adapter"],
        ),
        (
            &some,
            &["--save", &parent, "--overwrite"],
            &["--save", "result/compressed", "--model"],
        ),
        (
            &["--compressed", &model, "--rank", "2"],
            &["--save", &parent, "--overwrite", "--save-as", "compressed"],
            &["--save", "result/compressed", "--model"],
        ),
    ];
    for (start, change, expected) in cases {
        // Nothing is there to calibrate on: the refusal comes first.
        let more = [&["--calib", "/nowhere/calib.txt"], start, change].concat();
        let refused = error(&eval(&scene, "lowrank", &more));
        for words in expected {
            assert!(refused.contains(words), "{change:?}: {refused}");
        }
        assert!(!refused.contains("calib.txt"), "{refused}");
    }
    assert!(scene.path("model/tokenizer.json").exists());
    assert!(scene.path("save/compressed/mine").exists());
}

#[test]
fn without_a_compressor_and_a_rank_there_are_those_of_the_help() {
    let scene = llama();
    let rows = rows(&lowrank(&scene, &["--no-controls"]));
    let of_eora = rows.iter().find(|row| row["method"] == "eora").unwrap();
    assert_eq!(of_eora["compress"], "gptq-int4");
    assert_eq!(of_eora["rank"], 16);
    let rows = crate::scene::rows(&lowrank(&scene, &["--method", "none"]));
    let methods: Vec<&str> = rows
        .iter()
        .filter_map(|row| row["method"].as_str())
        .collect();
    assert_eq!(methods, ["dense", "none"]);
}

#[test]
fn a_count_of_nothing_is_wrong_usage_that_says_what_is_expected() {
    let usage = eval(&llama(), "perplexity", &["--samples", "0"]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("at least 1"));
}
