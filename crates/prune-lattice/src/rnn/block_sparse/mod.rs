//! Inference on masks made of blocks: one vector at a time, in floats or with weights of 8 bits.
//!
//! A scattered mask gains nothing, because every weight that is kept costs an index and a load of its own. Blocks of 8x4, 8x1
//! and 4x1 weights are multiplied by whole vectors of the processor. `cargo bench -p prune-lattice --bench blocks` measures
//! them beside the dense product.

mod input;
mod kernel;
mod machine;
mod matrix;

pub use input::BlockInput;
pub use matrix::{BlockMatrix, BlockSource};

use super::{
    input::{Input, InputKind},
    model::{ReadOut, Rnn, Role},
    step::StepBuffers,
    tape::{State, check_input},
};
use crate::{
    cell::Cell,
    error::{Error, Result},
    mask::{Block, MaskSet},
};

/// A network laid out for single steps of one sequence. Matrices with a mask are stored as the list of their blocks, the
/// others whole.
#[derive(Debug, Clone)]
pub struct BlockRnn {
    rnn: Rnn,
    layers: Vec<Layer>,
    read_out: BlockMatrix,
    integers: bool,
}

#[derive(Debug, Clone)]
struct Layer {
    input: InputSide,
    recurrent: BlockMatrix,
}

#[derive(Debug, Clone)]
enum InputSide {
    /// For one-hot inputs: a row for each symbol, bias included.
    Table(Vec<f32>),
    Matrix(BlockMatrix),
}

/// Buffers of a step, and its logits.
#[derive(Debug, Clone, Default)]
pub struct BlockWork {
    x: BlockInput,
    gates: Vec<f32>,
    recurrent: Vec<f32>,
    before: Vec<f32>,
    cells: Vec<f32>,
    aux: Vec<f32>,
    logits: Vec<f32>,
}

impl BlockWork {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Read-out of the last step, `[outputs]`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

impl BlockRnn {
    /// Lays out a network under masks of `block`; the weights are taken masked. Without masks it is the dense network.
    ///
    /// # Errors
    /// Masks that do not fit the network, and those of [`BlockMatrix::new`]: [`Error::PartialBlock`] names the first block
    /// that is not kept or removed as a whole.
    pub fn new(rnn: &Rnn, masks: &MaskSet, block: Block) -> Result<Self> {
        let mut masked = rnn.clone();
        masks.apply(masked.params_mut())?;
        let config = masked.config();
        let matrix = |role: Role, rows: usize, weights: &[f32]| {
            let name = masked.name_of(role).unwrap_or_default();
            let source = BlockSource {
                name,
                weights,
                rows,
                cols: weights.len() / (rows * gates_of(role, config.cell)),
                keep: masks.get(name).map(|m| m.keep()),
            };
            BlockMatrix::new(&source, block)
        };
        let mut layers = Vec::new();
        for l in 0..config.hidden.len() {
            let layer = masked.layer(l);
            let one_hot = l == 0 && matches!(config.input, InputKind::OneHot { .. });
            let input = match one_hot {
                true => InputSide::Table(table(layer.w_ih, layer.width, layer.bias)),
                false => InputSide::Matrix(matrix(Role::InputWeight(l), layer.hidden, layer.w_ih)?),
            };
            let recurrent = matrix(Role::RecurrentWeight(l), layer.hidden, layer.w_hh)?;
            layers.push(Layer { input, recurrent });
        }
        let read_out = matrix(
            Role::OutputWeight,
            config.outputs,
            masked.get(Role::OutputWeight),
        )?;
        Ok(Self {
            layers,
            read_out,
            rnn: masked,
            integers: false,
        })
    }

    /// The same with input and recurrent weights of 8 bits (a scale for each row) and states and inputs rounded to 8 bits; the
    /// read-out stays as it is.
    #[must_use]
    pub fn quantised(mut self) -> Self {
        for layer in &mut self.layers {
            layer.recurrent = layer.recurrent.clone().quantised();
            if let InputSide::Matrix(matrix) = &mut layer.input {
                *matrix = matrix.clone().quantised();
            }
        }
        self.integers = true;
        self
    }

    /// The network (masked weights).
    pub fn network(&self) -> &Rnn {
        &self.rnn
    }

    /// Bytes of the matrices that a step reads, one-hot tables aside.
    pub fn bytes(&self) -> usize {
        let of = |layer: &Layer| {
            let input = match &layer.input {
                InputSide::Table(_) => 0,
                InputSide::Matrix(matrix) => matrix.bytes(),
            };
            input + layer.recurrent.bytes()
        };
        self.layers.iter().map(of).sum::<usize>() + self.read_out.bytes()
    }

