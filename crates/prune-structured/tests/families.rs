//! Structured pruning of every dense architecture that differs from Llama, and what is written.

use candle_core::{DType, Device, Tensor};
use causal_lm::testing::{self, gap};
use causal_lm::{Decoder, ModelConfig, Windows, synthetic};
use prune_structured::compensation::{Bias, NoCompensation};
use prune_structured::stats::Part;
use prune_structured::{
    AttentionUnit, Calibration, Collect, Compensation, Cost, Error, Form, Loading, NoProgress,
    Plan, Recipe, Settings, gguf, write,
};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tensor_io::{Checkpoint, CheckpointWriter, Config, TensorSpec, WriteOptions};

/// A model of one architecture in a folder that is removed with it.
struct Family {
    name: String,
    folder: tempfile::TempDir,
    checkpoint: Checkpoint,
    /// Tensors beside the decoder.
    foreign: Vec<String>,
}

fn each(test: impl Fn(&Family)) {
    let all: Vec<Value> = serde_json::from_str(include_str!("golden/families.json")).unwrap();
    for family in &all {
        test(&Family::new(family));
    }
}

fn shape(value: &Value) -> Vec<usize> {
    serde_json::from_value(value.clone()).unwrap()
}

impl Family {
    fn new(family: &Value) -> Self {
        let config = Config::new(family["config"].as_object().unwrap().clone());
        let mut tensors = ModelConfig::new(&config).unwrap().tensors();
        let foreign = family["foreign"].as_object().into_iter().flatten();
        let foreign: Vec<(String, Vec<usize>)> = foreign
            .map(|(name, dims)| (name.clone(), shape(dims)))
            .collect();
        tensors.extend(foreign.iter().cloned());
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("dense");
        store(&dir, &config, &tensors, synthetic::random(11));
        Self {
            name: family["name"].as_str().unwrap().into(),
            checkpoint: Checkpoint::open(&dir).unwrap(),
            folder,
            foreign: foreign.into_iter().map(|(name, _)| name).collect(),
        }
    }

    fn decoder(&self) -> Decoder<'_> {
        decoder(&self.checkpoint)
    }

    fn calibrated(&self, name: &str) -> Calibration {
        let grams = self.folder.path().join(name);
        std::fs::create_dir_all(&grams).unwrap();
        let needs = prune_structured::stats::Needs {
            fluctuation: false,
            gram: true,
        };
        let collect = Collect::new(needs, grams);
        Calibration::run(&self.decoder(), &windows(), &collect, &NoProgress).unwrap()
    }

    fn written(
        &self,
        plan: &Plan,
        calibration: &Calibration,
        form: Form,
    ) -> Result<PathBuf, Box<Error>> {
        let dst = self.folder.path().join(format!("{form:?}"));
        let files = WriteOptions::default().with_overwrite(true);
        let settings = Settings::new(calibration).form(form).files(files);
        write(&self.decoder(), plan, &dst, &settings, &NoProgress)
            .map(|_| dst)
            .map_err(Box::new)
    }
}

fn store(
    dir: &Path,
    config: &Config,
    tensors: &[(String, Vec<usize>)],
    mut make: impl FnMut(&str, &[usize]) -> causal_lm::Result<Tensor>,
) {
    let specs = tensors
        .iter()
        .map(|(n, s)| TensorSpec::new(n, DType::F32, s.clone()));
    let options = WriteOptions::default();
    let mut writer = CheckpointWriter::create(dir, config, specs.collect(), &options).unwrap();
    for (name, shape) in tensors {
        writer
            .write_tensor(name, &make(name, shape).unwrap())
            .unwrap();
    }
    writer.finish().unwrap();
}

fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

fn windows() -> Windows {
    let text: Vec<u32> = (0..192u32).map(|i| (i * i + 7 * i) % 40).collect();
    Windows::cut(&text, 16, None).unwrap()
}

fn logits(dir: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let tokens: Vec<u32> = (0..12).map(|i| i * 7 % 40).collect();
    testing::logits(&decoder(&checkpoint), &tokens)
}

fn names(dir: &Path) -> BTreeSet<String> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.names().map(String::from).collect()
}

