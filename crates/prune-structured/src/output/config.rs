//! The config of a pruned checkpoint, and the loader beside it.

use super::form::{Form, Loading, NewBiases};
use super::layout::keeps_extras;
use crate::plan::Plan;
use crate::{Error, Result};
use causal_lm::config::{EXPERT_MAP, ExpertMap, Mixture, WIDTHS_KEY, in_own_form};
use causal_lm::{Decoder, LinearName, ModelConfig, Widths};
use serde_json::{Map, Value, json};
use tensor_io::Config;

/// File name of the Python loader that goes into folders which stock modules cannot open.
pub const LOADER_FILE: &str = "modeling_pruned.py";
/// The loader, with `BASE` standing for the stock class it extends, and without the modules of the architecture.
const LOADER: &str = include_str!("modeling_pruned.py");

/// The config of the output, and the files that it needs beside it.
pub(crate) fn pruned(
    decoder: &Decoder<'_>,
    plan: &Plan,
    form: Form,
) -> Result<(Config, Vec<(&'static str, String)>)> {
    let whole = &decoder.config_to_write()?;
    if plan.is_identity(decoder) {
        return Ok((whole.clone(), vec![]));
    }
    let whole = &in_own_form(whole)?;
    let model = decoder.config();
    let biases = NewBiases::of(decoder, plan);
    let widths = match form {
        Form::Sliced => plan.widths(),
        Form::Masked => model.widths.clone(),
    };
    let loading = Loading::of(decoder, plan, form);
    let extras = model.stock.extra_blocks;
    let extras = extras.filter(|_| !keeps_extras(decoder, plan, form));
    let text = || {
        let mut config = Config::new(text_fields(whole, model));
        if let Some(field) = extras.filter(|field| config.get(field).is_some()) {
            config.set(field, 0);
        }
        config
    };
    match loading {
        Loading::Stock => {
            let mut config = text();
            let slots = [
                (biases.attention, model.stock.attention_bias),
                (biases.mlp, model.stock.mlp_bias),
            ];
            for (_, field) in slots.into_iter().filter(|(new, _)| *new) {
                if let Some(field) = field {
                    config.set(field, true);
                }
            }
            if form == Form::Sliced {
                let heads = |w: &Widths| (w.heads, w.kv_heads);
                let dense = model.widths.iter().map(heads);
                let changed = !widths.iter().map(heads).eq(dense);
                let mut of_attention = widths.iter().zip(&model.delta_nets);
                let first = of_attention.find(|(_, net)| net.is_none());
                if let Some((first, _)) = first.filter(|_| changed) {
                    config.set("num_attention_heads", first.heads);
                    config.set("num_key_value_heads", first.kv_heads);
                    config.set("head_dim", model.head_dim(0));
                }
                if let Some(dense) = widths
                    .iter()
                    .zip(&model.mixtures)
                    .find(|(_, m)| m.is_none())
                {
                    config.set(model.stock.neurons, dense.0.neurons);
                }
                config.remove(WIDTHS_KEY);
            }
            match model.nested {
                false => Ok((config, vec![])),
                true => {
                    let mut whole = whole.clone();
                    whole.set("text_config", config.raw().clone());
                    Ok((whole, vec![]))
                }
            }
        }
        Loading::PerLayer => {
            let mut config = text();
            let lists = PerLayer {
                widths: &widths,
                mixtures: &model.mixtures,
                expert_maps: &model.expert_maps,
                biases: (
                    biases.attention || model.biases.o,
                    biases.mlp || model.biases.mlp,
                ),
            };
            let loader = lists.set(&mut config, model)?;
            Ok((config, vec![loader]))
        }
    }
}

/// Widths by layer, as a config lists them.
pub(crate) struct PerLayer<'a> {
    pub(crate) widths: &'a [Widths],
    pub(crate) mixtures: &'a [Option<Mixture>],
    pub(crate) expert_maps: &'a [Option<ExpertMap>],
    /// Whether output projections of attention and of MLPs have biases.
    pub(crate) biases: (bool, bool),
}

