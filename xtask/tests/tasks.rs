//! `eval tasks` as its users run it: on a model made for the test, beside sums worked out here, and on trained models where
//! they lie beside the project.

#[path = "common/scene.rs"]
mod scene;

use std::path::Path;
use std::process::{Command, Output};

use candle_core::{DType, Device};
use causal_lm::{Decoder, Model};
use scene::{Scene, error, rows};
use serde_json::{Value, json};
use tensor_io::Checkpoint;

/// The tokenizer of the scene has one token a word: `<s>` is 0, `a` to `f` are 1 to 6, everything else is 7.
const WORDS: [&str; 8] = ["<s>", "a", "b", "c", "d", "e", "f", "."];

fn llama() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 64,
    }))
}

fn tasks(models: &[&Path], data: &[&Path], more: &[&str]) -> Output {
    let list = |paths: &[&Path]| {
        let paths: Vec<&str> = paths.iter().map(|path| path.to_str().unwrap()).collect();
        paths.join(",")
    };
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args([
            "eval",
            "tasks",
            "--json",
            "--model",
            &list(models),
            "--data",
            &list(data),
        ])
        .args(more)
        .output()
        .unwrap()
}

fn write(scene: &Scene, name: &str, lines: &[Value]) -> std::path::PathBuf {
    let path = scene.path(name);
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(&path, text).unwrap();
    path
}

fn samples(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Calls `test` with the logits after each token of a sequence.
fn with_logits(model: &Path, test: impl Fn(&dyn Fn(&[u32]) -> Vec<Vec<f32>>)) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let model = Model::load(&decoder).unwrap();
    test(&|tokens| {
        let mut cache = model.full_cache(1).unwrap();
        let logits = model.forward_all(&[tokens], &mut cache).unwrap();
        logits.squeeze(0).unwrap().to_vec2().unwrap()
    });
}

#[test]
fn choices_are_scored_as_by_hand() {
    let scene = llama();
    let questions = [
        (&[1u32, 2][..], [&[3u32, 4][..], &[5]], 0),
        (&[3], [&[1, 1, 1], &[2, 6]], 1),
        (&[6, 5, 4, 3], [&[2], &[1, 4]], 1),
        (&[2], [&[6, 6], &[4, 3, 2, 1]], 0),
    ];
    let words = |tokens: &[u32]| -> String {
        let words: Vec<&str> = tokens.iter().map(|&t| WORDS[t as usize]).collect();
        words.join(" ")
    };
    let lines = questions.map(|(goal, [one, two], label)| {
        json!({"goal": words(goal), "sol1": words(one), "sol2": words(two), "label": label})
    });
    let (data, log) = (write(&scene, "mine.jsonl", &lines), scene.path("log"));
    let log_flag = ["--log-samples", log.to_str().unwrap()];
    let model = scene.path("model");
    let row = rows(&tasks(&[&model], &[&data], &log_flag)).remove(0);
    let samples = samples(&log.join("model-mine.jsonl"));
    with_logits(&model, |logits| {
        let (mut right, mut right_by_character) = (0, 0);
        for ((goal, choices, label), sample) in questions.iter().zip(&samples) {
            // "Question:" and "Answer:" are words that the tokenizer does not know.
            let context = [&[0, 7], *goal, &[7]].concat();
            let sums: Vec<f64> = choices
                .iter()
                .map(|choice| {
                    let tokens = [&context[..], choice].concat();
                    let logits = logits(&tokens);
                    let of_token = |i: usize| {
                        let row: Vec<f64> = logits[i - 1].iter().map(|&x| x.into()).collect();
                        row[tokens[i] as usize] - row.iter().map(|x| x.exp()).sum::<f64>().ln()
                    };
                    (context.len()..tokens.len()).map(of_token).sum()
                })
                .collect();
            for (found, expected) in sample["log_likelihoods"]
                .as_array()
                .unwrap()
                .iter()
                .zip(&sums)
            {
                assert!(
                    (found.as_f64().unwrap() - expected).abs() < 1e-5,
                    "{found} {expected}"
                );
            }
            // A choice of n one-letter words has 2 n - 1 characters.
            let mean = |i: usize| sums[i] / (2 * choices[i].len() - 1) as f64;
            right += usize::from(usize::from(sums[1] > sums[0]) == *label);
            right_by_character += usize::from(usize::from(mean(1) > mean(0)) == *label);
        }
        assert_eq!(row["accuracy"], right as f64 / 4.0);
        assert_eq!(row["acc_norm"], right_by_character as f64 / 4.0);
        let p = right as f64 / 4.0;
        let error = row["accuracy_stderr"].as_f64().unwrap();
        assert!((error - (p * (1.0 - p) / 3.0).sqrt()).abs() < 1e-12);
    });
}

