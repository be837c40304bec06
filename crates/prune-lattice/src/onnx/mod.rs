//! Recurrent weights in ONNX files: LSTM, GRU and RNN nodes, read and overwritten in place.
//!
//! Weights are found where exporters put them: as initializers, behind operators that only move elements (slices and
//! concatenations of a framework's own layout), and inside the branches of an `If`. A network of unchanged shape (masked or
//! refitted) is written back to the bytes that it was read from, so that any runtime runs the pruned file; everything else in
//! the file stays as it is.

mod fold;
mod nodes;
mod proto;
mod readers;

use crate::{
    cell::Cell,
    error::{Error, Result, check_finite},
    rnn::{CheckpointNames, ReadOut, Rnn},
};
use candle_core::{Device, Tensor};
use fold::{Budget, Element, Scopes, Value};
use nodes::Nodes;
use prost::{Message, bytes::Bytes};
use proto::Model;
use readers::Shared;
use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
};

/// Bytes of a file at most: protobuf's own limit.
const MAX_BYTES: usize = 1 << 31;

/// An ONNX file with its recurrent nodes.
#[derive(Debug, Clone)]
pub struct OnnxFile {
    file: PathBuf,
    bytes: Bytes,
    nodes: Vec<RecurrentNode>,
    unsupported: Vec<Unsupported>,
}

/// A recurrent node that this crate's cells do not compute, or whose weights cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported {
    /// Name of the node.
    pub name: String,
    /// Its operator.
    pub operator: String,
    /// Why it cannot be used.
    pub reason: String,
}

/// A recurrent node, gates in PyTorch's order.
#[derive(Debug, Clone)]
pub struct RecurrentNode {
    /// Name of the node. One without a name is called by its operator and its number among the nodes of its graph (`LSTM 3`); in
    /// a graph inside another, the way there stands between them (`LSTM 2.then_branch.0`).
    pub name: String,
    /// Its cell.
    pub cell: Cell,
    /// Hidden size H.
    pub hidden: usize,
    /// Width of its input.
    pub width: usize,
    /// Where its graph is: for each graph inside the one before, the node and its attribute.
    graph: Vec<(usize, usize)>,
    /// Its number among the nodes of that graph.
    at: usize,
    /// `W`: `[gates * H, width]`.
    weight_ih: Vec<Element>,
    /// `R`: `[gates * H, H]`.
    weight_hh: Vec<Element>,
    /// Both halves of `B`, `[gates * H]` each; empty where the node has none.
    bias_ih: Vec<Element>,
    bias_hh: Vec<Element>,
}

impl OnnxFile {
    /// Reads a file.
    ///
    /// # Errors
    /// The file cannot be read or is no ONNX model, or has no recurrent node that is supported (the error names the first one
    /// and why it is not).
    pub fn open(file: &Path) -> Result<Self> {
        let bytes = std::fs::read(file).map_err(|source| Error::Io {
            file: file.into(),
            source,
        })?;
        Self::from_bytes(bytes, file)
    }

    /// The same from bytes; `file` is named in errors.
    ///
    /// # Errors
    /// Those of [`open`](Self::open), but for reading.
    pub fn from_bytes(bytes: Vec<u8>, file: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::Data {
            file: file.into(),
            reason,
        };
        if bytes.len() > MAX_BYTES {
            return Err(wrong(format!(
                "{} bytes are more than {MAX_BYTES}",
                bytes.len()
            )));
        }
        let bytes = Bytes::from(bytes);
        let model =
            Model::decode(bytes.clone()).map_err(|e| wrong(format!("not an ONNX model: {e}")))?;
        let graph = model
            .graph
            .ok_or_else(|| wrong("an ONNX model without a graph".into()))?;
        let Nodes {
            nodes, unsupported, ..
        } = Nodes::of(&graph, &bytes).map_err(wrong)?;
        match (nodes.as_slice(), unsupported.as_slice()) {
            ([], []) => Err(wrong(
                "it has no LSTM, GRU or RNN node; cells that are unrolled into Gemm, Sigmoid and Mul are not recognised"
                    .into(),
            )),
            ([], [first, ..]) => Err(wrong(first.to_string())),
            _ => Ok(Self {
                file: file.into(),
                bytes,
                nodes,
                unsupported,
            }),
        }
    }

    /// The recurrent nodes that can be used.
    pub fn nodes(&self) -> &[RecurrentNode] {
        &self.nodes
    }

    /// The recurrent nodes that cannot.
    pub fn unsupported(&self) -> &[Unsupported] {
        &self.unsupported
    }

