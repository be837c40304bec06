//! How strongly each neuron drives each other one through the recurrent weights.
//!
//! `W_hh[i, j]` multiplies the state of neuron `j` on its way into neuron `i`, so it is the edge `j → i`. Gated cells have one
//! such matrix per gate; their magnitudes are joined into one number per edge. The diagonal is left out: a neuron's own
//! memory says nothing about order.

use crate::{
    cell::{Cell, GateLayout},
    error::{Error, Result, check_finite},
    io,
    order::bits::BitMatrix,
};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::{ops::Range, path::Path};

/// How the gates of one edge become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregate {
    /// Euclidean norm over the gates.
    #[default]
    L2,
    /// Largest magnitude.
    Max,
    /// Sum of magnitudes.
    Sum,
    /// Magnitude in one gate, counted in PyTorch's order (LSTM i, f, g, o; GRU r, z, n).
    Gate(usize),
}

/// A non-negative n x n matrix, source-major: `get(j, i)` is the influence of neuron `j` on neuron `i`. The diagonal is zero.
#[derive(Debug, Clone, PartialEq)]
pub struct Influence {
    n: usize,
    a: Vec<f32>,
}

/// One layer of a stack, for [`Influence::of_stack`]. All matrices in PyTorch layout: `[gates * hidden, sources]`.
#[derive(Debug, Clone, Copy)]
pub struct StackLayer<'a> {
    /// Recurrent weights `[g*H, H]`.
    pub recurrent: &'a [f32],
    /// Weights from the layer below `[g*H, H_below]`; ignored for the first layer.
    pub from_below: Option<&'a [f32]>,
    /// Top-down feedback from the layer above `[g*H, H_above]`, where the network has it.
    pub from_above: Option<&'a [f32]>,
    /// Hidden size H.
    pub hidden: usize,
}

/// Which edges of a stack enter the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StackEdges {
    /// Recurrent, bottom-up and top-down blocks; cycles are treated by the order's mode.
    #[default]
    All,
    /// Bottom-up blocks only: the layers grade the order, which is then acyclic. Recurrent and feedback weights are pruned
    /// by the verdict on their endpoints. The lowest and highest layer then have edges on one side only, so ask for
    /// [`Connected::InOrOut`](crate::order::Connected::InOrOut).
    LayerGraded,
}

/// Edges from some neurons of a stack to others.
struct Block {
    source: Range<usize>,
    target: Range<usize>,
}

impl Influence {
    /// From any matrix in source-major order; magnitudes are taken and the diagonal dropped.
    ///
    /// # Errors
    /// `values` is not n x n, or not finite.
    pub fn from_dense(n: usize, values: &[f32]) -> Result<Self> {
        if values.len() != n * n || n == 0 {
            return Err(Error::Shape {
                tensor: "adjacency".into(),
                expected: format!("[{n}, {n}] with n > 0"),
                found: vec![values.len()],
            });
        }
        check_finite("adjacency", values)?;
        let mut a: Vec<f32> = values.iter().map(|v| v.abs()).collect();
        for j in 0..n {
            a[j * n + j] = 0.0;
        }
        Ok(Self { n, a })
    }

    /// From recurrent weights `[g*H, H]` in PyTorch layout.
    ///
    /// # Errors
    /// The length is not `gates * n * n`, a value is not finite, or the gate asked for does not exist.
    pub fn from_gates(w_hh: &[f32], gates: usize, n: usize, how: Aggregate) -> Result<Self> {
        let mut stack = Self {
            n,
            a: vec![0.0; n * n],
        };
        let whole = Block {
            source: 0..n,
            target: 0..n,
        };
        stack.set_block(w_hh, "weight_hh", &whole, (gates, how))?;
        Ok(stack)
    }

    /// From a recurrent weight tensor as the framework stores it, e.g. `[4H, H]` for a PyTorch LSTM, `[1, 4H, H]` for ONNX,
    /// `[H, 4H]` for Keras.
    ///
    /// # Errors
    /// The shape does not fit the cell and layout, or a value is not finite.
    pub fn from_tensor(
        w_hh: &Tensor,
        cell: Cell,
        layout: GateLayout,
        how: Aggregate,
    ) -> Result<Self> {
        let w = layout.to_canonical("W_hh", w_hh, cell)?;
        if w.cols != w.hidden {
            return Err(Error::Shape {
                tensor: "W_hh".into(),
                expected: format!("{} x H rows on H columns for {cell}", cell.gates()),
                found: w_hh.dims().to_vec(),
            });
        }
        Self::from_gates(&w.data, cell.gates(), w.hidden, how)
    }

    /// From a recurrent weight tensor of a safetensors file, by name; see [`from_tensor`](Self::from_tensor).
    ///
    /// # Errors
    /// The file cannot be read or has no such tensor, and those of [`from_tensor`](Self::from_tensor).
    pub fn load(
        file: &Path,
        tensor: &str,
        cell: Cell,
        layout: GateLayout,
        how: Aggregate,
    ) -> Result<Self> {
        let tensors = io::load(file)?;
        let w_hh = tensors.get(tensor).ok_or_else(|| Error::MissingTensor {
            name: tensor.into(),
        })?;
        Self::from_tensor(w_hh, cell, layout, how)
    }

