//! Experts of mixtures, compressed and repaired.

use candle_core::{DType, Device, Tensor};
use causal_lm::mixture::ExpertInputs;
use causal_lm::names::ExpertLayout;
use causal_lm::{Decoder, Hidden, ModelConfig, Windows, synthetic, testing};
use lowrank_eora::Error;
use lowrank_eora::compress::Compressor;
use lowrank_eora::experts::{ExpertRepair, GramOptions, Owl, RepairedExperts, repair_experts};
use serde_json::json;
use std::path::Path;
use tensor_io::{Checkpoint, CheckpointWriter, Config, NoProgress, TensorSpec, WriteOptions};

fn config(experts: usize) -> Config {
    let fields = json!({
        "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "num_local_experts": experts, "num_experts_per_tok": experts.min(2),
    });
    Config::new(fields.as_object().unwrap().clone())
}

fn model(dir: &Path, layout: ExpertLayout, experts: usize) -> Checkpoint {
    let config = config(experts);
    let mut model = ModelConfig::new(&config).unwrap();
    model.names = model.names.with_layout(layout).unwrap();
    let tensors = model.tensors();
    let specs = tensors
        .iter()
        .map(|(n, s)| TensorSpec::new(n, DType::F32, s.clone()));
    let options = WriteOptions::default();
    let mut writer = CheckpointWriter::create(dir, &config, specs.collect(), &options).unwrap();
    let mut random = synthetic::random(5);
    for (name, shape) in &tensors {
        writer
            .write_tensor(name, &random(name, shape).unwrap())
            .unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(dir).unwrap()
}

fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

fn windows() -> Windows {
    let text: Vec<u32> = (0..256u32).map(|i| (i * i + 3 * i) % 50).collect();
    Windows::cut(&text, 16, None).unwrap()
}

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let tokens: Vec<u32> = (0..16).map(|i| i * 7 % 50).collect();
    testing::logits(&decoder(checkpoint), &tokens)
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum()
}

fn repaired(checkpoint: &Checkpoint, dst: &Path, options: &ExpertRepair) -> RepairedExperts {
    repair_experts(&decoder(checkpoint), &windows(), options, dst, &NoProgress).unwrap()
}

fn options(compressor: &str, rank: usize) -> ExpertRepair {
    ExpertRepair::new(compressor.parse().unwrap()).rank(rank)
}

#[test]
fn nothing_changes_where_nothing_is_compressed() {
    for layout in [ExpertLayout::Alone, ExpertLayout::Fused] {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = model(&folder.path().join("dense"), layout, 6);
        let dst = folder.path().join("same");
        let found = repaired(&checkpoint, &dst, &options("none", 0));
        assert_eq!((found.loss(), found.rerouted), (0.0, 0.0));
        assert_eq!(found.experts.len(), 12);
        let same = Checkpoint::open(&dst).unwrap();
        for name in checkpoint.names() {
            assert_eq!(
                same.bytes(name).unwrap(),
                checkpoint.bytes(name).unwrap(),
                "{name}"
            );
        }
    }
}

#[test]
fn a_correction_brings_outputs_nearer_and_full_rank_brings_them_back() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model(&folder.path().join("dense"), ExpertLayout::Alone, 6);
    let dense = logits(&checkpoint);
    for compressor in ["rtn-int3", "gptq-int3", "wanda-2:4", "sparsegpt-50"] {
        let mut losses = vec![];
        for rank in [0, 4, 16] {
            let dst = folder.path().join(format!("{compressor}-{rank}"));
            let found = repaired(&checkpoint, &dst, &options(compressor, rank));
            let away = distance(&logits(&Checkpoint::open(&dst).unwrap()), &dense);
            losses.push((found.loss(), away));
        }
        assert!(
            losses[0].0 > losses[1].0 && losses[1].0 > losses[2].0,
            "{compressor}: {losses:?}"
        );
        // Sixteen is the smaller side of every expert's weights.
        assert!(
            losses[2].0 < 1e-6 && losses[2].1 < 1e-8,
            "{compressor}: {losses:?}"
        );
        assert!(losses[1].1 < losses[0].1, "{compressor}: {losses:?}");
    }
}