    /// The node of that name, or the only one.
    ///
    /// # Errors
    /// There is no such node, it is not supported, or there are several and no name is given.
    pub fn node(&self, name: Option<&str>) -> Result<&RecurrentNode> {
        let wrong = |reason: String| Error::Data {
            file: self.file.clone(),
            reason,
        };
        let usable = self.nodes.iter().map(|n| n.name.clone());
        let others = self.unsupported.iter();
        let others = others.map(|u| format!("{} (not supported: {})", u.name, u.reason));
        let list = || -> String {
            let names: Vec<String> = usable.clone().chain(others.clone()).collect();
            names.join(", ")
        };
        match (name, self.nodes.as_slice()) {
            (None, [one]) if self.unsupported.is_empty() => Ok(one),
            (None, _) => Err(wrong(format!(
                "it has several recurrent nodes, give one of: {}",
                list()
            ))),
            (Some(name), nodes) => {
                if let Some(node) = nodes.iter().find(|n| n.name == name) {
                    return Ok(node);
                }
                Err(match self.unsupported.iter().find(|u| u.name == name) {
                    Some(node) => wrong(node.to_string()),
                    None => Error::UnknownName {
                        kind: "recurrent node",
                        name: name.into(),
                        expected: list(),
                    },
                })
            }
        }
    }

    /// A constant that a node sees, by name: one of its own graph or of a graph around it. Gives its shape and values.
    ///
    /// # Errors
    /// There is no float constant of that name.
    pub fn constant(&self, node: &RecurrentNode, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let wrong = |reason: String| Error::Data {
            file: self.file.clone(),
            reason,
        };
        let model = Model::decode(self.bytes.clone()).map_err(|e| wrong(e.to_string()))?;
        let graph = model.graph.unwrap_or_default();
        let mut graphs = vec![&graph];
        for &(at, attribute) in &node.graph {
            let outer = graphs[graphs.len() - 1];
            let inner = outer.node.get(at).and_then(|n| n.attribute.get(attribute));
            graphs.extend(inner.and_then(|a| a.g.as_ref()));
        }
        let budget = Budget::of(&self.bytes);
        match Scopes::new(graphs, &self.bytes, &budget).value(name) {
            Ok(Value::Floats(dims, values)) => Ok((dims, values.iter().map(|v| v.0).collect())),
            Ok(Value::Ints(..)) => Err(wrong(format!("`{name}` holds integers"))),
            Err(reason) => Err(wrong(format!("node `{}`: {reason}", node.name))),
        }
    }

    /// A node as a network of one layer that reads vectors. `read_out` names the read-out's constants: `{read_out}.weight`
    /// `[outputs, H]`, perhaps with further axes of 1, and `{read_out}.bias` `[outputs]`. Without one the states are read out
    /// as they are.
    ///
    /// # Errors
    /// A constant is missing or does not fit, or a weight is NaN or infinite.
    pub fn network(
        &self,
        node: &RecurrentNode,
        read_out: Option<&str>,
        activation: ReadOut,
    ) -> Result<Rnn> {
        let wrong = |e: Error| Error::Data {
            file: self.file.clone(),
            reason: format!("node `{}`: {e}", node.name),
        };
        let mut tensors = node.tensors("rnn").map_err(wrong)?;
        let h = node.hidden;
        let (outputs, weight, bias) = match read_out {
            None => {
                let one = |e: usize| f32::from(u8::from(e / h == e % h));
                (h, (0..h * h).map(one).collect(), vec![0.0; h])
            }
            Some(name) => {
                let (dims, weight) = self.constant(node, &format!("{name}.weight"))?;
                let (_, bias) = self.constant(node, &format!("{name}.bias"))?;
                if weight.is_empty() || weight.len() != bias.len() * h {
                    return Err(Error::Shape {
                        tensor: format!("{name}.weight"),
                        expected: format!("[{}, {h}]", bias.len()),
                        found: dims,
                    });
                }
                (bias.len(), weight, bias)
            }
        };
        let tensor = |v: Vec<f32>, shape: &[usize]| Tensor::from_vec(v, shape, &Device::Cpu);
        tensors.insert("out.weight".into(), tensor(weight, &[outputs, h])?);
        tensors.insert("out.bias".into(), tensor(bias, &[outputs])?);
        let names = CheckpointNames::default().with(|n| {
            n.cell = Some(node.cell);
            n.dense_input = true;
            n.read_out = activation;
        });
        Rnn::from_tensors(&tensors, &names).map_err(wrong)
    }

