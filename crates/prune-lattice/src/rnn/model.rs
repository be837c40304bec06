//! The network as named parameters, from and to checkpoints.

use super::input::InputKind;
use crate::{
    cell::Cell,
    error::{Error, Result},
    io,
    names::{named, with},
    params::{Param, ParamSet, take},
    seed,
};
use candle_core::Tensor;
use rand::Rng;
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, path::Path};

named! {
    /// What is applied to the states of the top layer before the linear read-out.
    #[derive(Default)]
    pub enum ReadOut as "read-out" {
        /// Nothing.
        #[default]
        Linear = "linear",
        /// `max(0, h)`
        Relu = "relu",
    }
}

/// Shape of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RnnConfig {
    /// Cell of every layer.
    pub cell: Cell,
    /// What it reads.
    pub input: InputKind,
    /// Hidden size of each layer.
    pub hidden: Vec<usize>,
    /// Width of the read-out.
    pub outputs: usize,
    /// What is applied to the top states before the read-out.
    #[serde(default)]
    pub read_out: ReadOut,
}

/// What a parameter is, with its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `[vocab, dim]`
    Embedding,
    /// `[gates * H, width below]`
    InputWeight(usize),
    /// `[gates * H, H]`
    RecurrentWeight(usize),
    /// `[gates * H]`; for a GRU without the recurrent part of the candidate.
    Bias(usize),
    /// `[H]`, GRU only: the bias inside the reset gate's product.
    CandidateBias(usize),
    /// `[outputs, H]`
    OutputWeight,
    /// `[outputs]`
    OutputBias,
}

/// A recurrent network.
#[derive(Debug, Clone, PartialEq)]
pub struct Rnn {
    config: RnnConfig,
    params: ParamSet,
}

/// The parameters of one layer.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "train"), allow(dead_code))]
pub(crate) struct LayerRef<'a> {
    pub(crate) hidden: usize,
    pub(crate) width: usize,
    pub(crate) w_ih: &'a [f32],
    pub(crate) w_hh: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) candidate_bias: Option<&'a [f32]>,
}

impl RnnConfig {
    /// A stack of layers of one cell with a linear read-out of width `outputs`.
    pub fn new(
        cell: Cell,
        input: InputKind,
        hidden: impl Into<Vec<usize>>,
        outputs: usize,
    ) -> Self {
        Self {
            cell,
            input,
            hidden: hidden.into(),
            outputs,
            read_out: ReadOut::Linear,
        }
    }

    fn check(&self) -> Result<()> {
        let empty = self.hidden.is_empty()
            || self.hidden.contains(&0)
            || self.outputs == 0
            || self.input.width() == 0;
        if empty || self.input.vocab() == Some(0) {
            return Err(Error::Setting {
                setting: "network",
                reason: format!("a size is 0 in {self:?}"),
            });
        }
        Ok(())
    }

    /// Roles and shapes of all parameters, in order.
    fn layout(&self) -> Vec<(Role, Vec<usize>)> {
        let mut out = Vec::new();
        if let InputKind::Embedding { vocab, dim } = self.input {
            out.push((Role::Embedding, vec![vocab, dim]));
        }
        let mut width = self.input.width();
        for (l, &h) in self.hidden.iter().enumerate() {
            let rows = self.cell.gates() * h;
            out.push((Role::InputWeight(l), vec![rows, width]));
            out.push((Role::RecurrentWeight(l), vec![rows, h]));
            out.push((Role::Bias(l), vec![rows]));
            if self.cell == Cell::Gru {
                out.push((Role::CandidateBias(l), vec![h]));
            }
            width = h;
        }
        out.push((Role::OutputWeight, vec![self.outputs, width]));
        out.push((Role::OutputBias, vec![self.outputs]));
        out
    }

    /// Index of the first parameter of a layer.
    pub(crate) fn layer_slot(&self, layer: usize) -> usize {
        let embedding = usize::from(matches!(self.input, InputKind::Embedding { .. }));
        embedding + layer * if self.cell == Cell::Gru { 4 } else { 3 }
    }