#[test]
fn sliced_models_compute_what_masked_ones_do() {
    each(|family| {
        let name = &family.name;
        let decoder = family.decoder();
        let calibration = family.calibrated("grams");
        for method in ["flap", "wanda-sp", "magnitude", "random"] {
            for compensation in [
                Compensation::from(NoCompensation),
                Bias.into(),
                Compensation::LEAST_SQUARES,
            ] {
                let mut recipe = Recipe::named(method, 3).unwrap();
                recipe.compensation = Some(compensation);
                let plan = Plan::make(&decoder, &calibration, &recipe, 0.25, &NoProgress).unwrap();
                let case = format!("{name} {method} {}", compensation.name());
                let written = [Form::Sliced, Form::Masked]
                    .map(|form| family.written(&plan, &calibration, form));
                let [sliced, masked] = written.map(|dir| dir.unwrap());
                let near = gap(&logits(&sliced), &logits(&masked));
                assert!(near < 1e-4, "{case}: {near}");
                assert!(
                    gap(&logits(&sliced), &logits(family.checkpoint.dir())) > 1e-4,
                    "{case}"
                );
                let cost = Cost::of(&decoder, &plan).unwrap();
                let smaller = Checkpoint::open(&sliced).unwrap();
                assert_eq!(
                    smaller.parameters(),
                    cost.total_after().parameters,
                    "{case}"
                );
                assert!(
                    smaller.parameters() < family.checkpoint.parameters(),
                    "{case}"
                );
            }
        }
    });
}

#[test]
fn tensors_keep_their_names_and_fused_ones_stay_fused() {
    each(|family| {
        let calibration = family.calibrated("grams");
        let mut recipe = Recipe::named("wanda-sp", 0).unwrap();
        recipe.shape.uniform = true;
        let decoder = family.decoder();
        let plan = Plan::make(&decoder, &calibration, &recipe, 0.3, &NoProgress).unwrap();
        assert_eq!(
            Loading::of(&decoder, &plan, Form::Sliced),
            Loading::Stock,
            "{}",
            family.name
        );
        let sliced = family.written(&plan, &calibration, Form::Sliced).unwrap();
        let mut kept = names(family.checkpoint.dir());
        // What shares the decoder's widths is left out.
        kept.retain(|name| !name.starts_with("mtp."));
        assert_eq!(names(&sliced), kept, "{}", family.name);
        let written = Checkpoint::open(&sliced).unwrap();
        for name in family.foreign.iter().filter(|name| kept.contains(*name)) {
            let bytes = family.checkpoint.bytes(name).unwrap();
            assert_eq!(written.bytes(name).unwrap(), bytes, "{name}");
        }
    });
}

#[test]
fn a_ratio_of_zero_copies_every_byte() {
    each(|family| {
        let calibration = family.calibrated("grams");
        let recipe = Recipe::named("flap", 0).unwrap();
        let decoder = family.decoder();
        let plan = Plan::make(&decoder, &calibration, &recipe, 0.0, &NoProgress).unwrap();
        let dst = family.written(&plan, &calibration, Form::Sliced).unwrap();
        let same = Checkpoint::open(&dst).unwrap();
        assert_eq!(
            same.config().raw(),
            family.checkpoint.config().raw(),
            "{}",
            family.name
        );
        assert_eq!(
            names(&dst),
            names(family.checkpoint.dir()),
            "{}",
            family.name
        );
        for name in family.checkpoint.names() {
            let bytes = family.checkpoint.bytes(name).unwrap();
            assert_eq!(same.bytes(name).unwrap(), bytes, "{name}");
        }
    });
}

#[test]
fn heads_that_are_normalised_together_are_not_pruned() {
    each(|family| {
        if !matches!(family.name.as_str(), "olmo2" | "olmo3") {
            return;
        }
        let (calibration, decoder) = (family.calibrated("grams"), family.decoder());
        let recipe = Recipe::named("flap", 0).unwrap();
        let mut plan = Plan::make(&decoder, &calibration, &recipe, 0.3, &NoProgress).unwrap();
        let heads = |plan: &Plan| -> Vec<usize> { plan.widths().iter().map(|w| w.heads).collect() };
        let dense: Vec<usize> = decoder.config().widths.iter().map(|w| w.heads).collect();
        assert_eq!(heads(&plan), dense);
        plan.layers[0].heads.pop();
        let refused = family
            .written(&plan, &calibration, Form::Sliced)
            .unwrap_err();
        assert!(matches!(*refused, Error::Attention { .. }));
    });
}

