//! Small mixtures as checkpoint folders.

use candle_core::{DType, Device, Tensor};
use causal_lm::names::ExpertLayout;
pub(crate) use causal_lm::testing::{gap, logits as logits_of};
use causal_lm::{Decoder, Hidden, ModelConfig, NoTap, Windows, synthetic};
use prune_structured::experts::{
    ExpertMethod, ExpertOptions, ExpertPlan, ExpertSettings, Keep, Outcome, plan, write,
};
use prune_structured::{Error, NoProgress};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tensor_io::{Checkpoint, CheckpointWriter, Config, TensorSpec, WriteOptions};

/// A model in a folder that is removed with it.
pub(crate) struct Mixture {
    folder: tempfile::TempDir,
    pub(crate) checkpoint: Checkpoint,
}

impl Mixture {
    /// A model in f32 whose tensors `make` gives by name and shape.
    pub(crate) fn made(
        config: &Config,
        layout: ExpertLayout,
        mut make: impl FnMut(&str, &[usize]) -> Tensor,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("dense");
        let mut model = ModelConfig::new(config).unwrap();
        model.names = model.names.with_layout(layout).unwrap();
        store(&dir, config, &model.tensors(), &mut make);
        Self {
            checkpoint: Checkpoint::open(&dir).unwrap(),
            folder,
        }
    }

    /// A random model.
    pub(crate) fn random(config: &Config, layout: ExpertLayout) -> Self {
        let mut random = synthetic::random(7);
        Self::made(config, layout, |name, shape| random(name, shape).unwrap())
    }

    pub(crate) fn decoder(&self) -> Decoder<'_> {
        decoder(&self.checkpoint)
    }

    /// A path for an output, removed with the model.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder of what a plan makes of the model.
    pub(crate) fn written(&self, plan: &ExpertPlan, name: &str) -> PathBuf {
        self.written_with(plan, name, &ExpertSettings::default())
    }

    pub(crate) fn written_with(
        &self,
        plan: &ExpertPlan,
        name: &str,
        settings: &ExpertSettings<'_>,
    ) -> PathBuf {
        let path = self.path(name);
        write(&self.decoder(), plan, &path, settings, &NoProgress).unwrap();
        path
    }

    /// What a method with its default parameters finds.
    pub(crate) fn plan(&self, method: &str, keep: Keep) -> Result<Outcome, Box<Error>> {
        let options = options(method, keep);
        plan(&self.decoder(), &windows(), &options, &NoProgress).map_err(Box::new)
    }
}

pub(crate) fn options(method: &str, keep: Keep) -> ExpertOptions {
    ExpertOptions::new(ExpertMethod::named(method).unwrap(), keep)
}

