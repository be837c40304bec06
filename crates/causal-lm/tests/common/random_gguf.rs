//! GGUF files of models with random weights.

use std::path::Path;

use causal_lm::ModelConfig;
use causal_lm::gguf::Architecture;
use causal_lm::gguf::layout::{self, Experts};
use packed::{BlockType, quantise};
use serde_json::{Value as Json, json};
use tensor_io::Config;
use tensor_io::gguf::{BlockLayout, TensorSpec, Value, Writer};

/// A model to be written.
pub(crate) struct RandomGguf {
    pub(crate) config: Config,
    pub(crate) architecture: Architecture,
    /// The type of matrices; vectors and routers are floats.
    pub(crate) ty: BlockType,
}

/// Llama with these dimensions: hidden size, neurons, layers, heads, heads of keys and values, vocabulary.
pub(crate) fn llama(
    [hidden, neurons, layers, heads, kv_heads, vocab]: [usize; 6],
    ty: BlockType,
) -> RandomGguf {
    let config = json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": neurons, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 256, "tie_word_embeddings": true,
    });
    RandomGguf::new(config, Architecture::Llama, ty)
}

/// Two blocks of 64 channels.
pub(crate) fn small(ty: BlockType) -> RandomGguf {
    llama([64, 96, 2, 4, 2, 32], ty)
}

impl RandomGguf {
    pub(crate) fn new(config: Json, architecture: Architecture, ty: BlockType) -> Self {
        Self {
            config: Config::new(config.as_object().unwrap().clone()),
            architecture,
            ty,
        }
    }

    fn metadata(&self, model: &ModelConfig) -> Vec<(String, Value)> {
        let width = |count: usize| Value::from(count as u32);
        let of_config = |field: &str| width(self.config.usize(field).unwrap());
        let mut keys = vec![
            ("block_count", width(model.layers())),
            ("embedding_length", width(model.hidden)),
            ("context_length", width(model.max_positions)),
            ("feed_forward_length", of_config("intermediate_size")),
            ("attention.head_count", width(model.widths[0].heads)),
            ("attention.head_count_kv", width(model.widths[0].kv_heads)),
            ("attention.key_length", width(model.head_dim(0))),
            ("attention.value_length", width(model.head_dim(0))),
            (
                "attention.layer_norm_rms_epsilon",
                Value::from(model.norm.eps as f32),
            ),
        ];
        if let Some(mixture) = model.mixtures[0] {
            keys.push(("expert_count", width(mixture.experts)));
            keys.push(("expert_used_count", width(mixture.chosen)));
        }
        let name = self.architecture.name();
        let own = keys
            .into_iter()
            .map(|(key, value)| (format!("{name}.{key}"), value));
        let general = ("general.architecture".to_string(), Value::from(name));
        std::iter::once(general).chain(own).collect()
    }

    /// Writes the file and returns its size.
    pub(crate) fn write(&self, path: &Path) -> usize {
        let model = ModelConfig::new(&self.config).unwrap();
        let mut tensors = layout::tensors(&model, self.architecture, Experts::Stacked);
        tensors.retain(|tensor| !tensor.optional);
        let type_of = |float: bool| if float { BlockType::F32 } else { self.ty };
        let specs: Vec<TensorSpec> = tensors
            .iter()
            .map(|tensor| {
                let layout = BlockLayout::named(type_of(tensor.float).name()).unwrap();
                TensorSpec::new(&tensor.name, layout, tensor.shape.clone())
            })
            .collect();
        let metadata = self.metadata(&model);
        let mut writer = Writer::create(path, &metadata, &specs).unwrap();
        let mut state = 1u64;
        for tensor in &tensors {
            let cols = *tensor.shape.last().unwrap();
            let (centre, spread) = match tensor.shape.len() {
                1 => (1.0, 0.1),
                _ => (0.0, (3.0 / cols as f32).sqrt()),
            };
            let values: Vec<f32> = (0..tensor.shape.iter().product())
                .map(|_| {
                    state = state
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    let uniform = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                    centre + spread * uniform
                })
                .collect();
            let rows = quantise(type_of(tensor.float), &values, cols, None).unwrap();
            writer.write(&tensor.name, rows.bytes()).unwrap();
        }
        writer.finish().unwrap();
        std::fs::metadata(path).unwrap().len() as usize
    }
}