    /// The block matrix of a stack: neurons are numbered layer after layer, each block is divided by the root mean square of
    /// its nonzero influences, so that no layer counts as connected only because its weights are larger.
    ///
    /// # Errors
    /// A block's length does not fit the sizes of its layers, or a value is not finite.
    pub fn of_stack(
        layers: &[StackLayer<'_>],
        gates: usize,
        how: Aggregate,
        edges: StackEdges,
    ) -> Result<Self> {
        let n: usize = layers.iter().map(|l| l.hidden).sum();
        let mut stack = Self {
            n,
            a: vec![0.0; n * n],
        };
        let mut start = 0;
        for (l, layer) in layers.iter().enumerate() {
            let here = start..start + layer.hidden;
            let all = edges == StackEdges::All;
            let mut blocks = Vec::new();
            if all {
                blocks.push(("recurrent", layer.recurrent, here.clone()));
            }
            if let (Some(w), true) = (layer.from_below, l > 0) {
                blocks.push(("input", w, start - layers[l - 1].hidden..start));
            }
            if let (Some(w), true) = (layer.from_above, all && l + 1 < layers.len()) {
                blocks.push(("feedback", w, here.end..here.end + layers[l + 1].hidden));
            }
            for (role, w, source) in blocks {
                let name = format!("{role} weights of layer {l}");
                let block = Block {
                    source,
                    target: here.clone(),
                };
                stack.set_block(w, &name, &block, (gates, how))?;
                stack.normalise_block(&block);
            }
            start = here.end;
        }
        Ok(stack)
    }

    /// Fills a block of edges with what `how` makes of the gates' weights.
    fn set_block(
        &mut self,
        w: &[f32],
        name: &str,
        Block { source, target }: &Block,
        (gates, how): (usize, Aggregate),
    ) -> Result<()> {
        let (sources, targets) = (source.len(), target.len());
        if w.len() != gates * targets * sources || w.is_empty() {
            return Err(Error::Shape {
                tensor: name.into(),
                expected: format!("[{gates} * {targets}, {sources}], not empty"),
                found: vec![w.len()],
            });
        }
        if let Aggregate::Gate(g) = how
            && g >= gates
        {
            return Err(Error::Setting {
                setting: "aggregate",
                reason: format!("gate {g} of a cell with {gates} gates"),
            });
        }
        check_finite(name, w)?;
        let block = targets * sources;
        let join = |e: usize| -> f32 {
            let magnitudes = (0..gates).map(|g| w[g * block + e].abs());
            match how {
                Aggregate::L2 => magnitudes.map(|m| m * m).sum::<f32>().sqrt(),
                Aggregate::Max => magnitudes.fold(0.0, f32::max),
                Aggregate::Sum => magnitudes.sum(),
                Aggregate::Gate(g) => w[g * block + e].abs(),
            }
        };
        for i in 0..targets {
            for j in 0..sources {
                let (from, to) = (source.start + j, target.start + i);
                if from != to {
                    self.a[from * self.n + to] = join(i * sources + j);
                }
            }
        }
        Ok(())
    }

    /// Divides a block by the root mean square of its nonzero influences.
    fn normalise_block(&mut self, Block { source, target }: &Block) {
        let n = self.n;
        let rows = source
            .clone()
            .map(|j| j * n + target.start..j * n + target.end);
        let (mut squares, mut nonzero) = (0f64, 0usize);
        for v in rows.clone().flat_map(|r| &self.a[r]) {
            squares += f64::from(*v) * f64::from(*v);
            nonzero += usize::from(*v > 0.0);
        }
        if nonzero > 0 {
            let inverse = (1.0 / (squares / nonzero as f64).sqrt()) as f32;
            rows.for_each(|r| self.a[r].iter_mut().for_each(|v| *v *= inverse));
        }
    }

    /// Number of neurons.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there are no neurons.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Influence of neuron `from` on neuron `to`.
    pub fn get(&self, from: usize, to: usize) -> f32 {
        self.a[from * self.n + to]
    }

    /// The influences of neuron `from` on all neurons.
    pub fn row(&self, from: usize) -> &[f32] {
        &self.a[from * self.n..(from + 1) * self.n]
    }

    /// All n x n values, source-major; the diagonal is zero.
    pub(crate) fn values(&self) -> &[f32] {
        &self.a
    }

    /// The digraph of the edges with influence `≥ threshold` (and `> 0`): row `j` holds the targets of `j`.
    pub fn digraph(&self, threshold: f32) -> BitMatrix {
        BitMatrix::from_fn(self.n, self.n, |j, i| {
            let v = self.a[j * self.n + i];
            v >= threshold && v > 0.0
        })
    }

    /// The same influences with neuron `order[k]` in place `k`.
    pub fn permuted(&self, order: &[usize]) -> Self {
        let a = order
            .iter()
            .flat_map(|&j| order.iter().map(move |&i| self.get(j, i)))
            .collect();
        Self { n: self.n, a }
    }

    /// Largest magnitude of an eigenvalue of the influence matrix (Perron root), by power iteration on A + I, which
    /// converges for periodic graphs too.
    pub fn spectral_radius(&self) -> f64 {
        let n = self.n;
        let mut v = vec![1.0 / (n as f64).sqrt(); n];
        let mut radius = 0.0;
        for _ in 0..200 {
            let mut next = v.clone();
            for (j, &share) in v.iter().enumerate() {
                for (x, &a) in next.iter_mut().zip(self.row(j)) {
                    *x += f64::from(a) * share;
                }
            }
            let norm = next.iter().map(|x| x * x).sum::<f64>().sqrt();
            next.iter_mut().for_each(|x| *x /= norm);
            let converged = ((norm - 1.0) - radius).abs() <= 1e-9 * norm;
            radius = norm - 1.0;
            v = next;
            if converged {
                break;
            }
        }
        radius.max(0.0)
    }
}
