//! Experts of a mixture in place of its other linears.

use crate::scene::{Scene, error, rows};
use crate::{llama, lowrank, number};
use serde_json::{Value, json};
use std::path::Path;
use tensor_io::Checkpoint;

fn mixture(model_type: &str) -> Scene {
    Scene::new(json!({
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 16,
        "num_local_experts": 6, "num_experts_per_tok": 2,
    }))
}

fn adapter_config(folder: &Path) -> Value {
    let file = std::fs::read(folder.join("adapter_config.json")).unwrap();
    serde_json::from_slice(&file).unwrap()
}

#[test]
fn experts_are_repaired_and_saved_as_an_adapter_beside_what_it_corrects() {
    let scene = mixture("mixtral");
    let save = scene.path("saved");
    let more = [
        "--experts",
        "--compress",
        "gptq-int3",
        "--method",
        "none,eora",
        "--rank",
        "2,8",
        "--save",
        save.to_str().unwrap(),
        "--save-as",
        "adapter,compressed,merged",
    ];
    let rows = rows(&lowrank(&scene, &more));
    let named: Vec<(&str, Option<u64>)> = rows
        .iter()
        .map(|row| (row["method"].as_str().unwrap(), row["rank"].as_u64()))
        .collect();
    assert_eq!(
        named,
        [
            ("dense", None),
            ("none", None),
            ("eora", Some(2)),
            ("eora", Some(8))
        ]
    );
    for row in &rows[2..] {
        assert!(number(row, "loss") < number(&rows[1], "loss"));
        assert!(number(row, "bytes") > number(&rows[1], "bytes"));
        assert!(row["bytes"].as_u64() < row["bytes_dense"].as_u64());
    }
    assert!(number(&rows[3], "loss") < number(&rows[2], "loss"));
    let folder = save.join("gptq-int3-eora-2");
    let config = adapter_config(&folder.join("adapter"));
    assert_eq!(config["r"], 2);
    let parameters = json!(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]);
    assert_eq!(config["target_parameters"], parameters);
    let base = config["base_model_name_or_path"].as_str().unwrap();
    assert_eq!(Path::new(base), folder.join("compressed"));
    let weights = Checkpoint::open_file(folder.join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(rows[2]["bytes_saved"]["adapter"], weights.total_bytes());
    // Attention is as it was, experts are not.
    let open = |name: &str| Checkpoint::open(folder.join(name)).unwrap();
    let (merged, compressed) = (open("merged"), open("compressed"));
    let dense = Checkpoint::open(scene.path("model")).unwrap();
    let same = |a: &Checkpoint, b: &Checkpoint, name: &str| {
        let name = format!("model.layers.1.{name}.weight");
        a.bytes(&name).unwrap() == b.bytes(&name).unwrap()
    };
    assert!(same(&merged, &dense, "self_attn.q_proj"));
    assert!(!same(&merged, &compressed, "block_sparse_moe.experts.0.w1"));
    assert!(!same(&dense, &compressed, "block_sparse_moe.experts.0.w1"));
    // The row without a repair has no factors.
    let plain = save.join("gptq-int3-none");
    assert!(plain.join("compressed").exists() && !plain.join("adapter").exists());
    let alone = save.join("merged-alone");
    let only = [
        &more[..3],
        &["--rank", "2", "--save-as", "merged", "--save"],
        &[alone.to_str().unwrap()],
    ];
    let only = crate::scene::rows(&lowrank(&scene, &only.concat()));
    assert_eq!(only[1]["perplexity"], rows[2]["perplexity"]);
    assert!(alone.join("merged").exists() && !alone.join("compressed").exists());
}

#[test]
fn what_experts_cannot_be_is_refused_before_a_text_is_read() {
    let (mixtral, granite, dense) = (mixture("mixtral"), mixture("granitemoe"), llama());
    let save = mixtral.path("save").display().to_string();
    for (scene, words, expected) in [
        (&dense, "--experts", ["--experts", "no mixture"]),
        (
            &dense,
            "--pool-tokens 4",
            ["--pool-tokens", "without --experts"],
        ),
        (
            &mixtral,
            "--no-gate-weight",
            ["--no-gate-weight", "without --experts"],
        ),
        (
            &mixtral,
            "--experts --method none --compress rtn-int4 --expert-prior 3",
            ["--expert-prior", "rtn-int4"],
        ),
        (&mixtral, "--experts --method svd", ["--method svd", "eora"]),
        (&mixtral, "--experts --rank 33", ["--rank 33", "is 32"]),
        (
            &mixtral,
            "--experts --compress wanda-2:5",
            ["--compress wanda-2:5", "5"],
        ),
        (
            &mixtral,
            &format!("--experts --save {save} --save-as gptq"),
            ["--save-as gptq", "adapter, compressed, merged"],
        ),
        (
            &mixtral,
            &format!("--experts --save {save} --save-as adapter"),
            ["--save-as adapter", "add compressed"],
        ),
        (
            &granite,
            &format!("--experts --save {save}"),
            ["--save-as adapter", "granitemoe"],
        ),
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        let more = [&words[..], &["--calib", "/nowhere/calib.txt"]].concat();
        let refused = error(&crate::eval(scene, "lowrank", &more));
        for part in expected {
            assert!(refused.contains(part), "{words:?}: {refused}");
        }
        assert!(!refused.contains("calib.txt"), "{refused}");
    }
    let both = lowrank(&mixtral, &["--experts", "--one-pass"]);
    assert_eq!(both.status.code(), Some(2));
}
