//! The config of a GGUF file: its metadata in the fields of `config.json`.

use serde_json::{Map, Value, json};
use tensor_io::Config;
use tensor_io::gguf::{Gguf, Metadata};

use super::{Architecture, content, families, names};
use crate::config::{WIDTHS_KEY, stock_class};
use crate::{LinearName, Result};

/// Largest number of blocks that is believed: lists of that length are made.
const MAX_LAYERS: usize = 1 << 16;

/// The keys of one architecture.
pub(super) struct Keys<'a> {
    pub(super) metadata: Metadata<'a>,
    pub(super) architecture: Architecture,
}

impl Keys<'_> {
    pub(super) fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name())
    }

    pub(super) fn usize(&self, key: &str) -> Result<usize> {
        Ok(self
            .metadata
            .required(&self.key(key), Metadata::get_usize)?)
    }

    pub(super) fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.metadata.get_usize(&self.key(key))?)
    }

    pub(super) fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        Ok(self.metadata.get_f64(&self.key(key))?)
    }

    fn opt_layers(&self, key: &str, layers: usize) -> Result<Option<Vec<usize>>> {
        Ok(self.metadata.get_usizes(&self.key(key), layers)?)
    }

    fn layers(&self, key: &str, layers: usize) -> Result<Vec<usize>> {
        let list = |metadata: &Metadata<'_>, key: &str| metadata.get_usizes(key, layers);
        Ok(self.metadata.required(&self.key(key), list)?)
    }

    fn is_list(&self, key: &str) -> bool {
        let found = self.metadata.value_type(&self.key(key));
        found.is_some_and(|(_, element)| element.is_some())
    }

    pub(super) fn refuse(&self, what: impl Into<String>) -> crate::Error {
        content(&self.metadata, what)
    }
}

/// The config as Hugging Face would have it.
pub(super) fn config(file: &Gguf, architecture: Architecture) -> Result<Config> {
    let keys = Keys {
        metadata: file.metadata(),
        architecture,
    };
    let experts = families::experts(file, &keys)?;
    let hidden = keys.usize("embedding_length")?;
    let layers = keys.usize("block_count")?;
    if layers == 0 || layers > MAX_LAYERS {
        return Err(keys.refuse(format!("{} is {layers}", keys.key("block_count"))));
    }
    // Each block has a tensor, unless lists give it no width at all, which are in the file then.
    let listed = keys.is_list("attention.head_count") && keys.is_list("feed_forward_length");
    if layers > file.tensors().len() && !listed {
        return Err(keys.refuse(format!(
            "{} is {layers}, but the file has {} tensors",
            keys.key("block_count"),
            file.tensors().len()
        )));
    }
    let widths = Widths::read(&keys, layers)?;
    let heads = Heads::read(&keys, hidden, &widths)?;
    heads.check(&keys, file, &widths)?;
    let embedding = file.info(names::EMBEDDING)?;
    let vocab = embedding.shape[0];
    if embedding.shape != [vocab, hidden] {
        return Err(keys.refuse(format!(
            "{} is {hidden}, but {} has shape {:?}",
            keys.key("embedding_length"),
            names::EMBEDDING,
            embedding.shape
        )));
    }
    if let Some(stated) = keys.opt_usize("vocab_size")?
        && stated != vocab
    {
        return Err(keys.refuse(format!(
            "{} is {stated}, but {} has {vocab} rows",
            keys.key("vocab_size"),
            names::EMBEDDING
        )));
    }
    let context = keys.usize("context_length")?;
    let biases = Biases::of(file, layers);
    let model_type = families::model_type(&keys, &biases, experts)?;
    let mut config = Config::new(Map::new());
    if let Some(class) = stock_class(model_type) {
        config.set("architectures", json!([class]));
    }
    config.set("model_type", model_type);
    config.set("hidden_act", "silu");
    config.set("hidden_size", hidden);
    config.set("num_hidden_layers", layers);
    widths.set(&mut config, architecture == Architecture::Gemma4);
    config.set("head_dim", heads.dim);
    config.set("vocab_size", vocab);
    config.set("max_position_embeddings", context);
    let (eps, field) = match architecture {
        Architecture::GptNeox => ("attention.layer_norm_epsilon", "layer_norm_eps"),
        _ => ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    };
    let eps = keys.key(eps);
    config.set(field, keys.metadata.required(&eps, Metadata::get_f64)?);
    let read = families::Read {
        file,
        keys: &keys,
        widths: &widths,
        layers,
        hidden,
        context,
        heads,
        biases,
        experts,
        theta: keys.opt_f64("rope.freq_base")?.unwrap_or(10_000.0),
    };
    read.rotation(&mut config)?;
    read.fields(&mut config)?;
    config.set("tie_word_embeddings", !file.contains(names::HEAD));
    let token = |key: &str| -> Result<Option<usize>> {
        let found = keys
            .metadata
            .get_usize(&format!("tokenizer.ggml.{key}_token_id"))?;
        // Some writers put the largest number where there is no such token.
        Ok(found.filter(|&id| id < vocab))
    };
    if let Some(bos) = token("bos")? {
        config.set("bos_token_id", bos);
    }
    let mut ends: Vec<usize> = Vec::new();
    for end in [token("eos")?, token("eot")?].into_iter().flatten() {
        if !ends.contains(&end) {
            ends.push(end);
        }
    }
    match ends[..] {
        [] => {}
        [end] => config.set("eos_token_id", end),
        _ => config.set("eos_token_id", ends),
    }
    Ok(config)
}