    /// One step of one sequence: `state` becomes the state after it, `work` holds the logits.
    ///
    /// # Errors
    /// A state of several sequences, or an input that does not fit.
    pub fn step(&self, input: Input<'_>, state: &mut State, work: &mut BlockWork) -> Result<()> {
        if state.batch() != 1 {
            return Err(Error::Setting {
                setting: "block kernels",
                reason: format!("a step takes one sequence, the state has {}", state.batch()),
            });
        }
        check_input(&self.rnn, input, 1)?;
        let config = self.rnn.config();
        let cell = config.cell;
        for (l, side) in self.layers.iter().enumerate() {
            let layer = self.rnn.layer(l);
            let h = layer.hidden;
            work.gates.clear();
            match &side.input {
                InputSide::Table(rows) => {
                    let Input::Symbols(symbols) = input else {
                        unreachable!("checked: a one-hot network reads symbols")
                    };
                    let (gh, s) = (layer.bias.len(), symbols[0] as usize);
                    work.gates.extend_from_slice(&rows[s * gh..(s + 1) * gh]);
                }
                InputSide::Matrix(matrix) => {
                    let mut largest = None;
                    let x = match (l.checked_sub(1), input) {
                        (Some(below), _) => {
                            largest = bound(cell);
                            state.hidden(below)
                        }
                        (None, Input::Vectors(x)) => x,
                        (None, Input::Symbols(s)) => {
                            let (s, width) = (s[0] as usize, layer.width);
                            &self.rnn.get(Role::Embedding)[s * width..(s + 1) * width]
                        }
                    };
                    work.x.set(x);
                    work.gates.extend_from_slice(layer.bias);
                    if self.integers {
                        work.x.quantise(largest);
                    }
                    matrix.add_product(&work.x, &mut work.gates);
                }
            }
            work.x.set(&state.h[l]);
            if self.integers {
                work.x.quantise(bound(cell));
            }
            work.aux.clear();
            if let Some(bias) = layer.candidate_bias {
                work.recurrent.clear();
                work.recurrent.resize(2 * h, 0.0);
                work.recurrent.extend_from_slice(bias);
                side.recurrent.add_product(&work.x, &mut work.recurrent);
                let (gates, candidate) = work.recurrent.split_at(2 * h);
                work.gates.iter_mut().zip(gates).for_each(|(g, r)| *g += r);
                work.aux.extend_from_slice(candidate);
            } else {
                side.recurrent.add_product(&work.x, &mut work.gates);
                work.aux.resize(h, 0.0);
            }
            work.before.clear();
            work.before.extend_from_slice(&state.h[l]);
            work.cells.clear();
            if let Some(c) = state.c.get(l) {
                work.cells.extend_from_slice(c);
                work.cells.resize(2 * h, 0.0);
            }
            StepBuffers {
                gates: &mut work.gates,
                before: &work.before,
                after: &mut state.h[l],
                aux: &mut work.aux,
                cells: &mut work.cells,
            }
            .activate(cell, h);
            if let Some(c) = state.c.get_mut(l) {
                c.copy_from_slice(&work.cells[h..]);
            }
        }
        let top = &state.h[state.h.len() - 1];
        match config.read_out {
            ReadOut::Linear => work.x.set(top),
            ReadOut::Relu => {
                work.before.clear();
                work.before.extend(top.iter().map(|v| v.max(0.0)));
                work.x.set(&work.before);
            }
        }
        work.logits.clear();
        work.logits
            .extend_from_slice(self.rnn.get(Role::OutputBias));
        self.read_out.add_product(&work.x, &mut work.logits);
        Ok(())
    }
}

/// Largest magnitude of a state.
fn bound(cell: Cell) -> Option<f32> {
    (cell != Cell::Relu).then_some(1.0)
}

fn gates_of(role: Role, cell: Cell) -> usize {
    match role {
        Role::OutputWeight => 1,
        _ => cell.gates(),
    }
}

/// Columns of `w_ih` as rows, with the bias added to each.
fn table(w_ih: &[f32], width: usize, bias: &[f32]) -> Vec<f32> {
    let row = |s: usize| {
        let column = w_ih[s..].iter().step_by(width);
        column.zip(bias).map(|(w, b)| w + b)
    };
    (0..width).flat_map(row).collect()
}
