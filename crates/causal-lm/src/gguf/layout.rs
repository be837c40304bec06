//! Which tensors a file of an architecture has, and which rows of a checkpoint's tensors they are made of.
//!
//! One description serves both ways: an export gathers the rows of each tensor of the file, and a reader finds for each
//! tensor of a checkpoint where the file has its rows.

use std::ops::Range;

use super::names::{self, in_block};
use super::{Architecture, Order};
use crate::LinearName;
use crate::config::{LAYER_SCALAR, ModelConfig, NormKind, QkNorm};
use crate::names::{ExpertLayout, Module, Rows as Interleaving};

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct FileTensor {
    /// Its name.
    pub name: String,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// Rows of a checkpoint's tensors, one part below the other.
    pub parts: Vec<Part>,
    /// What is added to the checkpoint's values.
    pub offset: f32,
    /// What the sum is multiplied with: readers that know no factor of attention logits find it here.
    pub factor: f32,
    /// Whether it is in 32-bit floats whatever the type of the file: vectors and routers.
    pub float: bool,
    /// Whether models may do without it: a bias.
    pub optional: bool,
}

/// Rows of a tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The tensor.
    pub tensor: String,
    /// Which of its rows, when all dimensions but the last are taken as rows; of a vector its values.
    pub rows: Rows,
}

/// Rows of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// All of them.
    All,
    /// Neighbours.
    Range(Range<usize>),
    /// All of them in another order.
    Order(Order),
}

/// How a file stores experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experts {
    /// Gate, up and down of all experts of a block in a tensor each.
    Stacked,
    /// Each expert in tensors of its own, as early files of Mixtral have them.
    Alone,
}

/// What q is multiplied with for readers that take the factor on attention logits from widths alone.
fn query_factor(config: &ModelConfig, architecture: Architecture, layer: usize) -> f32 {
    if !matches!(architecture, Architecture::Gemma2 | Architecture::Gemma3) {
        return 1.0;
    }
    let widths = (
        config.hidden,
        config.widths[layer].heads,
        config.head_dim(layer),
    );
    let width = super::attention_width(architecture, config.layers(), widths);
    let factor = config.attention[layer].scale * width.sqrt();
    match (factor - 1.0).abs() < 1e-9 {
        true => 1.0,
        false => factor as f32,
    }
}

/// The tensors of a file of `config` as `architecture`, in the order of the data, apart from factors of the rotation.
pub fn tensors(
    config: &ModelConfig,
    architecture: Architecture,
    experts: Experts,
) -> Vec<FileTensor> {
    let layout = Layout {
        config,
        architecture,
    };
    let (hidden, vocab) = (config.hidden, config.vocab);
    let mut all = vec![whole(
        names::EMBEDDING.into(),
        vec![vocab, hidden],
        config.names.embedding(),
    )];
    for layer in 0..config.layers() {
        layout.norms(layer, &mut all);
        for module in config.names.table().modules {
            layout.module(layer, module, &mut all);
        }
        layout.experts(layer, experts, &mut all);
        if config.layer_scalar {
            all.push(whole(
                in_block(layer, "layer_output_scale.weight"),
                vec![1],
                config.names.block(layer, LAYER_SCALAR),
            ));
        }
    }
    for kind in layout.norm_kinds() {
        all.push(FileTensor {
            offset: layout.offset(kind),
            ..whole(
                names::FINAL_NORM.replace("weight", kind),
                vec![hidden],
                config.names.final_norm(kind),
            )
        });
    }
    if !config.tied {
        all.push(whole(
            names::HEAD.into(),
            vec![vocab, hidden],
            config.names.head().into(),
        ));
    }
    all
}

/// A tensor that is one of the checkpoint's as it is.
fn whole(name: String, shape: Vec<usize>, tensor: String) -> FileTensor {
    FileTensor {
        name,
        float: shape.len() == 1,
        shape,
        parts: vec![Part {
            tensor,
            rows: Rows::All,
        }],
        offset: 0.0,
        factor: 1.0,
        optional: false,
    }
}

