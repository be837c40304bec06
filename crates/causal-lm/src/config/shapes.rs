//! Shapes of linears and tensors, and which stored rows are which linear.

use super::{ExpertMap, Mixture, ModelConfig, NormKind, QkNorm, Widths};
use crate::names::{ExpertLayout, ExpertPart, LinearName, Module, Rows, Run};
use crate::{Error, Result};

impl ModelConfig {
    /// Shape of a block's linear, `[out, in]`; `None` where the block has no such linear.
    pub fn linear_shape(&self, layer: usize, name: LinearName) -> Option<[usize; 2]> {
        let (hidden, attention) = (self.hidden, &self.attention[layer]);
        let head_dim = attention.head_dim;
        let Widths {
            heads,
            kv_heads,
            neurons,
        } = self.widths[layer];
        let q_rows = match attention.gated {
            true => 2 * head_dim,
            false => head_dim,
        };
        let delta = self.delta_nets[layer].filter(|_| name.is_delta_net());
        let shape = match name {
            LinearName::Q => [heads * q_rows, hidden],
            LinearName::V if attention.value_is_key => return None,
            LinearName::K | LinearName::V => [kv_heads * head_dim, hidden],
            LinearName::O => [hidden, heads * head_dim],
            LinearName::Gate if !self.gated_mlp => return None,
            LinearName::Gate | LinearName::Up => [neurons, hidden],
            LinearName::Down => [hidden, neurons],
            LinearName::SharedGate | LinearName::SharedUp => [self.shared(layer), hidden],
            LinearName::SharedDown => [hidden, self.shared(layer)],
            LinearName::DeltaQkv => [delta?.channels(), hidden],
            LinearName::DeltaZ => [delta?.values(), hidden],
            LinearName::DeltaB | LinearName::DeltaA => [delta?.value_heads, hidden],
            LinearName::DeltaOut => [hidden, delta?.values()],
        };
        (shape[0] > 0 && shape[1] > 0).then_some(shape)
    }

    /// Whether the architecture gives this linear a bias.
    pub fn has_bias(&self, name: LinearName) -> bool {
        match name {
            LinearName::Q | LinearName::K | LinearName::V => self.biases.qkv,
            LinearName::O => self.biases.o,
            LinearName::Gate | LinearName::Up | LinearName::Down => self.biases.mlp,
            LinearName::SharedGate | LinearName::SharedUp | LinearName::SharedDown => false,
            LinearName::DeltaQkv
            | LinearName::DeltaZ
            | LinearName::DeltaB
            | LinearName::DeltaA
            | LinearName::DeltaOut => false,
        }
    }

    /// Neurons of the expert that every token of a block passes through.
    fn shared(&self, layer: usize) -> usize {
        self.mixtures[layer].map_or(0, |mixture| mixture.shared)
    }

    /// Where gate, up or down of an expert are stored; `None` for other linears and blocks, and experts that are not there.
    pub fn expert_part(&self, layer: usize, expert: usize, name: LinearName) -> Option<ExpertPart> {
        let mixture = (*self.mixtures.get(layer)?)?;
        if expert >= mixture.experts {
            return None;
        }
        let (hidden, width) = (self.hidden, mixture.width);
        let names = self.names.table().experts.as_ref()?;
        // Place among the names, rows, columns, and for a fused tensor its name, rows of each expert and rows before ours.
        let (at, rows, columns, fused) = match name {
            LinearName::Gate => (0, width, hidden, (names.fused.gate_up, 2 * width, 0)),
            LinearName::Up => (1, width, hidden, (names.fused.gate_up, 2 * width, width)),
            LinearName::Down => (2, hidden, width, (names.fused.down, hidden, 0)),
            _ => return None,
        };
        let part = match (self.names.layout(), &names.alone) {
            (ExpertLayout::Alone, Some(alone)) => ExpertPart {
                tensor: self.names.block(
                    layer,
                    &format!("{}{expert}.{}.weight", alone.before, alone.linears[at]),
                ),
                rows: 0..rows,
                columns,
            },
            _ => {
                let (path, of_expert, before) = fused;
                let first = expert * of_expert + before;
                ExpertPart {
                    tensor: self.names.block(layer, path),
                    rows: first..first + rows,
                    columns,
                }
            }
        };
        Some(part)
    }