/// The same model with the experts of a layer in one tensor.
fn fused(dir: &Path, alone: &Checkpoint) -> Checkpoint {
    let source = decoder(alone);
    let experts = source.config().mixtures[0].unwrap().experts;
    let config = config(experts);
    let mut model = ModelConfig::new(&config).unwrap();
    model.names = model.names.with_layout(ExpertLayout::Fused).unwrap();
    let tensors = model.tensors();
    let specs = tensors
        .iter()
        .map(|(n, s)| TensorSpec::new(n, DType::F32, s.clone()));
    let options = WriteOptions::default();
    let mut writer = CheckpointWriter::create(dir, &config, specs.collect(), &options).unwrap();
    for (name, shape) in &tensors {
        let layer = model.names.parse_block(name).map_or(0, |(layer, _)| layer);
        let experts = (0..experts).map(|expert| source.expert(layer, expert).unwrap());
        let tensor = if name.ends_with("gate_up_proj") {
            let parts: Vec<Tensor> = experts
                .flat_map(|mlp| [mlp.gate.unwrap(), mlp.up].map(|linear| linear.weight().unwrap()))
                .collect();
            Tensor::cat(&parts, 0)
                .unwrap()
                .reshape(shape.as_slice())
                .unwrap()
        } else if name.ends_with("experts.down_proj") {
            let parts: Vec<Tensor> = experts.map(|mlp| mlp.down.weight().unwrap()).collect();
            Tensor::stack(&parts, 0).unwrap()
        } else {
            let name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.");
            alone.tensor(&name, &Device::Cpu).unwrap()
        };
        writer.write_tensor(name, &tensor).unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(dir).unwrap()
}

#[test]
fn both_layouts_are_compressed_alike() {
    for experts in [6, 1] {
        let folder = tempfile::tempdir().unwrap();
        let alone = model(&folder.path().join("alone"), ExpertLayout::Alone, experts);
        let fused = fused(&folder.path().join("fused"), &alone);
        assert_eq!(logits(&alone), logits(&fused));
        let repair = options("gptq-int4", 2);
        let [a, b] = [(&alone, "a"), (&fused, "b")].map(|(checkpoint, name)| {
            let dst = folder.path().join(name);
            let found = repaired(checkpoint, &dst, &repair);
            assert!(found.expert_bytes < found.expert_bytes_dense / 2);
            (found.experts, logits(&Checkpoint::open(&dst).unwrap()))
        });
        assert_eq!(a, b);
    }
}

#[test]
fn experts_that_no_token_chose_are_compressed_with_the_pool_alone() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model(&folder.path().join("dense"), ExpertLayout::Alone, 40);
    let text = Windows::cut(&[3, 1, 4, 1, 5, 9], 6, None).unwrap();
    let dst = folder.path().join("out");
    let repair = options("gptq-int4", 1);
    let found = repair_experts(&decoder(&checkpoint), &text, &repair, &dst, &NoProgress).unwrap();
    assert_eq!(found.experts.len(), 80);
    let silent: Vec<_> = found.experts.iter().filter(|e| e.tokens == 0).collect();
    assert!(!silent.is_empty());
    assert!(silent.iter().all(|e| e.pool == 1.0 && e.effective == 0.0));
    let used = found.experts.iter().filter(|e| e.tokens > 0);
    assert!(
        used.into_iter()
            .all(|e| e.pool < 1.0 && e.effective <= e.tokens as f64 + 1e-9)
    );
}

#[test]
fn what_does_not_fit_names_the_expert_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model(&folder.path().join("dense"), ExpertLayout::Alone, 6);
    let dst = folder.path().join("never");
    let repair = options("rtn-int4", 99);
    let run = repair_experts(
        &decoder(&checkpoint),
        &windows(),
        &repair,
        &dst,
        &NoProgress,
    );
    let mut error: Option<&dyn std::error::Error> = run.as_ref().err().map(|error| error as _);
    let mut said = String::new();
    while let Some(inner) = error {
        said += &format!("{inner}; ");
        error = inner.source();
    }
    assert!(said.contains("layer 0, expert 0, gate_proj"), "{said}");
    assert!(!dst.exists());
    let compressor: Compressor = "rtn-int4".parse().unwrap();
    let llama = config(6).raw().clone();
    let mut llama = Config::new(llama);
    llama.set("model_type", "llama");
    let dir = folder.path().join("llama");
    let files = WriteOptions::default();
    synthetic::write(&llama, DType::F32, &dir, &files, synthetic::random(1)).unwrap();
    let dense = Checkpoint::open(&dir).unwrap();
    let repair = ExpertRepair::new(compressor);
    let run = repair_experts(&decoder(&dense), &windows(), &repair, &dst, &NoProgress);
    assert!(matches!(run, Err(Error::Setting { name: "model", .. })));
}