#[test]
fn blocks_beside_the_decoder_that_share_its_widths_are_left_out_when_these_change() {
    each(|family| {
        if family.name != "qwen3_5" {
            return;
        }
        let (calibration, decoder) = (family.calibrated("grams"), family.decoder());
        let extra = "mtp.layers.0.mlp.up_proj.weight";
        for uniform in [true, false] {
            let mut recipe = Recipe::named("wanda-sp", 0).unwrap();
            recipe.shape.uniform = uniform;
            let plan = Plan::make(&decoder, &calibration, &recipe, 0.3, &NoProgress).unwrap();
            let stored = |form| {
                let dir = family.written(&plan, &calibration, form).unwrap();
                let checkpoint = Checkpoint::open(&dir).unwrap();
                let text = checkpoint.config().opt_section("text_config").unwrap();
                let text = text.unwrap_or_else(|| checkpoint.config().clone());
                let blocks = text.usize("mtp_num_hidden_layers").unwrap();
                (checkpoint.contains(extra), blocks)
            };
            assert_eq!(stored(Form::Sliced), (false, 0));
            assert_eq!(stored(Form::Masked), (true, 1));
            let left_out = Cost::of(&decoder, &plan).unwrap().left_out.parameters;
            let vision = if uniform { 0 } else { 8 * 3 };
            assert_eq!(left_out, 48 * 32 + vision);
        }
    });
}

#[test]
fn units_of_gated_attention_cost_their_gate_and_delta_nets_have_none() {
    each(|family| {
        if family.name != "qwen3_5_text" {
            return;
        }
        let (calibration, decoder) = (family.calibrated("grams"), family.decoder());
        let mut recipe = Recipe::named("flap", 0).unwrap();
        recipe.shape.attention_unit = Some(AttentionUnit::KvGroup);
        let rankings = recipe
            .score
            .rank(&decoder, &calibration, &recipe.shape, &NoProgress)
            .unwrap();
        let parts: Vec<(usize, Part)> = rankings.iter().map(|r| (r.layer, r.part)).collect();
        let mlp = |layer| (layer, Part::Mlp);
        assert_eq!(
            parts,
            [mlp(0), mlp(1), (2, Part::Attention), mlp(2), mlp(3)]
        );
        // Two query heads with their gates, a key, a value and two columns of o, each 16 channels wide.
        assert_eq!(rankings[2].steps()[0].cost, (3 * 2 + 2) * 16 * 32);
        let mut plan = Plan::make(&decoder, &calibration, &recipe, 0.0, &NoProgress).unwrap();
        plan.layers[2].kv_heads = vec![1];
        plan.layers[2].heads = vec![2, 3];
        let sliced = family.written(&plan, &calibration, Form::Sliced).unwrap();
        let written = Checkpoint::open(&sliced).unwrap();
        let name = "model.layers.2.self_attn.q_proj.weight";
        let rows = |checkpoint: &Checkpoint| -> Vec<Vec<f32>> {
            let weight = checkpoint.tensor(name, &Device::Cpu).unwrap();
            weight.to_vec2().unwrap()
        };
        // Rows of a head are its query and then its gate.
        assert_eq!(rows(&written), rows(&family.checkpoint)[2 * 32..]);
        for (layer, path) in [(0, "in_proj_qkv"), (3, "out_proj"), (1, "in_proj_a")] {
            let name = format!("model.layers.{layer}.linear_attn.{path}.weight");
            let bytes = family.checkpoint.bytes(&name).unwrap();
            assert_eq!(written.bytes(&name).unwrap(), bytes);
        }
        let model = ModelConfig::new(written.config()).unwrap();
        assert_eq!(model.widths, plan.widths());
    });
}