    /// Name and shape of the tensors of a block's experts, router included.
    fn expert_tensors(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let (Some(mixture), Some(names)) =
            (self.mixtures[layer], self.names.table().experts.as_ref())
        else {
            return vec![];
        };
        let (hidden, width, experts) = (self.hidden, mixture.width, mixture.experts);
        let rows = self.router_rows(layer);
        let router = self
            .names
            .router(layer)
            .map(|name| (name, vec![rows, hidden]));
        let constants = self.expert_maps[layer].as_ref();
        let constants = constants.map_or(0, ExpertMap::constants);
        let novices = self.names.novices(layer).filter(|_| constants > 0);
        let gate = self.names.shared_gate(layer).filter(|_| mixture.shared > 0);
        let mut tensors: Vec<(String, Vec<usize>)> = router.into_iter().collect();
        tensors.extend(novices.map(|name| (name, vec![constants, hidden])));
        tensors.extend(gate.map(|name| (name, vec![1, hidden])));
        match self.names.layout() {
            ExpertLayout::Alone => {
                for expert in 0..experts {
                    for name in [LinearName::Gate, LinearName::Up, LinearName::Down] {
                        let part = self.expert_part(layer, expert, name);
                        tensors.extend(
                            part.map(|part| (part.tensor, vec![part.rows.len(), part.columns])),
                        );
                    }
                }
            }
            ExpertLayout::Fused => {
                let name = |path| self.names.block(layer, path);
                tensors.push((name(names.fused.gate_up), vec![experts, 2 * width, hidden]));
                tensors.push((name(names.fused.down), vec![experts, hidden, width]));
            }
        }
        tensors
    }

    /// Whether stock classes have, or can be told to have, a bias there.
    pub fn has_bias_slot(&self, name: LinearName) -> bool {
        let slot = match name.is_attention() {
            _ if name.is_delta_net() => None,
            true => self.stock.attention_bias,
            false => self.stock.mlp_bias,
        };
        self.has_bias(name) || slot.is_some()
    }

    /// Shape of a stored module, `[out, in]`; `None` where the block has none of its parts.
    pub fn module_shape(&self, layer: usize, module: &Module) -> Option<[usize; 2]> {
        let shapes = module.parts.iter();
        let shapes = shapes.filter_map(|&part| self.linear_shape(layer, part));
        shapes.reduce(|[out, input], [more, _]| [out + more, input])
    }

    /// Which rows of which linear a stored module holds, in their stored order.
    pub fn runs(&self, layer: usize, module: &Module) -> Vec<Run> {
        let mut at = 0;
        let mut run = |part, start: usize, len: usize| {
            let run = Run {
                part,
                rows: start..start + len,
                at,
            };
            at += len;
            run
        };
        let parts: Vec<(LinearName, usize)> = module
            .parts
            .iter()
            .filter_map(|&part| Some((part, self.linear_shape(layer, part)?[0])))
            .collect();
        match module.rows {
            Rows::Stacked => parts
                .iter()
                .map(|&(part, rows)| run(part, 0, rows))
                .collect(),
            Rows::PerHead => {
                let d = self.head_dim(layer);
                let heads = self.widths[layer].heads;
                (0..heads)
                    .flat_map(|head| parts.iter().map(move |&(part, _)| (part, head * d)))
                    .map(|(part, start)| run(part, start, d))
                    .collect()
            }
        }
    }

    /// Stored rows that remain of a module when `kept` gives the ascending rows that remain of each part.
    pub fn stored_rows(
        &self,
        layer: usize,
        module: &Module,
        kept: impl Fn(LinearName) -> Vec<usize>,
    ) -> Vec<usize> {
        let of_part: Vec<(LinearName, Vec<usize>)> = module
            .parts
            .iter()
            .map(|&part| (part, kept(part)))
            .collect();
        let mut rows = Vec::new();
        for run in self.runs(layer, module) {
            let kept = of_part.iter().find(|(part, _)| *part == run.part);
            let kept = kept.map_or(&[][..], |(_, rows)| rows);
            let first = kept.partition_point(|&row| row < run.rows.start);
            let inside = kept[first..].iter().take_while(|&&row| row < run.rows.end);
            rows.extend(inside.map(|row| run.at + row - run.rows.start));
        }
        rows
    }