/// B A of expert `expert` in the form of PEFT: rows `outputs` of the product.
fn delta(folder: &Path, tensor: &str, (expert, experts): (usize, usize)) -> Vec<Vec<f64>> {
    let file = Checkpoint::open_file(folder.join("adapter_model.safetensors")).unwrap();
    let load = |factor: &str| -> Vec<Vec<f32>> {
        let name = format!("base_model.model.model.layers.1.mlp.{tensor}.{factor}.weight");
        let tensor = file.tensor_as(&name, DType::F32, &Device::Cpu).unwrap();
        tensor.to_vec2().unwrap()
    };
    let (a, b) = (load("lora_A"), load("lora_B"));
    let rank = a.len() / experts;
    b.iter()
        .map(|b| {
            (0..a[0].len())
                .map(|column| {
                    let of = |rho: usize| {
                        let (b, a) = (b[rho * experts + expert], a[expert * rank + rho][column]);
                        f64::from(b) * f64::from(a)
                    };
                    (0..rank).map(of).sum()
                })
                .collect()
        })
        .collect()
}

#[test]
fn an_adapter_beside_compressed_experts_gives_the_merged_ones() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model(&folder.path().join("dense"), ExpertLayout::Fused, 6);
    let paths = ["merged", "compressed", "adapter"].map(|name| folder.path().join(name));
    let [merged, compressed, adapter] = &paths;
    repaired(&checkpoint, merged, &options("rtn-int3", 3));
    let beside = options("rtn-int3", 3).adapter(Some(adapter.clone()));
    repaired(&checkpoint, compressed, &beside);
    let [merged, compressed] = [merged, compressed].map(|path| Checkpoint::open(path).unwrap());
    for (tensor, module) in [
        ("experts.base_layer", "mlp.experts.gate_up_proj"),
        ("experts", "mlp.experts.down_proj"),
    ] {
        let load = |checkpoint: &Checkpoint| -> Vec<Vec<Vec<f32>>> {
            let name = format!("model.layers.1.{module}");
            let tensor = checkpoint
                .tensor_as(&name, DType::F32, &Device::Cpu)
                .unwrap();
            tensor.to_vec3().unwrap()
        };
        let (merged, compressed) = (load(&merged), load(&compressed));
        let mut largest = 0f64;
        for expert in 0..6 {
            let delta = delta(adapter, tensor, (expert, 6));
            for (row, delta) in delta.iter().enumerate() {
                for (column, delta) in delta.iter().enumerate() {
                    let sum = f64::from(compressed[expert][row][column]) + delta;
                    let expected = f64::from(merged[expert][row][column]);
                    assert!((sum - expected).abs() < 1e-3, "{sum} is not {expected}");
                    largest = largest.max(delta.abs());
                }
            }
        }
        assert!(largest > 0.01, "{largest}");
    }
    let config = std::fs::read(adapter.join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(
        (&config["r"], &config["lora_alpha"]),
        (&json!(3), &json!(3))
    );
    assert_eq!(
        config["rank_pattern"],
        json!({".*\\.experts\\.gate_up_proj": 6})
    );
    assert_eq!(config["alpha_pattern"], config["rank_pattern"]);
    let base = config["base_model_name_or_path"].as_str().unwrap();
    assert!(Path::new(base).is_absolute() && base.ends_with("compressed"));
}

#[test]
fn layers_with_fewer_outliers_are_pruned_more_and_the_share_is_met() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model(&folder.path().join("dense"), ExpertLayout::Fused, 6);
    let dst = folder.path().join("pruned");
    let by_layer = options("wanda-50", 0).owl(Some(Owl::default()));
    repaired(&checkpoint, &dst, &by_layer);
    let pruned = Checkpoint::open(&dst).unwrap();
    let share = |layer: usize| -> f64 {
        let (mut zeros, mut all) = (0, 0);
        for module in ["gate_up_proj", "down_proj"] {
            let name = format!("model.layers.{layer}.mlp.experts.{module}");
            let tensor = pruned.tensor_as(&name, DType::F32, &Device::Cpu).unwrap();
            let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            zeros += values.iter().filter(|x| **x == 0.0).count();
            all += values.len();
        }
        zeros as f64 / all as f64
    };
    let (a, b) = (share(0), share(1));
    // Shares of rows are whole numbers of weights.
    assert!((a + b - 1.0).abs() < 0.07, "{a} {b}");
    assert!((a - b).abs() > 0.1, "{a} {b}");
    let refused = options("wanda-2:4", 0).owl(Some(Owl::default()));
    let never = folder.path().join("never");
    let error = repair_experts(
        &decoder(&checkpoint),
        &windows(),
        &refused,
        &never,
        &NoProgress,
    );
    assert!(matches!(error, Err(Error::Setting { .. })), "{error:?}");
    assert!(!never.exists());
}