#[test]
fn answers_are_generated_as_by_hand_with_and_without_examples() {
    let scene = llama();
    let model = scene.path("model");
    let question = |words: &str| json!({"question": words, "answer": "c d\n#### 3"});
    let all = [
        question("a b"),
        question("f"),
        question("e e d"),
        question("b"),
    ];
    let data = write(&scene, "mine.jsonl", &all);
    let other = write(&scene, "other.jsonl", &[question("d c"), question("a")]);
    let tokens = |question: &Value| -> Vec<u32> {
        let words = question["question"].as_str().unwrap().split(' ');
        let ids = words.map(|word| WORDS.iter().position(|w| *w == word).unwrap() as u32);
        std::iter::once(7).chain(ids).chain([7]).collect()
    };
    let example = |question: &Value| [tokens(question), vec![3, 4, 7, 7]].concat();
    let from_other = [question("d c"), question("a")]
        .map(|q| example(&q))
        .concat();
    let none = |_: usize| Vec::new();
    let own = |i: usize| -> Vec<u32> {
        let others = (0..all.len()).filter(|&j| j != i).take(2);
        others.flat_map(|j| example(&all[j])).collect()
    };
    let others = |_: usize| from_other.clone();
    let other = other.to_str().unwrap();
    for (shots, before) in [
        (&[][..], &none as &dyn Fn(usize) -> Vec<u32>),
        (&["--shots", "2"], &own),
        (&["--shots", "2", "--shots-from", other], &others),
    ] {
        let log = scene.path("log");
        let flags = [
            "--max-new-tokens",
            "12",
            "--log-samples",
            log.to_str().unwrap(),
        ];
        let row = rows(&tasks(&[&model], &[&data], &[&flags, shots].concat())).remove(0);
        assert_eq!((&row["accuracy"], &row["items"]), (&json!(0.0), &json!(4)));
        assert_eq!(row["flexible_extract"], 0.0);
        with_logits(&model, |logits| {
            for (i, sample) in samples(&log.join("model-mine.jsonl")).iter().enumerate() {
                let mut sequence = [vec![0], before(i), tokens(&all[i])].concat();
                let start = sequence.len();
                for _ in 0..12 {
                    let last = logits(&sequence).pop().unwrap();
                    let best = (0..8).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
                    sequence.push(best as u32);
                }
                let words: Vec<&str> = sequence[start..]
                    .iter()
                    .map(|&t| WORDS[t as usize])
                    .collect();
                assert_eq!(sample["generated"], words.join(" "), "{shots:?}, {i}");
            }
        });
    }
}

