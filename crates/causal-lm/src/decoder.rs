//! A checkpoint seen as a decoder whose parts are loaded one at a time.

mod delta_net;
mod linears;

use crate::block::{Attention, Block, Half, Mlp, Norm, RopeTable, RopeTables, TokenMixer};
use crate::config::{LAYER_SCALAR, ModelConfig, NormConfig, NormKind, QkNorm};
use crate::linear::Linear;
use crate::mixture::{LinearTerm, MappedRows, Moe, RoutingRule, SharedExpert};
use crate::names::{ExpertLayout, LinearName};
use crate::packing::{Execution, Stored};
use crate::rope::Rope;
use crate::vocabulary::{Embedding, Head};
use crate::weights::WeightSummary;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use kv_lazy::CacheConfig;
use kv_lazy::attention::Scores;
use std::collections::BTreeMap;
use std::sync::Arc;
use tensor_io::{Checkpoint, Config};

/// A decoder checkpoint, checked against its config, with nothing in memory yet.
#[derive(Debug)]
pub struct Decoder<'a> {
    checkpoint: &'a Checkpoint,
    config: ModelConfig,
    dtype: DType,
    device: Device,
    multiplying: Multiplying,
    /// Whether there is a head of its own where the config announces none.
    has_head_of_its_own: bool,
    cache: Option<CacheConfig>,
    /// What is added to the output of each layer's experts; nothing where there is none.
    terms: Vec<Option<LinearTerm>>,
}

/// How weights are multiplied that are stored in fewer than 32 bits.
#[derive(Debug)]
enum Multiplying {
    /// Decoded to tensors.
    Tensors,
    /// As they are stored.
    Packed(Execution),
    /// As tensors if they are floats: packed ones were asked for where no kernel runs.
    Floats,
}

impl<'a> Decoder<'a> {
    /// Reads the config and checks the name and shape of every tensor.
    ///
    /// Parts are computed in `dtype`: f32 on a CPU, where bf16 decodes eleven times slower.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::UnexpectedTensor`] or a missing tensor where checkpoint and
    /// config disagree, and everything that [`ModelConfig::new`] reports.
    pub fn new(checkpoint: &'a Checkpoint, dtype: DType, device: &Device) -> Result<Self> {
        let mut config = ModelConfig::new(checkpoint.config())?;
        config.names = config
            .names
            .located(config.layers(), |name| checkpoint.contains(name));
        config.check_counts(checkpoint.names().count())?;
        let flag = config.tied;
        config.tied = flag && is_copy(checkpoint, &config)?;
        let has_own = flag && !config.tied;
        let decoder = Self {
            checkpoint,
            config,
            dtype,
            device: device.clone(),
            multiplying: Multiplying::Tensors,
            has_head_of_its_own: has_own,
            cache: None,
            terms: Vec::new(),
        };
        decoder.check()?;
        Ok(decoder)
    }

    /// The same with weights that are multiplied as they are stored: blocks, groups and floats of 16 bits. Others are decoded to
    /// tensors when they are loaded; [`Decoder::weights`] tells how many and why.
    ///
    /// Blocks and groups are multiplied on CPUs in f32. On another device or in another dtype floats of 16 bits become tensors, and
    /// loading quantised weights is [`Error::QuantisedWeights`]: a decoder without `packed` decodes them.
    pub fn packed(self, execution: Execution) -> Self {
        let multiplying = match self.device.is_cpu() && self.dtype == DType::F32 {
            true => Multiplying::Packed(execution),
            false => Multiplying::Floats,
        };
        Self {
            multiplying,
            ..self
        }
    }

    /// The same with windows read as they are decoded: one token after the other through a cache of `config`, which may
    /// quantise and evict. Sequences with a cache of their own, as those of a [`Model`](crate::Model), keep that one.
    pub fn decoding(self, config: CacheConfig) -> Self {
        Self {
            cache: Some(config),
            ..self
        }
    }