#[test]
fn an_adapter_that_peft_would_not_apply_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model(&folder.path().join("dense"), ExpertLayout::Alone, 6);
    let dst = folder.path().join("never");
    let adapter = folder.path().join("adapter");
    let refused = |checkpoint: &Checkpoint, rank: usize, value: &str| {
        let repair = options("rtn-int3", rank).adapter(Some(adapter.clone()));
        let decoder = decoder(checkpoint);
        let error = repair_experts(&decoder, &windows(), &repair, &dst, &NoProgress).unwrap_err();
        let about = matches!(
            &error,
            Error::Setting {
                name: "PEFT adapter of experts",
                ..
            }
        );
        assert!(about && error.to_string().contains(value), "{error}");
        assert!(!dst.exists() && !adapter.exists());
    };
    refused(&checkpoint, 0, "rank 0");
    let synthetic = |name: &str, config: &Config| {
        let (dir, files) = (folder.path().join(name), WriteOptions::default());
        synthetic::write(config, DType::F32, &dir, &files, synthetic::random(1)).unwrap();
        Checkpoint::open(&dir).unwrap()
    };
    let mut granite = config(6);
    granite.set("model_type", "granitemoe");
    refused(&synthetic("granite", &granite), 3, "granitemoe");
    let mut by_layer = config(6);
    by_layer.set(
        "per_layer_widths",
        json!({"num_attention_heads": [4, 4], "num_key_value_heads": [2, 2], "intermediate_size": [0, 0],
            "num_experts": [6, 4], "expert_size": [16, 16]}),
    );
    refused(&synthetic("by-layer", &by_layer), 3, "differ by layer");
}

#[test]
fn experts_that_router_rows_share_are_repaired_on_the_tokens_of_all_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut shared = config(6);
    shared.set(
        "per_layer_widths",
        json!({"num_attention_heads": [4, 4], "num_key_value_heads": [2, 2], "intermediate_size": [0, 0],
            "num_experts": [3, 2], "expert_size": [16, 16],
            "expert_map": [[0, 1, 3, 0, 2, 1], [0, 1, 0, 1, 0, 1]]}),
    );
    let (dir, files) = (folder.path().join("shared"), WriteOptions::default());
    synthetic::write(&shared, DType::F32, &dir, &files, synthetic::random(1)).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut seen = ExpertInputs::default();
    let mut hidden = Hidden::embed(&decoder(&checkpoint), &windows()).unwrap();
    hidden
        .advance_stored(&decoder(&checkpoint), 0, &mut seen)
        .unwrap();
    let rows: Vec<&[u32]> = seen.routings.iter().flat_map(|r| r.ids.chunks(2)).collect();
    let tokens_of = |own: [u32; 2]| {
        rows.iter()
            .filter(move |rows| rows.iter().any(|r| own.contains(r)))
    };
    let expected = [[0, 3], [1, 5], [4, 4]].map(|own| tokens_of(own).count());
    let same = repaired(
        &checkpoint,
        &folder.path().join("same"),
        &options("none", 0),
    );
    let found: Vec<usize> = same.experts.iter().map(|expert| expert.tokens).collect();
    assert_eq!(found[..3], expected);
    assert_eq!((found.len(), same.loss()), (5, 0.0));
    let dense = logits(&checkpoint);
    let away = |rank: usize| {
        let dst = folder.path().join(format!("rank-{rank}"));
        let found = repaired(&checkpoint, &dst, &options("gptq-int3", rank));
        let repaired = Checkpoint::open(&dst).unwrap();
        let novices = "model.layers.0.mlp.novices.weight";
        assert_eq!(
            repaired.bytes(novices).unwrap(),
            checkpoint.bytes(novices).unwrap()
        );
        (found.loss(), distance(&logits(&repaired), &dense))
    };
    let (none, full) = (away(0), away(16));
    assert!(none.0 > 1e-3 && none.1 > 1e-6, "{none:?}");
    assert!(full.0 < 1e-6 && full.1 < 1e-8, "{full:?}");
    let adapter = options("rtn-int3", 2).adapter(Some(folder.path().join("adapter")));
    let dst = folder.path().join("never");
    let error = repair_experts(
        &decoder(&checkpoint),
        &windows(),
        &adapter,
        &dst,
        &NoProgress,
    );
    assert!(matches!(
        error,
        Err(Error::Model(causal_lm::Error::ExpertMap { layer: 0, .. }))
    ));
}

