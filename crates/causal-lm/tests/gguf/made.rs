//! GGUF files made from the golden models of this crate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use causal_lm::LinearName;
use causal_lm::config::QkNorm;
use causal_lm::gguf::names;
use causal_lm::gguf::{Architecture, Order};
use packed::{BlockType, QuantRows, quantise};
use tensor_io::gguf::{BlockLayout, TensorSpec, Value, Writer};

use crate::common::{Golden, entries};

/// Norms of a block: their names in files and in Hugging Face.
const NORMS: [(&str, &str); 4] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
];

/// A tensor's shape, type and bytes.
pub(crate) struct Made {
    pub(crate) shape: Vec<usize>,
    pub(crate) ty: BlockType,
    pub(crate) bytes: Vec<u8>,
}

/// A file to be changed and written.
pub(crate) struct File {
    pub(crate) architecture: Architecture,
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: BTreeMap<String, Made>,
}

/// Dimensions of the model to be made.
#[derive(Clone)]
pub(crate) struct Widths {
    pub(crate) hidden: usize,
    pub(crate) head_dim: usize,
    pub(crate) heads: Vec<usize>,
    pub(crate) kv_heads: Vec<usize>,
    pub(crate) neurons: Vec<usize>,
}

impl Widths {
    pub(crate) fn of(golden: &Golden) -> Self {
        let config = causal_lm::ModelConfig::new(&golden.config()).unwrap();
        Self {
            hidden: config.hidden,
            head_dim: config.head_dim(0),
            heads: config.widths.iter().map(|w| w.heads).collect(),
            kv_heads: config.widths.iter().map(|w| w.kv_heads).collect(),
            neurons: config.widths.iter().map(|w| w.neurons).collect(),
        }
    }
}

impl File {
    /// The model of `golden` in this architecture, with the blocks of `ty` where rows allow it.
    pub(crate) fn of(golden: &Golden, architecture: Architecture, ty: BlockType) -> Self {
        Self::with_widths(golden, architecture, ty, &Widths::of(golden))
    }