    /// The same with a linear term beside the experts of layers, one for each layer of the model or `None`. Terms are held in
    /// memory: a decoder that has some cannot be written.
    ///
    /// # Errors
    /// [`Error::LinearTerm`] for another number of layers, a layer without experts, or another width.
    pub fn with_terms(self, terms: &[Option<LinearTerm>]) -> Result<Self> {
        let layers = self.config.layers();
        if terms.len() != layers {
            return Err(Error::LinearTerm {
                layer: terms.len().min(layers),
                reason: format!(
                    "{} layers are given, but the model has {layers}",
                    terms.len()
                ),
            });
        }
        let moved = |(layer, term): (usize, &Option<LinearTerm>)| -> Result<Option<LinearTerm>> {
            let Some(term) = term else { return Ok(None) };
            if self.config.mixtures[layer].is_none() {
                return Err(Error::LinearTerm {
                    layer,
                    reason: "the layer has no experts".into(),
                });
            }
            term.check(layer, self.config.hidden)?;
            term.to(self.dtype, &self.device).map(Some)
        };
        let terms = terms.iter().enumerate().map(moved).collect::<Result<_>>()?;
        Ok(Self { terms, ..self })
    }

    /// Refuses to write a decoder with something that checkpoints have no place for.
    ///
    /// # Errors
    /// [`Error::LinearTerm`].
    pub fn check_written(&self) -> Result<()> {
        match self.terms.iter().position(Option::is_some) {
            Some(layer) => Err(Error::LinearTerm {
                layer,
                reason: "it is held in memory alone, because no checkpoint and no stock format has a place for it; write the \
                         model without it"
                    .into(),
            }),
            None => Ok(()),
        }
    }

    /// How weights are multiplied that are stored in fewer than 32 bits; `None` when they are decoded to tensors.
    pub fn execution(&self) -> Option<&Execution> {
        match &self.multiplying {
            Multiplying::Packed(execution) => Some(execution),
            Multiplying::Tensors | Multiplying::Floats => None,
        }
    }

    /// The model's dimensions.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The checkpoint's config for a folder that is made of it. It is the same, but that it no longer announces a tied head
    /// where the checkpoint has another one: not every reader looks whether there is one.
    ///
    /// # Errors
    /// As [`Decoder::check_written`].
    pub fn config_to_write(&self) -> Result<Config> {
        self.check_written()?;
        let mut config = self.checkpoint.config().clone();
        if self.has_head_of_its_own {
            config.set("tie_word_embeddings", false);
        }
        Ok(config)
    }