    /// Refuses more blocks and experts than a checkpoint of so many tensors can have, before anything is made for each of them.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] with the field.
    pub(crate) fn check_counts(&self, tensors: usize) -> Result<()> {
        let of_layer = |mixture: &Option<Mixture>| mixture.map_or(0, |mixture| mixture.experts);
        let experts = match self.names.layout() {
            ExpertLayout::Alone => self.mixtures.iter().map(of_layer).sum(),
            ExpertLayout::Fused => 0,
        };
        for (field, count) in [
            ("num_hidden_layers", self.layers()),
            ("num_experts", experts),
        ] {
            if count > tensors {
                return Err(Error::InvalidConfig {
                    field,
                    reason: format!("{count} in all, but the checkpoint has {tensors} tensors"),
                });
            }
        }
        Ok(())
    }

    /// Name and shape of every tensor of the decoder, in the order of the data.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, vocab, names) = (self.hidden, self.vocab, &self.names);
        let table = names.table();
        let mut tensors = vec![(names.embedding(), vec![vocab, hidden])];
        let layer_norm = self.norm.kind == NormKind::Layer;
        let norm_kinds: &[&str] = if layer_norm {
            &["weight", "bias"]
        } else {
            &["weight"]
        };
        for layer in 0..self.layers() {
            let widths = self.widths[layer];
            let mut norm = |path: Option<&str>, width: usize| {
                for kind in path.iter().flat_map(|_| norm_kinds) {
                    let path = format!("{}.{kind}", path.unwrap_or_default());
                    tensors.push((names.block(layer, &path), vec![width]));
                }
            };
            norm(table.attention_before, hidden);
            let d = self.head_dim(layer);
            let qk = match self.qk_norm {
                QkNorm::None => None,
                QkNorm::Heads => Some([d, d]),
                QkNorm::Projection => Some([widths.heads * d, widths.kv_heads * d]),
            };
            if let Some([q, k]) = qk.filter(|_| widths.heads > 0) {
                norm(Some(table.q_norm), q);
                norm(Some(table.k_norm), k);
            }
            norm(table.attention_after, hidden);
            norm(table.mlp_before, hidden);
            norm(table.mlp_after, hidden);
            tensors.extend(self.delta_tensors(layer));
            for module in table.modules {
                let shape = self.module_shape(layer, module);
                if let Some(shape) = shape {
                    tensors.push((names.weight(layer, module), shape.to_vec()));
                }
                if let Some(rows) = self.bias_rows(layer, module)
                    && self.has_bias(module.parts[0])
                {
                    tensors.push((names.bias(layer, module), vec![rows]));
                }
            }
            tensors.extend(self.expert_tensors(layer));
            if self.layer_scalar {
                tensors.push((names.block(layer, LAYER_SCALAR), vec![1]));
            }
        }
        for kind in norm_kinds {
            tensors.push((names.final_norm(kind), vec![hidden]));
        }
        if !self.tied {
            tensors.push((names.head().into(), vec![vocab, hidden]));
        }
        tensors
    }

    /// Name and shape of what a block's delta net has beside linears.
    fn delta_tensors(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let (Some(delta), Some(names)) = (self.delta_nets[layer], &self.names.table().delta) else {
            return vec![];
        };
        let of_heads = vec![delta.value_heads];
        [
            (names.conv, vec![delta.channels(), 1, delta.kernel]),
            (names.log_decay, of_heads.clone()),
            (names.dt_bias, of_heads),
            (names.norm, vec![delta.value_dim]),
        ]
        .map(|(path, shape)| (self.names.block(layer, path), shape))
        .into()
    }

    /// Length of a module's bias, where it may have one: that of an output projection stays when all its inputs are gone.
    pub fn bias_rows(&self, layer: usize, module: &Module) -> Option<usize> {
        let rows = self.module_shape(layer, module).map(|[rows, _]| rows);
        // A block has attention or a delta net, and no output projection of the other.
        let is_of_the_other =
            module.is_attention() && module.is_delta_net() != self.delta_nets[layer].is_some();
        rows.or((module.is_output() && !is_of_the_other).then_some(self.hidden))
    }
}

/// The number that multiplies the output of a block.
pub(crate) const LAYER_SCALAR: &str = "layer_scalar";