#[test]
fn heads_of_two_widths_are_pruned_in_each_kind_of_layer_and_come_back_from_a_folder_and_a_file() {
    each(|family| {
        if family.name != "gemma4_text" {
            return;
        }
        let (calibration, decoder) = (family.calibrated("grams"), family.decoder());
        let mut recipe = Recipe::named("flap", 0).unwrap();
        recipe.shape.attention_unit = Some(AttentionUnit::QueryHead);
        recipe.compensation = Some(NoCompensation.into());
        let mut plan = Plan::make(&decoder, &calibration, &recipe, 0.3, &NoProgress).unwrap();
        let dense = &decoder.config().widths;
        for (layer, dense) in plan.layers.iter_mut().zip(dense) {
            // One query head of each group.
            let group = dense.heads / dense.kv_heads;
            layer.kv_heads = (0..dense.kv_heads).collect();
            layer.heads = layer.kv_heads.iter().map(|kv| kv * group).collect();
        }
        let sliced = family.written(&plan, &calibration, Form::Sliced).unwrap();
        let masked = family.written(&plan, &calibration, Form::Masked).unwrap();
        let written = Checkpoint::open(&sliced).unwrap();
        let model = ModelConfig::new(written.config()).unwrap();
        assert_eq!(model.widths, plan.widths());
        let head_dims = |config: &ModelConfig| -> Vec<usize> {
            (0..config.layers()).map(|l| config.head_dim(l)).collect()
        };
        assert_eq!(head_dims(&model), head_dims(decoder.config()));
        assert!(gap(&logits(&sliced), &logits(&masked)) < 1e-4);
        testing::write_byte_tokenizer(&sliced, model.vocab);
        let file = family.folder.path().join("pruned.gguf");
        let opened = Checkpoint::open(&sliced).unwrap();
        let precision = gguf::Precision::F32;
        gguf::export(&self::decoder(&opened), precision, &file, &NoProgress).unwrap();
        let back = causal_lm::open(&file).unwrap();
        let tokens: Vec<u32> = (0..12).map(|i| i * 7 % 40).collect();
        let back = testing::logits(&self::decoder(&back), &tokens);
        assert!(gap(&back, &logits(&sliced)) < 1e-4);
    });
}

#[test]
fn models_without_an_architecture_in_gguf_are_refused_by_their_type() {
    each(|family| {
        if !family.name.starts_with("qwen3_5") {
            return;
        }
        let decoder = family.decoder();
        let refused = gguf::check(&decoder, &decoder.config().widths).unwrap_err();
        assert!(matches!(&refused, Error::Export { format: "GGUF", .. }));
        assert!(refused.to_string().contains("qwen3_5_text"), "{refused}");
    });
}

/// A Llama and a Phi-3 with the same weights: projections alone, and stacked.
fn twins(folder: &Path) -> (Checkpoint, Checkpoint) {
    let fields = serde_json::json!({
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 50,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
    });
    let alone = Config::new(fields.as_object().unwrap().clone());
    let mut fused = alone.clone();
    fused.set("model_type", "phi3");
    let files = WriteOptions::default();
    let dir = folder.join("alone");
    synthetic::write(&alone, DType::F32, &dir, &files, synthetic::random(3)).unwrap();
    let source = Checkpoint::open(&dir).unwrap();
    let dir = folder.join("fused");
    let make = |name: &str, _: &[usize]| {
        let load = |name: &str| source.tensor(name, &Device::Cpu).unwrap();
        let parts: &[&str] = match name {
            n if n.contains("qkv_proj") => &["q_proj", "k_proj", "v_proj"],
            n if n.contains("gate_up_proj") => &["gate_proj", "up_proj"],
            _ => return Ok(load(name)),
        };
        let stacked = if parts.len() == 3 {
            "qkv_proj"
        } else {
            "gate_up_proj"
        };
        let parts: Vec<Tensor> = parts
            .iter()
            .map(|part| load(&name.replace(stacked, part)))
            .collect();
        Ok(Tensor::cat(&parts, 0)?)
    };
    synthetic::write(&fused, DType::F32, &dir, &files, make).unwrap();
    (source, Checkpoint::open(&dir).unwrap())
}

#[test]
fn stacked_projections_give_the_same_plans_and_logits_as_single_ones() {
    let folder = tempfile::tempdir().unwrap();
    let (alone, fused) = twins(folder.path());
    for method in ["flap", "wanda-sp", "magnitude"] {
        let mut recipe = Recipe::named(method, 0).unwrap();
        recipe.compensation = Some(NoCompensation.into());
        let [a, b] = [&alone, &fused].map(|checkpoint| {
            let decoder = decoder(checkpoint);
            let collect = Collect::default();
            let calibration =
                Calibration::run(&decoder, &windows(), &collect, &NoProgress).unwrap();
            let plan = Plan::make(&decoder, &calibration, &recipe, 0.3, &NoProgress).unwrap();
            let dst = folder.path().join("out");
            let files = WriteOptions::default().with_overwrite(true);
            let settings = Settings::new(&calibration).files(files);
            write(&decoder, &plan, &dst, &settings, &NoProgress).unwrap();
            (plan.layers, logits(&dst))
        });
        assert_eq!(a, b, "{method}");
    }
}