/// Those of `tensors` that have rows of a checkpoint's tensor.
pub fn holders<'t>(
    tensors: &'t [FileTensor],
    tensor: &str,
) -> impl Iterator<Item = &'t FileTensor> {
    tensors
        .iter()
        .filter(move |holder| holder.parts.iter().any(|part| part.tensor == tensor))
}

struct Layout<'a> {
    config: &'a ModelConfig,
    architecture: Architecture,
}

impl Layout<'_> {
    fn norm_kinds(&self) -> &'static [&'static str] {
        match self.config.norm.kind {
            NormKind::Layer => &["weight", "bias"],
            NormKind::Rms => &["weight"],
        }
    }

    /// Files hold the weights that norms multiply with.
    fn offset(&self, kind: &str) -> f32 {
        match kind {
            "weight" => self.config.norm.offset as f32,
            _ => 0.0,
        }
    }

    fn norms(&self, layer: usize, all: &mut Vec<FileTensor>) {
        let (config, table) = (self.config, self.config.names.table());
        let (hidden, d, widths) = (config.hidden, config.head_dim(layer), config.widths[layer]);
        let [q, k] = match config.qk_norm {
            QkNorm::None => [None; 2],
            _ if widths.heads == 0 => [None; 2],
            QkNorm::Heads => [Some(d); 2],
            QkNorm::Projection => [Some(widths.heads * d), Some(widths.kv_heads * d)],
        };
        let qk = |width: Option<usize>, path| width.map(|width| (path, width));
        let of_hidden = |path: Option<&'static str>| path.map(|path| (path, hidden));
        let norms = [
            ("attn_norm", of_hidden(table.attention_before)),
            ("attn_q_norm", qk(q, table.q_norm)),
            ("attn_k_norm", qk(k, table.k_norm)),
            ("post_attention_norm", of_hidden(table.attention_after)),
            ("ffn_norm", of_hidden(table.mlp_before)),
            ("post_ffw_norm", of_hidden(table.mlp_after)),
        ];
        for (name, norm) in norms {
            let Some((path, width)) = norm else { continue };
            let factor = match name {
                "attn_q_norm" => query_factor(config, self.architecture, layer),
                _ => 1.0,
            };
            for kind in self.norm_kinds() {
                all.push(FileTensor {
                    offset: self.offset(kind),
                    factor,
                    ..whole(
                        in_block(layer, &format!("{name}.{kind}")),
                        vec![width],
                        config.names.block(layer, &format!("{path}.{kind}")),
                    )
                });
            }
        }
    }

    fn module(&self, layer: usize, module: &Module, all: &mut Vec<FileTensor>) {
        let config = self.config;
        let Some([rows, cols]) = config.module_shape(layer, module) else {
            return;
        };
        let stored = config.names.weight(layer, module);
        let bias = config.names.bias(layer, module);
        let mut push = |name: &str, range: Option<Range<usize>>, order: Option<Order>| {
            let count = range.as_ref().map_or(rows, Range::len);
            let selected = match (range, order) {
                (_, Some(order)) => Rows::Order(order),
                (Some(range), None) => Rows::Range(range),
                (None, None) => Rows::All,
            };
            for (kind, tensor, shape) in [
                ("weight", &stored, vec![count, cols]),
                ("bias", &bias, vec![count]),
            ] {
                // Norms of heads come after q, and take the factor themselves.
                let factor = match config.qk_norm == QkNorm::None && name == "attn_q" {
                    true => query_factor(config, self.architecture, layer),
                    false => 1.0,
                };
                all.push(FileTensor {
                    factor,
                    optional: kind == "bias",
                    parts: vec![Part {
                        tensor: tensor.clone(),
                        rows: selected.clone(),
                    }],
                    ..whole(
                        in_block(layer, &format!("{name}.{kind}")),
                        shape,
                        String::new(),
                    )
                });
            }
        };
        let d = config.head_dim(layer);
        match (module.parts, module.rows) {
            (&[one], _) => {
                let rotated = matches!(one, LinearName::Q | LinearName::K)
                    && self.architecture.rotates_neighbours();
                let order = rotated.then_some(Order::Neighbours { rows, head_dim: d });
                push(names::linear(one), None, order);
            }
            (parts, interleaving) if parts[0].is_attention() => {
                let order =
                    (interleaving == Interleaving::PerHead).then_some(Order::PartAfterPart {
                        heads: config.widths[layer].heads,
                        parts: parts.len(),
                        head_dim: d,
                    });
                push("attn_qkv", None, order);
            }
            _ if self.architecture.splits_gate_and_up() => {
                for run in config.runs(layer, module) {
                    let range = run.at..run.at + run.rows.len();
                    push(names::linear(run.part), Some(range), None);
                }
            }
            // The gate above, as they are stored.
            _ => push(names::linear(LinearName::Up), None, None),
        }
    }

    fn experts(&self, layer: usize, experts: Experts, all: &mut Vec<FileTensor>) {
        let (config, hidden) = (self.config, self.config.hidden);
        let Some(mixture) = config.mixtures[layer] else {
            return;
        };
        if let Some(router) = config.names.router(layer) {
            all.push(FileTensor {
                float: true,
                ..whole(
                    in_block(layer, names::ROUTER),
                    vec![mixture.experts, hidden],
                    router,
                )
            });
        }
        if let Some(gate) = config
            .names
            .shared_gate(layer)
            .filter(|_| mixture.shared > 0)
        {
            let name = in_block(layer, "ffn_gate_inp_shexp.weight");
            all.push(whole(name, vec![hidden], gate));
        }
        for linear in [LinearName::Gate, LinearName::Up, LinearName::Down] {
            let name = names::linear(linear);
            let parts = (0..mixture.experts).filter_map(|expert| {
                let part = config.expert_part(layer, expert, linear)?;
                let shape = vec![part.rows.len(), part.columns];
                let rows = match config.names.layout() {
                    ExpertLayout::Alone => Rows::All,
                    ExpertLayout::Fused => Rows::Range(part.rows),
                };
                let tensor = part.tensor;
                Some((shape, Part { tensor, rows }))
            });
            match experts {
                Experts::Stacked => {
                    let (shapes, parts): (Vec<Vec<usize>>, Vec<Part>) = parts.unzip();
                    let mut shape = vec![mixture.experts];
                    shape.extend(shapes.into_iter().next().unwrap_or_default());
                    all.push(FileTensor {
                        parts,
                        float: false,
                        ..whole(
                            in_block(layer, &format!("{name}_exps.weight")),
                            shape,
                            String::new(),
                        )
                    });
                }
                Experts::Alone => all.extend(parts.enumerate().map(|(expert, (shape, part))| {
                    let name = in_block(layer, &format!("{name}.{expert}.weight"));
                    FileTensor {
                        parts: vec![part],
                        ..whole(name, shape, String::new())
                    }
                })),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tensor_io::Config;

    fn of(
        model_type: &str,
        changes: serde_json::Value,
        architecture: Architecture,
    ) -> Vec<FileTensor> {
        let mut fields = json!({
            "model_type": model_type, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 10,
            "max_position_embeddings": 16,
        });
        let fields = fields.as_object_mut().unwrap();
        fields.extend(changes.as_object().unwrap().clone());
        let config = ModelConfig::new(&Config::new(fields.clone())).unwrap();
        tensors(&config, architecture, Experts::Stacked)
    }

    fn named<'t>(all: &'t [FileTensor], name: &str) -> &'t FileTensor {
        let found = all.iter().find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("no {name}"))
    }

    #[test]
    fn every_tensor_of_a_block_has_a_place_and_others_have_none() {
        let all = of("llama", json!({}), Architecture::Llama);
        for (name, source) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            (
                "blk.1.ffn_norm.weight",
                "model.layers.1.post_attention_layernorm.weight",
            ),
            (
                "blk.0.attn_output.bias",
                "model.layers.0.self_attn.o_proj.bias",
            ),
        ] {
            let part = &named(&all, name).parts[0];
            assert_eq!((part.tensor.as_str(), &part.rows), (source, &Rows::All));
        }
        let key = named(&all, "blk.1.attn_k.weight");
        assert_eq!(
            key.parts[0].tensor,
            "model.layers.1.self_attn.k_proj.weight"
        );
        let Rows::Order(order) = key.parts[0].rows else {
            panic!("rows of k stay in their order");
        };
        assert_eq!(order.all_in_checkpoint(), [0, 2, 1, 3, 4, 6, 5, 7]);
        for none in [
            "output.bias",
            "blk.0.ffn_gate_inp.weight",
            "blk.x.attn_q.weight",
            "blk.0.attn_q.scale",
            "blk.2.attn_q.weight",
            "rope_freqs",
        ] {
            assert!(all.iter().all(|tensor| tensor.name != none), "{none}");
        }
    }

    #[test]
    fn experts_are_stacked_and_their_router_stays_in_floats() {
        let changes = json!({"num_local_experts": 3, "num_experts_per_tok": 2});
        let all = of("mixtral", changes.clone(), Architecture::Llama);
        let up = named(&all, "blk.0.ffn_up_exps.weight");
        assert_eq!(up.shape, [3, 6, 8]);
        let expected = [0, 1, 2]
            .map(|expert| format!("model.layers.0.block_sparse_moe.experts.{expert}.w3.weight"));
        let found: Vec<&String> = up.parts.iter().map(|part| &part.tensor).collect();
        assert_eq!(found, expected.iter().collect::<Vec<_>>());
        assert!(named(&all, "blk.1.ffn_gate_inp.weight").float);
        assert!(!up.float);
        let granite = of("granitemoe", changes, Architecture::GraniteMoe);
        let up = named(&granite, "blk.0.ffn_up_exps.weight");
        let rows: Vec<&Rows> = up.parts.iter().map(|part| &part.rows).collect();
        assert_eq!(
            rows,
            [
                &Rows::Range(6..12),
                &Rows::Range(18..24),
                &Rows::Range(30..36)
            ]
        );
    }

    #[test]
    fn stacked_projections_are_one_tensor_and_alternating_ones_are_put_in_order() {
        let phi = of("phi3", json!({}), Architecture::Phi3);
        let qkv = named(&phi, "blk.0.attn_qkv.weight");
        assert_eq!((&qkv.shape, &qkv.parts[0].rows), (&vec![24, 8], &Rows::All));
        assert_eq!(named(&phi, "blk.0.ffn_up.weight").shape, [12, 8]);
        let whole_heads = json!({"rotary_pct": 1.0});
        let pythia = of("gpt_neox", whole_heads, Architecture::GptNeox);
        let qkv = named(&pythia, "blk.0.attn_qkv.bias");
        // Two heads of four channels: q, k, v of the first, then of the second.
        let order: Vec<usize> = [0, 12, 4, 16, 8, 20]
            .into_iter()
            .flat_map(|start| start..start + 4)
            .collect();
        let Rows::Order(found) = qkv.parts[0].rows else {
            panic!("rows of q, k and v stay in their order");
        };
        assert_eq!(found.all_in_checkpoint(), order);
    }

    #[test]
    fn norms_are_stored_as_they_multiply() {
        let gemma = of("gemma2", json!({}), Architecture::Gemma2);
        let norm = named(&gemma, "blk.0.post_ffw_norm.weight");
        assert_eq!(norm.offset, 1.0);
        assert_eq!(
            norm.parts[0].tensor,
            "model.layers.0.post_feedforward_layernorm.weight"
        );
        let glm = of("glm4", json!({}), Architecture::Glm4);
        let norm = named(&glm, "blk.0.post_attention_norm.weight");
        assert_eq!(norm.offset, 0.0);
        assert_eq!(
            norm.parts[0].tensor,
            "model.layers.0.post_self_attn_layernorm.weight"
        );
    }
}