    /// Index of the read-out's weight; its bias follows.
    #[cfg(feature = "train")]
    pub(crate) fn output_slot(&self) -> usize {
        self.layer_slot(self.hidden.len())
    }
}

/// How a checkpoint names its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointNames {
    /// What stands before `.weight_hh_l0`; found by itself when `None`.
    pub prefix: Option<String>,
    /// The cell; told from the shapes when `None` (not possible for tanh and ReLU, which look alike).
    pub cell: Option<Cell>,
    /// The embedding; where the checkpoint has no such tensor, input is one-hot.
    pub embedding: String,
    /// The read-out, before `.weight` and `.bias`.
    pub output: String,
    /// Whether the network reads vectors instead of symbols.
    pub dense_input: bool,
    /// What is applied to the top states before the read-out; a checkpoint does not say so.
    pub read_out: ReadOut,
}

impl Default for CheckpointNames {
    fn default() -> Self {
        Self {
            prefix: None,
            cell: None,
            embedding: "embed.weight".into(),
            output: "out".into(),
            dense_input: false,
            read_out: ReadOut::Linear,
        }
    }
}

with!(RnnConfig, CheckpointNames);

const HH_L0: &str = "weight_hh_l0";

impl Rnn {
    /// A fresh network: uniform in ±1/√H (embedding ±1), forget biases 1.
    ///
    /// # Errors
    /// A size is 0.
    pub fn new(config: RnnConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let names = CheckpointNames::default();
        let mut rng = seed::rng(seed, "init");
        let params = config
            .layout()
            .into_iter()
            .map(|(role, shape)| {
                let fan = match role {
                    Role::InputWeight(l)
                    | Role::RecurrentWeight(l)
                    | Role::Bias(l)
                    | Role::CandidateBias(l) => config.hidden[l],
                    Role::OutputWeight | Role::OutputBias => config.hidden[config.hidden.len() - 1],
                    Role::Embedding => 1,
                };
                let bound = 1.0 / (fan as f32).sqrt();
                let mut data: Vec<f32> = (0..shape.iter().product())
                    .map(|_| rng.random_range(-bound..bound))
                    .collect();
                if let (Role::Bias(l), Cell::Lstm) = (role, config.cell) {
                    let h = config.hidden[l];
                    data[h..2 * h].fill(1.0);
                }
                Param {
                    name: role.name("rnn", &names),
                    shape,
                    data,
                }
            })
            .collect();
        Ok(Self {
            config,
            params: ParamSet::new(params),
        })
    }

    /// Makes every gate of every `W_hh` a random orthogonal matrix (of a Gaussian one by its QR factorisation), which keeps the
    /// states of tanh and ReLU networks from vanishing or growing at the start.
    #[cfg(feature = "train")]
    pub fn orthogonal_recurrence(&mut self, seed: u64) {
        use linalg::{Qr, faer::Mat};
        let mut rng = seed::rng(seed, "orthogonal");
        for l in 0..self.config.hidden.len() {
            let n = self.config.hidden[l];
            let slot = self.config.layer_slot(l) + 1;
            for gate in self.params.slot_mut(slot).chunks_exact_mut(n * n) {
                let gaussian = Mat::from_fn(n, n, |_, _| f64::from(seed::normal(&mut rng)));
                let q = Qr::new(gaussian).q();
                let value = |e: usize| q[(e / n, e % n)] as f32;
                gate.iter_mut().enumerate().for_each(|(e, w)| *w = value(e));
            }
        }
    }

    pub(crate) fn from_params(config: RnnConfig, params: ParamSet) -> Result<Self> {
        config.check()?;
        let shapes: Vec<_> = config
            .layout()
            .into_iter()
            .map(|(_, shape)| shape)
            .collect();
        debug_assert!(params.iter().map(|p| &p.shape).eq(&shapes));
        Ok(Self { config, params })
    }