    /// The file with the weights of a node replaced by those of a layer of `rnn`, which must have its shape.
    ///
    /// A node in another branch of the same `If` whose weights stand in the same places is the same layer, and changes with it.
    ///
    /// # Errors
    /// The shapes differ, or a changed weight has no place of its own in the file: [`Error::SharedTensor`] where anything else
    /// in the file reads it too.
    pub fn with_layer(&self, node: &RecurrentNode, rnn: &Rnn, layer: usize) -> Result<Vec<u8>> {
        let shape = rnn.config();
        if layer >= shape.hidden.len()
            || (shape.cell, shape.hidden[layer], rnn.layer(layer).width)
                != (node.cell, node.hidden, node.width)
        {
            return Err(Error::Shape {
                tensor: node.name.clone(),
                expected: format!(
                    "{} of {} inputs and {} neurons",
                    node.cell, node.width, node.hidden
                ),
                found: shape.hidden.clone(),
            });
        }
        let weights = rnn.layer(layer);
        let biases = weights
            .bias
            .iter()
            .chain(weights.candidate_bias.into_iter().flatten());
        if !node.has_bias() && biases.into_iter().any(|b| *b != 0.0) {
            return Err(Error::Data {
                file: self.file.clone(),
                reason: format!(
                    "node `{}` has no B, so that its biases must stay zero: refit without a constant",
                    node.name
                ),
            });
        }
        let mut bytes = self.bytes.to_vec();
        let mut written: HashMap<usize, f32> = HashMap::new();
        let mut changed = BTreeSet::new();
        let mut put = |(old, place): Element, new: f32, what: &str| -> Result<()> {
            let wrong = |reason: &str| Error::Data {
                file: self.file.clone(),
                reason: format!("{what} of node `{}` {reason}", node.name),
            };
            let Some(place) = place else {
                return match old == new {
                    true => Ok(()),
                    false => Err(wrong(
                        "is not stored as raw bytes and cannot be overwritten",
                    )),
                };
            };
            match written.insert(place, new) {
                Some(other) if other.to_bits() != new.to_bits() => {
                    return Err(wrong("is stored once for two different values"));
                }
                _ => {}
            }
            let stored = &mut bytes[place..place + 4];
            if *stored != new.to_le_bytes() {
                stored.copy_from_slice(&new.to_le_bytes());
                changed.insert(place);
            }
            Ok(())
        };
        for (&e, &w) in node.weight_ih.iter().zip(weights.w_ih) {
            put(e, w, "W")?;
        }
        for (&e, &w) in node.weight_hh.iter().zip(weights.w_hh) {
            put(e, w, "R")?;
        }
        let h = node.hidden;
        for (k, &bias) in weights.bias.iter().enumerate() {
            // The recurrent half of a candidate has its own value; elsewhere only the sum of the halves matters.
            let own = (node.cell == Cell::Gru && k >= 2 * h)
                .then(|| weights.candidate_bias.map_or(0.0, |b| b[k - 2 * h]));
            let half = |v: &[Element]| v.get(k).copied().unwrap_or((0.0, None));
            let (ih, hh) = (half(&node.bias_ih), half(&node.bias_hh));
            let (new_ih, new_hh) = match own {
                Some(own) => (bias, own),
                None if ih.0 + hh.0 == bias => (ih.0, hh.0),
                None => (bias - hh.0, hh.0),
            };
            put(ih, new_ih, "B")?;
            put(hh, new_hh, "B")?;
        }
        match self.other_reader(node, &changed) {
            None => Ok(bytes),
            Some(Shared { tensor, reader }) => Err(Error::SharedTensor {
                file: self.file.clone(),
                tensor,
                reader,
            }),
        }
    }

    /// Writes [`with_layer`](Self::with_layer) to a file, which appears under its name when it is complete.
    ///
    /// # Errors
    /// Those of [`with_layer`](Self::with_layer), and of writing.
    pub fn write(&self, node: &RecurrentNode, rnn: &Rnn, layer: usize, to: &Path) -> Result<()> {
        let bytes = self.with_layer(node, rnn, layer)?;
        Ok(tensor_io::atomic::write(to, &bytes)?)
    }
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            name,
            operator,
            reason,
        } = self;
        write!(f, "{operator} node `{name}`: {reason}")
    }
}

impl RecurrentNode {
    /// Whether the file has biases of its own for it: without, a refitted constant cannot be written back
    /// ([`RefitConfig::constant`](crate::repair::RefitConfig)).
    pub fn has_bias(&self) -> bool {
        !self.bias_ih.is_empty()
    }

    /// Its weights by PyTorch's names under `prefix`: `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0`, `bias_hh_l0`. With a
    /// read-out beside them, [`Rnn::from_tensors`] makes a network of them.
    ///
    /// # Errors
    /// A weight is NaN or infinite.
    pub fn tensors(&self, prefix: &str) -> Result<HashMap<String, Tensor>> {
        let rows = self.cell.gates() * self.hidden;
        let zero = vec![(0.0, None); rows];
        let or_zero = |v: &[Element]| {
            if v.is_empty() {
                zero.clone()
            } else {
                v.to_vec()
            }
        };
        [
            (
                "weight_ih_l0",
                self.weight_ih.clone(),
                vec![rows, self.width],
            ),
            (
                "weight_hh_l0",
                self.weight_hh.clone(),
                vec![rows, self.hidden],
            ),
            ("bias_ih_l0", or_zero(&self.bias_ih), vec![rows]),
            ("bias_hh_l0", or_zero(&self.bias_hh), vec![rows]),
        ]
        .into_iter()
        .map(|(name, elements, shape)| {
            let values: Vec<f32> = elements.iter().map(|e| e.0).collect();
            check_finite(name, &values)?;
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            Ok((format!("{prefix}.{name}"), tensor))
        })
        .collect()
    }
}