    pub(crate) fn with_widths(
        golden: &Golden,
        architecture: Architecture,
        ty: BlockType,
        widths: &Widths,
    ) -> Self {
        let config = causal_lm::ModelConfig::new(&golden.config()).unwrap();
        let mut file = Self {
            architecture,
            metadata: vec![("general.architecture".into(), architecture.name().into())],
            tensors: BTreeMap::new(),
        };
        let list = |values: &[usize]| -> Value {
            match values.iter().all(|value| *value == values[0]) {
                true => (values[0] as u32).into(),
                false => values
                    .iter()
                    .map(|&value| value as i32)
                    .collect::<Vec<_>>()
                    .into(),
            }
        };
        let raw = golden.config();
        let theta = match raw.opt_section("rope_parameters").unwrap() {
            Some(section) => section.f64("rope_theta").unwrap(),
            None => raw.f64("rope_theta").unwrap(),
        };
        for (key, value) in [
            ("vocab_size", (config.vocab as u32).into()),
            ("context_length", (config.max_positions as u32).into()),
            ("embedding_length", (widths.hidden as u32).into()),
            ("block_count", (widths.heads.len() as u32).into()),
            ("feed_forward_length", list(&widths.neurons)),
            ("attention.head_count", list(&widths.heads)),
            ("attention.head_count_kv", list(&widths.kv_heads)),
            ("attention.key_length", (widths.head_dim as u32).into()),
            ("attention.value_length", (widths.head_dim as u32).into()),
            (
                "attention.layer_norm_rms_epsilon",
                (config.norm.eps as f32).into(),
            ),
            ("rope.freq_base", (theta as f32).into()),
        ] {
            file.set(key, value);
        }
        let (hidden, vocab, hf) = (widths.hidden, config.vocab, config.names);
        let (embedding, norm) = (hf.embedding(), hf.final_norm_weight());
        file.put(names::EMBEDDING, &embedding, &[vocab, hidden], ty, None);
        file.put(names::FINAL_NORM, &norm, &[hidden], BlockType::F32, None);
        if !config.tied {
            file.put(names::HEAD, hf.head(), &[vocab, hidden], ty, None);
        }
        for layer in 0..widths.heads.len() {
            let d = widths.head_dim;
            let (heads, kv_heads) = (widths.heads[layer], widths.kv_heads[layer]);
            for (at, (ours, theirs)) in NORMS.into_iter().enumerate() {
                let absent = match at {
                    0 => heads == 0,
                    1 => widths.neurons[layer] == 0,
                    _ => config.qk_norm == QkNorm::None,
                };
                let width = if at < 2 { hidden } else { d };
                if !absent {
                    let name = names::in_block(layer, ours);
                    file.put(
                        &name,
                        &hf.block(layer, theirs),
                        &[width],
                        BlockType::F32,
                        None,
                    );
                }
            }
            for of in LinearName::ALL {
                let [rows, cols] = match of {
                    LinearName::Q => [heads * d, hidden],
                    LinearName::K | LinearName::V => [kv_heads * d, hidden],
                    LinearName::O => [hidden, heads * d],
                    LinearName::Gate | LinearName::Up => [widths.neurons[layer], hidden],
                    LinearName::Down => [hidden, widths.neurons[layer]],
                    _ => continue,
                };
                if rows * cols == 0 {
                    continue;
                }
                let stored = hf.module_of(of).unwrap();
                let rotated = matches!(of, LinearName::Q | LinearName::K);
                let head = (rotated && architecture.rotates_neighbours()).then_some(d);
                let name =
                    |kind: &str| names::in_block(layer, &format!("{}.{kind}", names::linear(of)));
                file.put(
                    &name("weight"),
                    &hf.weight(layer, stored),
                    &[rows, cols],
                    ty,
                    head,
                );
                if config.has_bias(of) {
                    file.put(
                        &name("bias"),
                        &hf.bias(layer, stored),
                        &[rows],
                        BlockType::F32,
                        head,
                    );
                }
            }
        }
        file
    }

    /// Sets a key of the architecture.
    pub(crate) fn set(&mut self, key: &str, value: Value) {
        let key = format!("{}.{key}", self.architecture.name());
        self.metadata.retain(|(other, _)| *other != key);
        self.metadata.push((key, value));
    }

    /// Adds the tensor that the formula gives for the name in Hugging Face.
    fn put(&mut self, name: &str, hf: &str, shape: &[usize], ty: BlockType, head: Option<usize>) {
        let cols = *shape.last().unwrap();
        let ty = match ty.is_quantised() && !cols.is_multiple_of(ty.block_len()) {
            true => BlockType::F16,
            false => ty,
        };
        let rows = quantise(ty, &entries(hf, shape), cols, None).unwrap();
        let bytes = match head {
            None => rows.into_bytes(),
            Some(head_dim) => {
                // A bias has one value for each row.
                let (count, width) = if shape.len() == 1 {
                    (cols, 1)
                } else {
                    (shape[0], cols)
                };
                let rows = QuantRows::new(ty, count, width, rows.into_bytes()).unwrap();
                let order = Order::Neighbours {
                    rows: count,
                    head_dim,
                };
                rows.select(&order.all_in_checkpoint())
                    .unwrap()
                    .into_bytes()
            }
        };
        let shape = shape.to_vec();
        self.tensors.insert(name.into(), Made { shape, ty, bytes });
    }

    /// Writes the file into `dir`.
    pub(crate) fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("model.gguf");
        let layout = |ty: BlockType| BlockLayout::named(ty.name()).unwrap();
        let specs: Vec<TensorSpec> = self
            .tensors
            .iter()
            .map(|(name, made)| TensorSpec::new(name, layout(made.ty), made.shape.clone()))
            .collect();
        let mut writer = Writer::create(&path, &self.metadata, &specs).unwrap();
        for (name, made) in &self.tensors {
            writer.write(name, &made.bytes).unwrap();
        }
        writer.finish().unwrap();
        path
    }
}
