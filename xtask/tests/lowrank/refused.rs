//! What is refused.

use crate::scene::error;
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
    for lost in [&["--save-as", "compressed"][..], &["--overwrite"]] {
        let usage = lowrank(&scene, &[&wide[..], lost].concat());
        assert_eq!(usage.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&usage.stderr).contains("--save"));
    }
    let both = lowrank(&scene, &[&wide[..], &["--compressed", "x"]].concat());
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn a_count_of_nothing_is_wrong_usage_that_says_what_is_expected() {
    let usage = eval(&llama(), "perplexity", &["--samples", "0"]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("at least 1"));
}