impl PerLayer<'_> {
    /// Lists the widths in `config` and gives the loader that reads them.
    ///
    /// The scalar fields keep the dense values: they satisfy every reader's own checks, and a reader that ignores the lists
    /// stops at the first shape instead of guessing.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an architecture that the loader cannot build.
    pub(crate) fn set(
        &self,
        config: &mut Config,
        model: &ModelConfig,
    ) -> Result<(&'static str, String)> {
        let gated = model.attention[0].gated;
        if model.attention.iter().any(|a| a.gated != gated) {
            return Err(Error::Unsupported {
                method: "the Python loader for widths by layer",
                model_type: model.model_type,
                reason: "some layers have attention with a gate and some without; keep widths equal",
            });
        }
        // Heads of several widths are stated by the architecture's own fields, by kinds of layers.
        let first = model.head_dim(0);
        if model.attention.iter().all(|a| a.head_dim == first) {
            config.set("head_dim", first);
        }
        let mut lists = Map::new();
        let mut list = |field: &str, of: &dyn Fn(usize) -> usize| {
            let values: Vec<usize> = (0..self.widths.len()).map(of).collect();
            lists.insert(field.into(), json!(values));
        };
        list("num_attention_heads", &|l| self.widths[l].heads);
        list("num_key_value_heads", &|l| self.widths[l].kv_heads);
        list("intermediate_size", &|l| self.widths[l].neurons);
        if self.mixtures.iter().any(Option::is_some) {
            let of = |l: usize, field: fn(Mixture) -> usize| self.mixtures[l].map_or(0, field);
            list("num_experts", &|l| of(l, |m| m.experts));
            list("expert_size", &|l| of(l, |m| m.width));
        }
        if self.expert_maps.iter().any(Option::is_some) {
            let layers = self.expert_maps.iter().zip(self.mixtures);
            let ids = layers.map(|(map, mixture)| match map {
                Some(map) => map.ids().to_vec(),
                None => (0..mixture.map_or(0, |mixture| mixture.experts)).collect(),
            });
            lists.insert(EXPERT_MAP.into(), json!(ids.collect::<Vec<_>>()));
        }
        lists.insert("o_proj_bias".into(), json!(self.biases.0));
        lists.insert("down_proj_bias".into(), json!(self.biases.1));
        config.set(WIDTHS_KEY, Value::Object(lists));
        let module = LOADER_FILE.trim_end_matches(".py");
        config.set(
            "auto_map",
            json!({ "AutoModelForCausalLM": format!("{module}.PrunedForCausalLM") }),
        );
        let modules = model.names.table().modules.iter();
        let modules: Map<String, Value> = modules
            .filter(|module| !module.parts[0].is_shared() && !module.is_delta_net())
            .map(|module| {
                let parts: Vec<&str> = module.parts.iter().map(|&part| part_name(part)).collect();
                (module.path.to_string(), json!(parts))
            })
            .collect();
        let modules = format!("MODULES = {}", Value::Object(modules));
        let loader = LOADER
            .replace("BASE", model.stock.class)
            .replace("MODULES = {}", &modules);
        let loader = match gated {
            true => loader.replace("GATED = False", "GATED = True"),
            false => loader,
        };
        Ok((LOADER_FILE, loader))
    }
}

/// What the loader calls a linear.
fn part_name(linear: LinearName) -> &'static str {
    match linear {
        LinearName::Q => "q",
        LinearName::K => "k",
        LinearName::V => "v",
        LinearName::O => "o",
        LinearName::Gate => "gate",
        LinearName::Up => "up",
        _ => "down",
    }
}

/// The decoder's own fields, with what it has from the whole that it is a part of.
fn text_fields(whole: &Config, model: &ModelConfig) -> Map<String, Value> {
    let text = whole.get("text_config").and_then(Value::as_object);
    let Some(text) = text.filter(|_| model.nested) else {
        return whole.raw().clone();
    };
    let mut fields = text.clone();
    fields.insert("model_type".into(), model.model_type.into());
    // The reference reads this one from the whole config alone.
    let tied = whole.get("tie_word_embeddings").cloned();
    let tied = tied.unwrap_or_else(|| model.tied.into());
    fields.insert("tie_word_embeddings".into(), tied);
    fields
}