    /// The checkpoint it was made from.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// Where parts are loaded to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What parts are loaded as.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn check(&self) -> Result<()> {
        let names = self.config.names;
        let mut expected = self.config.tensors();
        // A bias that the config does not announce is read where the file has one, also of an
        // output projection without inputs: that is how bias-compensated models of architectures
        // without a slot are stored.
        for layer in 0..self.config.layers() {
            let modules = names.table().modules.iter();
            for module in modules.filter(|module| !self.config.has_bias(module.parts[0])) {
                let bias = names.bias(layer, module);
                let rows = self.config.bias_rows(layer, module);
                if let Some(rows) = rows.filter(|_| self.checkpoint.contains(&bias)) {
                    expected.push((bias, vec![rows]));
                }
            }
        }
        for (tensor, expected) in &expected {
            let info = self.checkpoint.info(tensor)?;
            if info.shape != *expected {
                return Err(Error::Shape {
                    tensor: tensor.clone(),
                    found: info.shape.clone(),
                    expected: expected.clone(),
                });
            }
        }
        let known: std::collections::HashSet<&str> =
            expected.iter().map(|(name, _)| name.as_str()).collect();
        // Older exports have the frequencies and masks, and tied ones a copy of the embedding.
        let surplus = |name: &str| {
            let buffers = [
                "rotary_emb.inv_freq",
                "attention.bias",
                "attention.masked_bias",
            ];
            buffers.iter().any(|buffer| name.ends_with(buffer)) || name == names.head()
        };
        // Beside the decoder of a folder for several modalities is whatever the others need.
        let foreign = |name: &str| names.is_beside(name, self.config.nested);
        match self
            .checkpoint
            .names()
            .find(|name| !known.contains(name) && !surplus(name) && !foreign(name))
        {
            Some(tensor) => Err(Error::UnexpectedTensor {
                tensor: tensor.into(),
                model_type: self.config.model_type,
            }),
            None => Ok(()),
        }
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        Ok(self.checkpoint.tensor_as(name, self.dtype, &self.device)?)
    }

    /// A norm by the path of its module.
    fn norm(&self, name: impl Fn(&str) -> String) -> Result<Norm> {
        let NormConfig { kind, eps, offset } = self.config.norm;
        let weight = self.load(&name("weight"))?;
        Ok(Norm {
            kind,
            weight: match offset == 0.0 {
                true => weight,
                false => (weight + offset)?,
            },
            bias: match kind {
                NormKind::Layer => Some(self.load(&name("bias"))?),
                NormKind::Rms => None,
            },
            eps,
        })
    }

    /// A norm of block `layer` by the path of its module, if there is one.
    ///
    /// # Errors
    /// What reading the tensors reports.
    pub fn block_norm(&self, layer: usize, path: Option<&str>) -> Result<Option<Norm>> {
        let names = self.config.names;
        path.map(|path| self.norm(|kind| names.block(layer, &format!("{path}.{kind}"))))
            .transpose()
    }

    /// Whether the checkpoint has a bias for a linear.
    pub fn has_bias(&self, layer: usize, name: LinearName) -> bool {
        let names = self.config.names;
        names
            .module_of(name)
            .is_some_and(|module| self.checkpoint.contains(&names.bias(layer, module)))
    }

    /// Loads block `layer`; [`Decoder::release`] lets go of the file's pages afterwards.
    ///
    /// # Errors
    /// What reading the tensors reports, among it values that are not finite.
    pub fn block(&self, layer: usize) -> Result<Block> {
        let mut block = self.frame(layer)?;
        if let Some(moe) = &mut block.experts {
            let experts = 0..moe.experts();
            moe.experts = experts
                .map(|e| self.expert(layer, e))
                .collect::<Result<_>>()?;
        }
        Ok(block)
    }

    /// Loads an expert of block `layer`.
    ///
    /// # Errors
    /// [`Error::Routing`] for one that is not there, and what reading the tensors reports.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<Mlp> {
        let linear = |name| self.expert_linear(layer, expert, name);
        Ok(Mlp {
            gate: Some(linear(LinearName::Gate)?),
            up: linear(LinearName::Up)?,
            down: linear(LinearName::Down)?,
            activation: self.config.activation,
        })
    }

    /// Lets go of the mapped pages of an expert.
    pub fn release_expert(&self, layer: usize, expert: usize) {
        for name in [LinearName::Gate, LinearName::Up, LinearName::Down] {
            if let Some(part) = self.config.expert_part(layer, expert, name) {
                match self.config.names.layout() {
                    ExpertLayout::Alone => self.checkpoint.release([part.tensor.as_str()]),
                    ExpertLayout::Fused => self.checkpoint.release_rows(&part.tensor, part.rows),
                }
            }
        }
    }

    /// Loads block `layer` without its experts, which [`Decoder::expert`] loads one at a time. A block of a dense model is
    /// loaded whole.
    ///
    /// # Errors
    /// What reading the tensors reports, among it values that are not finite.
    pub fn frame(&self, layer: usize) -> Result<Block> {
        let (config, names) = (&self.config, self.config.names);
        let table = names.table();
        let widths = config.widths[layer];
        let mut linears = BTreeMap::new();
        for module in table.modules {
            if config.module_shape(layer, module).is_some() {
                linears.extend(self.module(layer, module)?);
            }
        }
        let attention_config = &config.attention[layer];
        let attention = match (widths.heads, config.delta_nets[layer]) {
            (_, Some(shape)) => Some(TokenMixer::DeltaNet(self.delta_net(
                layer,
                shape,
                &mut linears,
            )?)),
            (0, None) => None,
            _ => {
                let head_norm = |path: &'static str| {
                    let path = (config.qk_norm != QkNorm::None).then_some(path);
                    self.block_norm(layer, path)
                };
                Some(TokenMixer::Attention(Attention {
                    q: taken(&mut linears, LinearName::Q)?,
                    k: taken(&mut linears, LinearName::K)?,
                    v: linears.remove(&LinearName::V),
                    o: taken(&mut linears, LinearName::O)?,
                    q_norm: head_norm(table.q_norm)?,
                    k_norm: head_norm(table.k_norm)?,
                    v_norm: match config.v_norm {
                        true => Some(self.unweighted(attention_config.head_dim)?),
                        false => None,
                    },
                    head_dim: attention_config.head_dim,
                    sliding_window: attention_config.sliding_window,
                    rotation: attention_config.rotation,
                    scores: Scores {
                        scale: attention_config.scale,
                        softcap: attention_config.softcap,
                    },
                    gated: attention_config.gated,
                    clip: attention_config.clip,
                    cache: match &self.cache {
                        None => None,
                        Some(config) => Some(Arc::new(config.of_layer(layer)?)),
                    },
                }))
            }
        };
        let mlp = match widths.neurons {
            0 => None,
            _ => Some(Mlp {
                gate: linears.remove(&LinearName::Gate),
                up: taken(&mut linears, LinearName::Up)?,
                down: taken(&mut linears, LinearName::Down)?,
                activation: config.activation,
            }),
        };
        let experts = match config.mixtures[layer] {
            None => None,
            Some(mixture) => Some(Moe {
                router: self.unbiased(names.router(layer))?,
                rule: RoutingRule {
                    chosen: mixture.chosen,
                    normalise: mixture.normalise,
                },
                experts: vec![],
                mapped: self.mapped_rows(layer)?,
                shared: match mixture.shared {
                    0 => None,
                    _ => Some(SharedExpert {
                        mlp: Mlp {
                            gate: linears.remove(&LinearName::SharedGate),
                            up: taken(&mut linears, LinearName::SharedUp)?,
                            down: taken(&mut linears, LinearName::SharedDown)?,
                            activation: config.activation,
                        },
                        gate: self.unbiased(names.shared_gate(layer))?,
                    }),
                },
                term: self.terms.get(layer).cloned().flatten(),
            }),
        };
        let constant = |name, absent: bool| match names.module_of(name).filter(|_| absent) {
            Some(module) => self.module_bias(layer, module),
            None => Ok(None),
        };
        Ok(Block {
            layer,
            attention: Half {
                before: self.block_norm(layer, table.attention_before)?,
                constant: constant(LinearName::O, attention.is_none())?,
                body: attention,
                after: self.block_norm(layer, table.attention_after)?,
                scale: config.residual_scale,
            },
            mlp: Half {
                before: self.block_norm(layer, table.mlp_before)?,
                constant: constant(LinearName::Down, mlp.is_none() && experts.is_none())?,
                body: mlp,
                after: self.block_norm(layer, table.mlp_after)?,
                scale: config.residual_scale,
            },
            experts,
            parallel: config.parallel,
            scalar: match config.layer_scalar {
                true => Some(self.number(&names.block(layer, LAYER_SCALAR))?),
                false => None,
            },
        })
    }

    /// A linear whose weight has this name, which architectures with experts have.
    fn unbiased(&self, name: Option<String>) -> Result<Linear> {
        let name = name.ok_or(Error::Routing {
            chosen: 1,
            experts: 0,
        })?;
        Ok(Linear::new(self.load(&name)?, None))
    }

    /// What the router rows of a block stand for, where they are not the stored experts.
    fn mapped_rows(&self, layer: usize) -> Result<Option<MappedRows>> {
        let Some(map) = self.config.expert_maps[layer].clone() else {
            return Ok(None);
        };
        let name = self.config.names.novices(layer);
        let name = name.filter(|_| map.constants() > 0);
        let novices = name.map(|name| self.load(&name)).transpose()?;
        Ok(Some(MappedRows { map, novices }))
    }

    /// An RMS norm whose weights are 1.
    fn unweighted(&self, width: usize) -> Result<Norm> {
        Ok(Norm {
            kind: NormKind::Rms,
            weight: Tensor::ones(width, self.dtype, &self.device)?,
            bias: None,
            eps: self.config.norm.eps,
        })
    }

    /// A tensor of one number.
    fn number(&self, name: &str) -> Result<f64> {
        let tensor = self.checkpoint.tensor_as(name, DType::F64, &Device::Cpu)?;
        Ok(tensor.flatten_all()?.to_vec1::<f64>()?[0])
    }

    /// Lets go of the mapped pages of block `layer`.
    pub fn release(&self, layer: usize) {
        let names = self.config.names;
        let of_block = |name: &&str| names.parse_block(name).is_some_and(|(l, _)| l == layer);
        self.checkpoint
            .release(self.checkpoint.names().filter(of_block));
    }

    /// Lets go of the mapped pages of the embedding.
    pub fn release_embedding(&self) {
        self.checkpoint
            .release([self.config.names.embedding().as_str()]);
    }

    /// The embedding. Its rows are read as they are needed, except for a pickle's, which is read once and kept in memory.
    ///
    /// # Errors
    /// What reading the tensor reports.
    pub fn embedding(&self) -> Result<Embedding<'a>> {
        Embedding::new(self.checkpoint, &self.config, (self.dtype, &self.device))
    }

    /// [`Embedding::rows`] of the model's embedding. Whoever embeds again and again keeps the [`Embedding`].
    ///
    /// # Errors
    /// As there, and what reading the embedding reports.
    pub fn embed(&self, windows: &[&[u32]]) -> Result<Tensor> {
        self.embedding()?.rows(windows)
    }

    /// Loads the norm before the head.
    ///
    /// # Errors
    /// What reading the tensors reports.
    pub fn final_norm(&self) -> Result<Norm> {
        self.norm(|kind| self.config.names.final_norm(kind))
    }

    /// Loads the final norm and the vocabulary projection.
    ///
    /// # Errors
    /// What reading the tensors reports.
    pub fn head(&self) -> Result<Head> {
        let names = self.config.names;
        let weight = match self.config.tied {
            true => names.embedding(),
            false => names.head().to_string(),
        };
        let vocab = match self.stored(&weight, None, None)? {
            Stored::Packed(vocab) => vocab,
            Stored::Dense(reason) => Linear::dense(self.load(&weight)?, None, reason),
        };
        let head = Head::new(self.final_norm()?, vocab, &self.config);
        self.checkpoint.release([weight.as_str()]);
        Ok(head)
    }

    /// How the linears of a model of all blocks are multiplied and the bytes that it takes in memory, as
    /// [`Model::weights`](crate::Model::weights), with one block in memory at a time.
    ///
    /// # Errors
    /// What reading the tensors reports.
    pub fn weights(&self) -> Result<WeightSummary> {
        let mut weights = WeightSummary::default();
        for layer in 0..self.config.layers() {
            let frame = self.frame(layer)?;
            weights.add_block(&frame);
            let experts = frame.experts.as_ref().map_or(0, Moe::experts);
            for expert in 0..experts {
                weights.add_expert(&self.expert(layer, expert)?);
                self.release_expert(layer, expert);
            }
            self.release(layer);
        }
        weights.add_head(&self.head()?);
        Ok(weights)
    }

    /// Bytes of [`Decoder::weights`].
    ///
    /// # Errors
    /// As there.
    pub fn weight_bytes(&self) -> Result<usize> {
        Ok(self.weights()?.bytes)
    }

    /// Rotations for positions `start .. start + tokens` of a sequence that ends there.
    ///
    /// # Errors
    /// When the device refuses the tensors.
    pub fn rope(&self, start: usize, tokens: usize) -> Result<RopeTables> {
        self.rope_within(start, tokens, start + tokens)
    }

    /// Rotations for positions `start .. start + tokens` of a sequence of `total` tokens.
    ///
    /// # Errors
    /// When the device refuses the tensors.
    pub fn rope_within(&self, start: usize, tokens: usize, total: usize) -> Result<RopeTables> {
        let table = |rope: &Rope| -> Result<RopeTable> {
            let (cos, sin) = rope.tables((start, tokens, total), self.dtype, &self.device)?;
            Ok(RopeTable {
                cos,
                sin,
                pairs: rope.pairs,
            })
        };
        let ropes = self.config.ropes.iter();
        let query_scale = self.config.query_scale.map(|scale| -> Result<Tensor> {
            let factors = (start..start + tokens).map(|t| scale.at(t) as f32);
            let factors = Tensor::from_iter(factors, &self.device)?.to_dtype(self.dtype)?;
            Ok(factors.reshape((tokens, 1))?)
        });
        Ok(RopeTables {
            tables: ropes.map(table).collect::<Result<_>>()?,
            query_scale: query_scale.transpose()?,
        })
    }
}

/// Whether a tied model's head, where the checkpoint has one, is the embedding. Another one is used instead.
fn is_copy(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<bool> {
    let (head, embedding) = (config.names.head(), config.names.embedding());
    if !checkpoint.contains(head) || !checkpoint.contains(&embedding) {
        return Ok(true);
    }
    let (a, b) = (checkpoint.info(head)?, checkpoint.info(&embedding)?);
    let same_form = a.shape == b.shape && a.dtype == b.dtype;
    Ok(same_form && checkpoint.bytes(head)? == checkpoint.bytes(&embedding)?)
}

/// A linear that the block must have.
fn taken(linears: &mut BTreeMap<LinearName, Linear>, name: LinearName) -> Result<Linear> {
    // Opening has checked every shape, and a half without its linears has no widths.
    linears.remove(&name).ok_or(Error::InvalidConfig {
        field: "intermediate_size",
        reason: format!("the block has no {name}"),
    })
}