#[test]
fn a_model_whose_adapter_cannot_be_written_is_not_written_either() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model(&folder.path().join("dense"), ExpertLayout::Alone, 6);
    let (dst, adapter) = (folder.path().join("never"), folder.path().join("adapter"));
    std::fs::create_dir(&adapter).unwrap();
    std::fs::write(adapter.join("notes.txt"), "not an adapter").unwrap();
    let repair = options("rtn-int3", 2).adapter(Some(adapter.clone()));
    let decoder = decoder(&checkpoint);
    let error = repair_experts(&decoder, &windows(), &repair, &dst, &NoProgress).unwrap_err();
    let exists = matches!(&error, Error::Checkpoint(tensor_io::Error::Exists { .. }));
    assert!(exists, "{error}");
    assert!(!dst.exists());
    assert_eq!(std::fs::read_dir(&adapter).unwrap().count(), 1);
}

#[test]
fn a_head_of_its_own_is_not_announced_as_tied() {
    let folder = tempfile::tempdir().unwrap();
    let dense = folder.path().join("dense");
    drop(model(&dense, ExpertLayout::Alone, 6));
    // Its head stays beside the embedding.
    let mut tied = config(6);
    tied.set("tie_word_embeddings", true);
    let text = serde_json::to_string(tied.raw()).unwrap();
    std::fs::write(dense.join("config.json"), text).unwrap();
    let checkpoint = Checkpoint::open(&dense).unwrap();
    let dst = folder.path().join("compressed");
    repaired(&checkpoint, &dst, &options("rtn-int3", 0));
    let compressed = Checkpoint::open(&dst).unwrap();
    assert!(compressed.contains("lm_head.weight"));
    assert!(!compressed.config().bool("tie_word_embeddings").unwrap());
}

/// Every tensor's bytes by its name.
fn bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let of = |name: &str| {
        let bytes = checkpoint.bytes(name).unwrap().into_owned();
        (name.to_owned(), bytes)
    };
    let mut all: Vec<_> = checkpoint.names().map(of).collect();
    all.sort();
    all
}

#[test]
fn compressed_experts_are_written_in_the_layout_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let alone = model(&path("alone"), ExpertLayout::Alone, 6);
    repaired(&alone, &path("as-it-was"), &options("gptq-int4", 2));
    let to_fused = options("gptq-int4", 2).layout(Some(ExpertLayout::Fused));
    repaired(&alone, &path("fused"), &to_fused);
    let fused = Checkpoint::open(path("fused")).unwrap();
    for name in [
        "mlp.gate.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    ] {
        assert!(fused.contains(&format!("model.layers.1.{name}")), "{name}");
    }
    assert!(!fused.names().any(|name| name.contains("block_sparse_moe")));
    let same = Checkpoint::open(path("as-it-was")).unwrap();
    assert_eq!(logits(&fused), logits(&same));
    // And back: bytes are moved.
    let back = options("none", 0).layout(Some(ExpertLayout::Alone));
    repaired(&fused, &path("back"), &back);
    assert_eq!(bytes(&path("back")), bytes(&path("as-it-was")));
}

#[test]
fn the_merged_model_is_written_beside_its_parts_as_it_is_without_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for layout in [ExpertLayout::Alone, ExpertLayout::Fused] {
        let name = |kind: &str| path(&format!("{kind}-{layout:?}"));
        let checkpoint = model(&name("dense"), layout, 6);
        repaired(&checkpoint, &name("only"), &options("rtn-int3", 3));
        let beside = options("rtn-int3", 3)
            .adapter(Some(name("adapter")))
            .merged(Some(name("merged")));
        repaired(&checkpoint, &name("compressed"), &beside);
        assert_eq!(bytes(&name("merged")), bytes(&name("only")));
        assert_ne!(bytes(&name("compressed")), bytes(&name("only")));
        assert!(name("adapter").join("adapter_config.json").exists());
    }
}