/// Widths of every layer.
pub(super) struct Widths {
    heads: Vec<usize>,
    kv_heads: Vec<usize>,
    neurons: Vec<usize>,
}

impl Widths {
    fn read(keys: &Keys<'_>, layers: usize) -> Result<Self> {
        let heads = keys.layers("attention.head_count", layers)?;
        let kv_heads = keys.opt_layers("attention.head_count_kv", layers)?;
        let mut kv_heads = kv_heads.unwrap_or_else(|| heads.clone());
        for (layer, (&heads, kv_heads)) in heads.iter().zip(&mut kv_heads).enumerate() {
            if heads == 0 {
                *kv_heads = 0;
            } else if *kv_heads == 0 {
                return Err(keys.refuse(format!(
                    "layer {layer} has a linear in the place of attention, which is not supported"
                )));
            }
        }
        Ok(Self {
            heads,
            kv_heads,
            neurons: keys.layers("feed_forward_length", layers)?,
        })
    }

    /// Query heads of a layer.
    pub(super) fn heads(&self, layer: usize) -> usize {
        self.heads[layer]
    }

    /// Heads of keys and values of a layer.
    pub(super) fn kv_heads(&self, layer: usize) -> usize {
        self.kv_heads[layer]
    }

    pub(super) fn are_equal_but_for_kv_heads(&self) -> bool {
        [&self.heads, &self.neurons]
            .into_iter()
            .all(|list| is_equal(list))
    }

    fn set(&self, config: &mut Config, kv_heads_by_kind: bool) {
        let lists = [&self.heads, &self.kv_heads, &self.neurons];
        let fields = [
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
        ];
        let uniform =
            self.are_equal_but_for_kv_heads() && (kv_heads_by_kind || is_equal(&self.kv_heads));
        if uniform {
            for (field, list) in fields.into_iter().zip(lists) {
                config.set(field, list[0]);
            }
            return;
        }
        let of = |(field, list): (&str, &Vec<usize>)| (field.to_string(), json!(list));
        let lists: Map<String, Value> = fields.into_iter().zip(lists).map(of).collect();
        config.set(WIDTHS_KEY, Value::Object(lists));
    }
}

/// Whether a width is the same in all layers, and there at all.
fn is_equal(list: &[usize]) -> bool {
    list[0] > 0 && list.iter().all(|width| *width == list[0])
}