/// Writes tensors, whatever the config says of them.
pub(crate) fn store(
    dir: &Path,
    config: &Config,
    tensors: &[(String, Vec<usize>)],
    make: &mut dyn FnMut(&str, &[usize]) -> Tensor,
) {
    let spec =
        |(name, shape): &(String, Vec<usize>)| TensorSpec::new(name, DType::F32, shape.clone());
    let specs = tensors.iter().map(spec).collect();
    let options = WriteOptions::default();
    let mut writer = CheckpointWriter::create(dir, config, specs, &options).unwrap();
    for (name, shape) in tensors {
        let values: Vec<f32> = make(name, shape).flatten_all().unwrap().to_vec1().unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        // Bytes, so that values which are no numbers can be written too.
        writer.write_bytes(name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

pub(crate) fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

/// A small mixture of a `model_type`.
pub(crate) fn config(model_type: &str, changes: Value) -> Config {
    let mut fields = json!({
        "model_type": model_type, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
        "num_experts_per_tok": 2, "a_field_of_its_own": {"kept": true},
    });
    let own = match model_type {
        "mixtral" => json!({"num_local_experts": 6}),
        "qwen2_moe" => {
            json!({"num_experts": 6, "moe_intermediate_size": 16, "intermediate_size": 40,
            "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]})
        }
        "qwen3_moe" => {
            json!({"num_experts": 6, "moe_intermediate_size": 16, "norm_topk_prob": true})
        }
        "granitemoe" => json!({"num_local_experts": 6, "attention_multiplier": 0.3}),
        _ => json!({"num_experts": 6, "num_key_value_heads": 4}),
    };
    for more in [own, changes] {
        for (field, value) in more.as_object().unwrap() {
            fields[field] = value.clone();
        }
    }
    Config::new(fields.as_object().unwrap().clone())
}

/// The types, and in which layouts each is stored.
pub(crate) const KINDS: [(&str, ExpertLayout); 9] = [
    ("mixtral", ExpertLayout::Alone),
    ("mixtral", ExpertLayout::Fused),
    ("qwen2_moe", ExpertLayout::Alone),
    ("qwen2_moe", ExpertLayout::Fused),
    ("qwen3_moe", ExpertLayout::Alone),
    ("qwen3_moe", ExpertLayout::Fused),
    ("olmoe", ExpertLayout::Alone),
    ("olmoe", ExpertLayout::Fused),
    ("granitemoe", ExpertLayout::Fused),
];

/// Text in windows of sixteen tokens.
pub(crate) fn windows() -> Windows {
    let text: Vec<u32> = (0..192u32).map(|i| (i * i + 7 * i) % 50).collect();
    Windows::cut(&text, 16, None).unwrap()
}

/// Logits of the model in a folder on fixed tokens.
pub(crate) fn logits(dir: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    logits_of(
        &decoder(&checkpoint),
        &(0..20).map(|i| i * 7 % 50).collect::<Vec<_>>(),
    )
}

/// Logits on the same tokens when the dense model may choose among some experts of each layer alone.
pub(crate) fn restricted(decoder: &Decoder<'_>, plan: &ExpertPlan) -> Vec<f32> {
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
    let windows = Windows::cut(&tokens, 20, None).unwrap();
    let mut hidden = Hidden::embed(decoder, &windows).unwrap();
    for (layer, experts) in plan.layers.iter().enumerate() {
        let mut block = decoder.block(layer).unwrap();
        if let (Some(moe), Some(experts)) = (&mut block.experts, experts) {
            let kept = experts.kept.iter().map(|&expert| expert as u32);
            let kept = Tensor::from_iter(kept, &Device::Cpu).unwrap();
            moe.router = moe.router.select(&kept).unwrap();
            moe.experts = experts
                .kept
                .iter()
                .map(|&e| moe.experts[e].clone())
                .collect();
        }
        hidden.advance(&block, &mut NoTap).unwrap();
    }
    let last = hidden.batches()[0].get(0).unwrap();
    let logits = decoder.head().unwrap().forward(&last).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// Names of all tensors and their bytes.
pub(crate) fn tensors(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let read = |name: &str| {
        (
            name.to_string(),
            checkpoint.bytes(name).unwrap().into_owned(),
        )
    };
    let mut all: Vec<_> = checkpoint.names().map(read).collect();
    all.sort();
    all
}

/// A model whose second expert has the first one's neurons in another order, in every layer.
pub(crate) fn with_twins(layout: ExpertLayout) -> Mixture {
    with_twins_and(layout, |_, tensor| tensor)
}

/// The same with other tensors changed.
pub(crate) fn with_twins_and(
    layout: ExpertLayout,
    change: impl Fn(&str, Tensor) -> Tensor,
) -> Mixture {
    let mut random = synthetic::random(7);
    let mut first: Vec<(String, Tensor)> = vec![];
    Mixture::made(&config("mixtral", json!({})), layout, |name, shape| {
        let tensor = random(name, shape).unwrap();
        let order: Vec<u32> = (0..16).map(|i| (i * 5 + 3) % 16).collect();
        let order = Tensor::new(order, &Device::Cpu).unwrap();
        if name.contains("experts.0.") {
            first.push((name.replace("experts.0.", "experts.1."), tensor.clone()));
        }
        match first.iter().find(|(twin, _)| twin == name) {
            Some((_, twin)) if name.contains("w2") => twin.index_select(&order, 1).unwrap(),
            Some((_, twin)) => twin.index_select(&order, 0).unwrap(),
            None => change(name, tensor),
        }
    })
}