    /// From tensors by name: `{prefix}.weight_ih_l{k}`, `{prefix}.weight_hh_l{k}` in PyTorch layout, biases as
    /// `{prefix}.bias_l{k}` (already summed) or `{prefix}.bias_ih_l{k}` and `{prefix}.bias_hh_l{k}` (a GRU needs the latter
    /// two, or `bias_l{k}` with `bias_hn_l{k}`), embedding and read-out as named.
    ///
    /// # Errors
    /// A tensor is missing, has another shape than the first recurrent matrix implies, or holds NaN or Inf.
    pub fn from_tensors(
        tensors: &HashMap<String, Tensor>,
        names: &CheckpointNames,
    ) -> Result<Self> {
        let prefix = match &names.prefix {
            Some(p) => p.clone(),
            None => {
                let mut found: Vec<&str> = tensors
                    .keys()
                    .filter_map(|k| k.strip_suffix(HH_L0))
                    .collect();
                found.sort_unstable();
                match found.as_slice() {
                    [one] => one.trim_end_matches('.').to_owned(),
                    [] => {
                        return Err(Error::MissingTensor {
                            name: format!("*.{HH_L0}"),
                        });
                    }
                    many => {
                        let reason = format!(
                            "several recurrent stacks: {}; give the prefix",
                            many.join(", ")
                        );
                        return Err(Error::Setting {
                            setting: "checkpoint names",
                            reason,
                        });
                    }
                }
            }
        };
        let name = |what: &str, layer: usize| dotted(&prefix, &format!("{what}_l{layer}"));
        let shape = |name: &str| -> Result<(usize, usize)> {
            let t = tensors
                .get(name)
                .ok_or_else(|| Error::MissingTensor { name: name.into() })?;
            match t.dims() {
                &[r, c] => Ok((r, c)),
                dims => Err(Error::Shape {
                    tensor: name.into(),
                    expected: "a matrix".into(),
                    found: dims.to_vec(),
                }),
            }
        };
        let (rows, h) = shape(&name("weight_hh", 0))?;
        let wrong_cell = |expected: String| Error::Shape {
            tensor: name("weight_hh", 0),
            expected,
            found: vec![rows, h],
        };
        let cell = match names.cell {
            Some(cell) if h > 0 && rows == cell.gates() * h => cell,
            Some(cell) => return Err(wrong_cell(format!("[{} * H, H] for {cell}", cell.gates()))),
            None if h > 0 && rows == 4 * h => Cell::Lstm,
            None if h > 0 && rows == 3 * h => Cell::Gru,
            None if rows == h => {
                let reason = "tanh and relu networks look alike; give the cell".to_owned();
                return Err(Error::Setting {
                    setting: "checkpoint names",
                    reason,
                });
            }
            None => return Err(wrong_cell("[4 * H, H], [3 * H, H] or [H, H]".into())),
        };
        let layers = (0..)
            .take_while(|&l| tensors.contains_key(&name("weight_hh", l)))
            .count();
        let hidden = (0..layers)
            .map(|l| Ok(shape(&name("weight_hh", l))?.1))
            .collect::<Result<Vec<_>>>()?;
        let (_, width) = shape(&name("weight_ih", 0))?;
        let input = if names.dense_input {
            InputKind::Dense { dim: width }
        } else if tensors.contains_key(&names.embedding) {
            let (vocab, dim) = shape(&names.embedding)?;
            InputKind::Embedding { vocab, dim }
        } else {
            InputKind::OneHot { vocab: width }
        };
        let (outputs, _) = shape(&dotted(&names.output, "weight"))?;
        let config = RnnConfig {
            cell,
            input,
            hidden,
            outputs,
            read_out: names.read_out,
        };
        config.check()?;
        let params = config
            .layout()
            .into_iter()
            .map(|(role, shape)| {
                let own = role.name(&prefix, names);
                let data = match role {
                    Role::Bias(l) if !tensors.contains_key(&own) => {
                        let mut bias = take(tensors, &name("bias_ih", l), &shape)?;
                        let recurrent = take(tensors, &name("bias_hh", l), &shape)?;
                        // A GRU's candidate keeps its recurrent bias apart.
                        let joined = if cell == Cell::Gru {
                            2 * config.hidden[l]
                        } else {
                            shape[0]
                        };
                        bias.iter_mut()
                            .zip(&recurrent[..joined])
                            .for_each(|(b, r)| *b += r);
                        bias
                    }
                    Role::CandidateBias(l) if !tensors.contains_key(&own) => {
                        let h = config.hidden[l];
                        take(tensors, &name("bias_hh", l), &[3 * h])?.split_off(2 * h)
                    }
                    _ => take(tensors, &own, &shape)?,
                };
                Ok(Param {
                    name: own,
                    shape,
                    data,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            config,
            params: ParamSet::new(params),
        })
    }

    /// From a safetensors file; see [`from_tensors`](Self::from_tensors).
    ///
    /// # Errors
    /// The file cannot be read, and those of [`from_tensors`](Self::from_tensors).
    pub fn load(file: &Path, names: &CheckpointNames) -> Result<Self> {
        Self::from_tensors(&io::load(file)?, names)
    }

    /// Writes a safetensors file that [`load`](Self::load) reads.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, file: &Path) -> Result<()> {
        io::save(&self.params.to_tensors()?, file)
    }

    /// Its shape.
    pub fn config(&self) -> &RnnConfig {
        &self.config
    }

    /// Its parameters, in the order of [`roles`](Self::roles).
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// Its parameters, to change.
    pub fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    /// The role of each parameter.
    pub fn roles(&self) -> Vec<Role> {
        self.config
            .layout()
            .into_iter()
            .map(|(role, _)| role)
            .collect()
    }

    /// Name of the parameter with that role.
    pub(crate) fn name_of(&self, role: Role) -> Option<&str> {
        self.roles()
            .iter()
            .position(|&r| r == role)
            .and_then(|k| self.params.iter().nth(k))
            .map(|p| p.name.as_str())
    }

    #[cfg(feature = "train")]
    fn slot_of(&self, role: Role) -> usize {
        let position = self.roles().iter().position(|&r| r == role);
        position.expect("a role of this network")
    }

    /// Values of the parameter with that role, which must be one of the network's.
    #[cfg(feature = "train")]
    pub(crate) fn get(&self, role: Role) -> &[f32] {
        self.params.slot(self.slot_of(role))
    }

    /// Replaces the values of a parameter by as many others.
    #[cfg(feature = "train")]
    pub(crate) fn set(&mut self, role: Role, values: Vec<f32>) {
        let slot = self.slot_of(role);
        self.params.slot_mut(slot).copy_from_slice(&values);
    }

    /// Adds to the values of a parameter.
    #[cfg(feature = "train")]
    pub(crate) fn add_to(&mut self, role: Role, values: &[f32]) {
        let slot = self.slot_of(role);
        let to = self.params.slot_mut(slot);
        to.iter_mut().zip(values).for_each(|(t, v)| *t += v);
    }

    pub(crate) fn layer(&self, layer: usize) -> LayerRef<'_> {
        let slot = self.config.layer_slot(layer);
        LayerRef {
            hidden: self.config.hidden[layer],
            width: if layer == 0 {
                self.config.input.width()
            } else {
                self.config.hidden[layer - 1]
            },
            w_ih: self.params.slot(slot),
            w_hh: self.params.slot(slot + 1),
            bias: self.params.slot(slot + 2),
            candidate_bias: (self.config.cell == Cell::Gru).then(|| self.params.slot(slot + 3)),
        }
    }
}

fn dotted(prefix: &str, name: &str) -> String {
    if prefix.is_empty() {
        name.to_owned()
    } else {
        format!("{prefix}.{name}")
    }
}

impl Role {
    fn name(self, prefix: &str, names: &CheckpointNames) -> String {
        match self {
            Role::Embedding => names.embedding.clone(),
            Role::InputWeight(l) => dotted(prefix, &format!("weight_ih_l{l}")),
            Role::RecurrentWeight(l) => dotted(prefix, &format!("weight_hh_l{l}")),
            Role::Bias(l) => dotted(prefix, &format!("bias_l{l}")),
            Role::CandidateBias(l) => dotted(prefix, &format!("bias_hn_l{l}")),
            Role::OutputWeight => dotted(&names.output, "weight"),
            Role::OutputBias => dotted(&names.output, "bias"),
        }
    }
}