/// Widths of a head.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) dim: usize,
    /// Channels that are rotated.
    pub(super) turned: usize,
}

impl Heads {
    fn read(keys: &Keys<'_>, hidden: usize, widths: &Widths) -> Result<Self> {
        // Sliding layers of Gemma 4 have a width of their own, which is that of a head in its config.
        let kind = match keys.architecture {
            Architecture::Gemma4 => "_swa",
            _ => "",
        };
        let key = format!("attention.key_length{kind}");
        let first = widths.heads[0];
        let divided = hidden
            .checked_div(first)
            .filter(|_| first > 0 && hidden.is_multiple_of(first));
        let stated = keys.opt_usize(&key)?;
        let Some(dim) = stated.or(divided).filter(|&width| width > 0) else {
            return Err(keys.refuse(format!(
                "{} is missing, and {hidden} channels do not divide into {first} heads",
                keys.key(&key)
            )));
        };
        let mut turned = dim;
        for (key, partial) in [
            (format!("attention.value_length{kind}"), false),
            (
                format!("rope.dimension_count{kind}"),
                families::rotates_a_part(keys.architecture),
            ),
        ] {
            let Some(found) = keys.opt_usize(&key)? else {
                // Without a length of its own, a value is as wide as what the heads divide.
                continue;
            };
            if partial && found > 0 && found < dim && found.is_multiple_of(2) {
                turned = found;
            } else if found != dim {
                return Err(keys.refuse(format!(
                    "{} is {found}, expected {dim}, the width of a head",
                    keys.key(&key)
                )));
            }
        }
        Ok(Self { dim, turned })
    }

    /// Refuses heads that are wider than the queries of the first block that has some: frequencies are made for every pair of
    /// channels.
    fn check(&self, keys: &Keys<'_>, file: &Gguf, widths: &Widths) -> Result<()> {
        let Some(layer) = widths.heads.iter().position(|&heads| heads > 0) else {
            return Ok(());
        };
        let queries = ["attn_q.weight", "attn_qkv.weight"].map(|name| names::in_block(layer, name));
        let Some(info) = queries.iter().find_map(|name| file.info(name).ok()) else {
            let [name, _] = queries;
            return Err(keys.refuse(format!("tensor `{name}` is missing")));
        };
        let rows = info.elements() / info.width().max(1);
        match self.dim <= rows {
            true => Ok(()),
            false => Err(keys.refuse(format!(
                "tensor `{}`: {rows} rows are no heads of {}",
                info.name, self.dim
            ))),
        }
    }
}

/// Which linears have biases in the file.
#[derive(Clone, Copy)]
pub(super) struct Biases {
    /// q, k and v of every layer that has them.
    pub(super) qkv: bool,
    /// o of every layer.
    pub(super) o: bool,
    /// o of any layer.
    pub(super) any_o: bool,
    /// gate, up and down of every layer.
    pub(super) mlp: bool,
}

impl Biases {
    fn of(file: &Gguf, layers: usize) -> Self {
        let has = |layer: usize, of: LinearName, kind: &str| {
            file.contains(&names::in_block(
                layer,
                &format!("{}.{kind}", names::linear(of)),
            ))
        };
        // A layer without the weight needs no bias, but at least one must have one.
        let all = |of: &[LinearName]| {
            of.iter().all(|&of| {
                let mut with = (0..layers)
                    .filter(|&layer| has(layer, of, "weight"))
                    .peekable();
                with.peek().is_some() && with.all(|layer| has(layer, of, "bias"))
            })
        };
        Self {
            qkv: all(&[LinearName::Q, LinearName::K, LinearName::V])
                || file.contains(&names::in_block(0, "attn_qkv.bias")),
            o: all(&[LinearName::O]),
            any_o: (0..layers).any(|layer| has(layer, LinearName::O, "bias")),
            mlp: all(&[LinearName::Gate, LinearName::Up, LinearName::Down]),
        }
    }
}