#[test]
fn every_published_layout_is_told_by_its_fields() {
    let scene = llama();
    let files = [
        (
            "arc",
            json!({"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "A"}),
        ),
        (
            "piqa",
            json!({"goal": "a", "sol1": "b", "sol2": "c", "label": 0}),
        ),
        (
            "hellaswag",
            json!({"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "0"}),
        ),
        (
            "boolq",
            json!({"passage": "a b", "question": "c", "answer": true}),
        ),
        (
            "mathqa",
            json!({"Problem": "a", "options": "a ) b , b ) c , c ) d , d ) e , e ) f", "correct": "e"}),
        ),
        ("gsm8k", json!({"question": "a", "answer": "#### 1"})),
    ];
    let paths: Vec<_> = files
        .iter()
        .map(|(name, line)| {
            write(
                &scene,
                &format!("{name}.jsonl"),
                &[line.clone(), line.clone()],
            )
        })
        .collect();
    let paths: Vec<&Path> = paths.iter().map(|path| &**path).collect();
    let more = ["--samples", "1", "--max-new-tokens", "2", "--shots", "1"];
    let rows = rows(&tasks(&[&scene.path("model")], &paths, &more));
    let names: Vec<&str> = rows
        .iter()
        .map(|row| row["task"].as_str().unwrap())
        .collect();
    assert_eq!(names, files.map(|(name, _)| name));
    for row in &rows {
        assert!(row["accuracy"].is_number() && row["tokens_per_second"].is_number());
        assert!(
            row.get("accuracy_stderr").is_none(),
            "a single question has no spread"
        );
    }
}

#[test]
fn models_are_compared_with_the_first_on_the_same_questions() {
    let scene = llama();
    let model = scene.path("model");
    let question = |i: usize| {
        let word = |i: usize| WORDS[1 + i % 6];
        json!({"goal": word(i), "sol1": word(i + 1), "sol2": word(i * i), "label": i % 2})
    };
    let data = write(
        &scene,
        "mine.jsonl",
        &(0..20).map(question).collect::<Vec<_>>(),
    );
    let turned = scene.path("turned");
    turn(&model, &turned);
    let again = scene.path("again");
    std::os::unix::fs::symlink(&model, &again).unwrap();
    let rows = rows(&tasks(&[&model, &turned, &again], &[&data], &[]));
    let flips = |row: &Value| row["flips"].as_f64();
    assert_eq!(rows[0]["method"], "dense");
    assert_eq!(
        (rows[1]["method"].as_str(), flips(&rows[0])),
        (Some("turned"), None)
    );
    assert_eq!(flips(&rows[2]), Some(0.0));
    for row in &rows[1..] {
        assert_eq!(row["accuracy_dense"], rows[0]["accuracy"]);
        assert_eq!(row["params_dense"], rows[0]["params"]);
    }
    assert!(flips(&rows[1]).unwrap() > 0.0);
    assert_ne!(rows[1]["accuracy"], rows[0]["accuracy"]);
}

/// Copies a model with the signs of its final norm, and so of its logits, turned.
fn turn(from: &Path, to: &Path) {
    let checkpoint = Checkpoint::open(from).unwrap();
    let make = |name: &str, _: &[usize]| {
        let tensor = checkpoint.tensor_as(name, DType::BF16, &Device::Cpu)?;
        Ok(match name {
            "model.norm.weight" => tensor.neg()?,
            _ => tensor,
        })
    };
    let options = tensor_io::WriteOptions::default();
    causal_lm::synthetic::write(checkpoint.config(), DType::BF16, to, &options, make).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

#[test]
fn examples_from_the_file_of_the_question_leave_the_question_out() {
    let scene = llama();
    let model = scene.path("model");
    let question = |i: usize| {
        let word = |i: usize| WORDS[1 + i % 6];
        json!({"goal": word(i), "sol1": word(i + 1), "sol2": word(i * i), "label": i % 2})
    };
    let questions: Vec<Value> = (0..6).map(question).collect();
    let data = write(&scene, "mine.jsonl", &questions);
    let link = scene.path("link.jsonl");
    std::os::unix::fs::symlink(&data, &link).unwrap();
    let log = |name: &str, more: &[&str]| {
        let folder = scene.path(name);
        let folder_name = folder.display().to_string();
        let more = [&["--shots", "1", "--log-samples", &folder_name], more].concat();
        rows(&tasks(&[&model], &[&data], &more));
        std::fs::read_to_string(folder.join("model-mine.jsonl")).unwrap()
    };
    let own = log("own", &[]);
    for (name, from) in [("same", &data), ("linked", &link)] {
        let from = from.display().to_string();
        assert_eq!(log(name, &["--shots-from", &from]), own);
    }
    // What a run with these cells has logged is not logged again.
    let cells = scene.path("cells").display().to_string();
    log("kept", &["--cells", &cells]);
    log("kept", &["--cells", &cells]);
    std::fs::remove_dir_all(scene.path("kept")).unwrap();
    let kept = scene.path("kept").display().to_string();
    let more = ["--shots", "1", "--log-samples", &kept, "--cells", &cells];
    let refused = error(&tasks(&[&model], &[&data], &more));
    assert!(
        refused.contains("--log-samples") && refused.contains("model-mine.jsonl"),
        "{refused}"
    );
}

#[test]
fn a_model_that_cannot_be_asked_leaves_the_others() {
    let scene = llama();
    let good = json!({"goal": "a", "sol1": "b", "sol2": "c", "label": 0});
    // Some editors put a byte-order mark in front.
    let data = scene.path("mine.jsonl");
    std::fs::write(&data, format!("\u{feff}{good}\n")).unwrap();
    let (model, none) = (scene.path("model"), scene.path("none"));
    let output = tasks(&[&none, &model], &[&data], &[]);
    let line = error(&output);
    assert!(
        line.contains("none") && line.contains("the report has the rest"),
        "{line}"
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["rows"].as_array().unwrap().len(), 1);
    assert_eq!(report["rows"][0]["model"], "model");
    let failures = &report["sections"][0]["failures"];
    assert!(failures[0].as_str().unwrap().contains("none"), "{failures}");
    assert!(error(&tasks(&[&none], &[&data], &[])).contains("none"));
}

#[test]
fn bad_input_is_one_line_that_names_it() {
    let scene = llama();
    let model = scene.path("model");
    let good = json!({"goal": "a", "sol1": "b", "sol2": "c", "label": 0});
    let data = write(&scene, "mine.jsonl", &[good.clone(), json!({"goal": "a"})]);
    let message = error(&tasks(&[&model], &[&data], &[]));
    assert!(
        message.contains("mine.jsonl:2: ") && message.contains("sol1"),
        "{message}"
    );
    let unknown = write(&scene, "unknown.jsonl", &[json!({"x": 1})]);
    let message = error(&tasks(&[&model], &[&unknown], &[]));
    assert!(
        message.contains("unknown.jsonl:1: the fields x"),
        "{message}"
    );
    let data = write(&scene, "mine.jsonl", &[good]);
    let message = error(&tasks(&[&model], &[&data], &["--shots", "1"]));
    assert!(
        message.contains("--shots 1: ") && message.contains("mine.jsonl"),
        "{message}"
    );
    let message = error(&tasks(&[&model], &[&data], &["--window", "65"]));
    assert!(message.contains("--window 65"), "{message}");
    let name = model.display().to_string();
    assert_eq!(message.matches(&name).count(), 1, "{message}");
    let message = error(&tasks(&[&model, &model], &[&data], &[]));
    assert!(
        message.contains("--model: ") && message.contains("twice"),
        "{message}"
    );
    let sums = write(
        &scene,
        "sums.jsonl",
        &[json!({"question": "a", "answer": "#### 1"})],
    );
    let message = error(&tasks(&[&model], &[&sums], &[]));
    assert!(message.contains("--max-new-tokens 256"), "{message}");
    let message = error(&tasks(&[&model], &[&data, &data], &[]));
    assert!(
        message.contains("--data: ") && message.contains("twice"),
        "{message}"
    );
    let absent = scene.path("absent.jsonl");
    assert!(error(&tasks(&[&model], &[&absent], &[])).contains("absent.jsonl"));
}

#[shared_data::needed("models/stories260K", "data/zeroshot")]
#[test]
fn trained_models_answer_as_in_transformers() {
    let shared = Path::new(shared_data::path!(""));
    let dir = tempfile::tempdir().unwrap();
    let data = |name: &str| {
        shared
            .join("data/zeroshot")
            .join(name)
            .with_extension("jsonl")
    };
    // Made by tasks_transformers.py beside this file.
    for (name, accuracy, by_character, first) in [
        (
            "arc_easy_test_500",
            0.225,
            0.225,
            &[-141.073051, -115.984749, -101.948791, -115.776552][..],
        ),
        ("piqa_valid_500", 0.485, 0.470, &[-270.163666, -284.256162]),
    ] {
        let model = shared.join("models/stories260K");
        let more = [
            "--samples",
            "200",
            "--log-samples",
            dir.path().to_str().unwrap(),
        ];
        let row = rows(&tasks(&[&model], &[&data(name)], &more)).remove(0);
        assert_eq!(
            (row["accuracy"].as_f64(), row["acc_norm"].as_f64()),
            (Some(accuracy), Some(by_character))
        );
        let samples = samples(&dir.path().join(format!("stories260K-{name}.jsonl")));
        for (found, expected) in samples[0]["log_likelihoods"]
            .as_array()
            .unwrap()
            .iter()
            .zip(first)
        {
            assert!(
                (found.as_f64().unwrap() - expected).abs() < 1e-4,
                "{found} {expected}"
            );
        }
    }
}