#[test]
fn without_gates_every_token_counts_alike() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model(&folder.path().join("dense"), ExpertLayout::Fused, 6);
    let mut grams = GramOptions::default();
    let weighted = repaired(
        &checkpoint,
        &folder.path().join("gates"),
        &options("gptq-int3", 0),
    );
    grams.gate_weight = false;
    let alike = options("gptq-int3", 0).grams(grams);
    let alike = repaired(&checkpoint, &folder.path().join("alike"), &alike);
    let counted = |found: &RepairedExperts| -> Vec<bool> {
        let experts = found.experts.iter().filter(|expert| expert.tokens > 1);
        experts
            .map(|expert| (expert.effective - expert.tokens as f64).abs() < 1e-9)
            .collect()
    };
    assert!(counted(&alike).iter().all(|all| *all));
    assert!(!counted(&weighted).iter().any(|all| *all));
    let folders = ["gates", "alike"].map(|name| bytes(&folder.path().join(name)));
    assert_ne!(folders[0], folders[1]);
}

#[test]
fn shares_by_outliers_count_every_token_alike_without_gates() {
    let folder = tempfile::tempdir().unwrap();
    let owl = |checkpoint: &Checkpoint, name: &str, gate_weight: bool| {
        let mut grams = GramOptions::default();
        grams.gate_weight = gate_weight;
        let repair = options("wanda-50", 0)
            .owl(Some(Owl::default()))
            .grams(grams);
        let dst = folder.path().join(name);
        repaired(checkpoint, &dst, &repair);
        bytes(&dst)
    };
    // With one expert for each token every gate is 1.
    let mut one = config(6);
    one.set("num_experts_per_tok", 1);
    let dir = folder.path().join("one");
    let files = WriteOptions::default();
    synthetic::write(&one, DType::F32, &dir, &files, synthetic::random(1)).unwrap();
    let one = Checkpoint::open(&dir).unwrap();
    assert_eq!(owl(&one, "one-gates", true), owl(&one, "one-alike", false));
    let two = model(&folder.path().join("two"), ExpertLayout::Fused, 6);
    assert_ne!(owl(&two, "two-gates", true), owl(&two, "two-alike", false));
}

#[test]
fn what_is_out_of_range_is_refused_before_anything_is_computed() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model(&folder.path().join("dense"), ExpertLayout::Alone, 6);
    let with = |change: &dyn Fn(&mut GramOptions)| {
        let mut grams = GramOptions::default();
        change(&mut grams);
        options("gptq-int4", 2).grams(grams)
    };
    let mut granite = config(6);
    granite.set("model_type", "granitemoe");
    let dir = folder.path().join("granite");
    let files = WriteOptions::default();
    synthetic::write(&granite, DType::F32, &dir, &files, synthetic::random(1)).unwrap();
    let granite = Checkpoint::open(&dir).unwrap();
    let merged = Some(folder.path().join("merged"));
    for (checkpoint, repair, name) in [
        (
            &checkpoint,
            with(&|grams| grams.prior = Some(-1.0)),
            "weight of the pool",
        ),
        (
            &checkpoint,
            with(&|grams| grams.prior = Some(f64::NAN)),
            "weight of the pool",
        ),
        (
            &checkpoint,
            with(&|grams| grams.pool_tokens = 0),
            "tokens of the pool",
        ),
        (
            &checkpoint,
            options("rtn-int4", 2).merged(merged),
            "merged model",
        ),
        (
            &granite,
            options("rtn-int4", 2).layout(Some(ExpertLayout::Alone)),
            "layout of experts",
        ),
    ] {
        let decoder = decoder(checkpoint);
        let dst = folder.path().join("never");
        let run = repair_experts(&decoder, &windows(), &repair, &dst, &NoProgress).unwrap_err();
        let checked = repair.check(&decoder).unwrap_err();
        for error in [run, checked] {
            let about = matches!(&error, Error::Setting { name: found, .. } if *found == name);
            assert!(about, "{error}");
        }
        assert!(!dst.exists());
    }
}
