//! The same network in candle operations: differentiable, on any device.

use super::input::InputKind;
use super::model::{ReadOut, Rnn, RnnConfig};
use crate::{cell::Cell, error::Result};
use candle_core::{Device, Tensor, Var};

/// A network whose parameters are candle variables.
#[derive(Debug, Clone)]
pub struct GraphRnn {
    config: RnnConfig,
    names: Vec<String>,
    vars: Vec<Var>,
}

fn sigmoid(x: &Tensor) -> candle_core::Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

impl GraphRnn {
    /// Copies the parameters to a device.
    ///
    /// # Errors
    /// Those of candle.
    pub fn new(rnn: &Rnn, device: &Device) -> Result<Self> {
        let (mut names, mut vars) = (Vec::new(), Vec::new());
        for p in rnn.params().iter() {
            names.push(p.name.clone());
            vars.push(Var::from_tensor(&Tensor::from_slice(
                &p.data,
                p.shape.as_slice(),
                device,
            )?)?);
        }
        Ok(Self {
            config: rnn.config().clone(),
            names,
            vars,
        })
    }

    /// The variables with their names, in the order of [`Rnn::roles`].
    pub fn vars(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.names.iter().map(String::as_str).zip(&self.vars)
    }

    /// Logits `[steps, batch, outputs]` from zero states. Input: symbols `[steps, batch]` (u32) or vectors
    /// `[steps, batch, dim]`.
    ///
    /// # Errors
    /// Those of candle: shapes that do not fit, symbols outside the alphabet.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let (steps, batch) = (input.dim(0)?, input.dim(1)?);
        let mut below = match self.config.input {
            InputKind::Dense { .. } => input.clone(),
            InputKind::Embedding { dim, .. } => self.vars[0]
                .index_select(&input.flatten_all()?, 0)?
                .reshape((steps, batch, dim))?,
            InputKind::OneHot { vocab } => {
                let eye = Tensor::eye(vocab, self.vars[0].dtype(), input.device())?;
                eye.index_select(&input.flatten_all()?, 0)?
                    .reshape((steps, batch, vocab))?
            }
        };
        for l in 0..self.config.hidden.len() {
            let slot = self.config.layer_slot(l);
            let (w_ih, w_hh, bias) = (&self.vars[slot], &self.vars[slot + 1], &self.vars[slot + 2]);
            let h = self.config.hidden[l];
            let mut state = Tensor::zeros((batch, h), below.dtype(), below.device())?;
            let mut memory = state.clone();
            let mut states = Vec::with_capacity(steps);
            for t in 0..steps {
                let x = below
                    .get(t)?
                    .contiguous()?
                    .matmul(&w_ih.t()?)?
                    .broadcast_add(bias)?;
                let u = state.matmul(&w_hh.t()?)?;
                state = match self.config.cell {
                    Cell::Tanh => (x + u)?.tanh()?,
                    Cell::Relu => (x + u)?.relu()?,
                    Cell::Lstm => {
                        let gates = (x + u)?;
                        let gate = |g: usize| gates.narrow(1, g * h, h);
                        let (i, f, o) = (
                            sigmoid(&gate(0)?)?,
                            sigmoid(&gate(1)?)?,
                            sigmoid(&gate(3)?)?,
                        );
                        memory = ((f * memory)? + (i * gate(2)?.tanh()?)?)?;
                        (o * memory.tanh()?)?
                    }
                    Cell::Gru => {
                        let rz = sigmoid(&(x.narrow(1, 0, 2 * h)? + u.narrow(1, 0, 2 * h)?)?)?;
                        let (r, z) = (rz.narrow(1, 0, h)?, rz.narrow(1, h, h)?);
                        let recurrent =
                            u.narrow(1, 2 * h, h)?.broadcast_add(&self.vars[slot + 3])?;
                        let n = (x.narrow(1, 2 * h, h)? + (r * recurrent)?)?.tanh()?;
                        (&n + (z * (state - &n)?)?)?
                    }
                };
                states.push(state.clone());
            }
            below = Tensor::stack(&states, 0)?;
        }
        let out = self.config.output_slot();
        let (w, b) = (&self.vars[out], &self.vars[out + 1]);
        let mut flat = below.reshape((steps * batch, ()))?;
        if self.config.read_out == ReadOut::Relu {
            flat = flat.relu()?;
        }
        Ok(flat
            .matmul(&w.t()?)?
            .broadcast_add(b)?
            .reshape((steps, batch, self.config.outputs))?)
    }
}
