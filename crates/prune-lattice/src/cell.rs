//! Recurrent cells and the ways frameworks lay out their gates.
//!
//! Inside the crate every weight matrix is `[gates * hidden, sources]` with the gates in PyTorch's order: LSTM i, f, g, o; GRU
//! r, z, n. GRUs are those that apply the reset gate after the recurrent product (PyTorch; ONNX `linear_before_reset=1`;
//! Keras `reset_after=True`).

use crate::{
    error::{Error, Result, check_finite},
    names::named,
};
use candle_core::{DType, Device, Tensor};

named! {
    /// A recurrent cell.
    pub enum Cell as "cell" {
        /// `h' = tanh(W x + U h + b)`
        Tanh = "tanh",
        /// `h' = max(0, W x + U h + b)`
        Relu = "relu",
        /// Gated recurrent unit, reset applied after the recurrent product.
        Gru = "gru",
        /// Long short-term memory without peepholes.
        Lstm = "lstm",
    }
}

impl Cell {
    /// Names of its gates in PyTorch's order.
    pub fn gate_names(self) -> &'static [&'static str] {
        match self {
            Cell::Tanh | Cell::Relu => &["h"],
            Cell::Gru => &["r", "z", "n"],
            Cell::Lstm => &["i", "f", "g", "o"],
        }
    }

    /// Number of gate blocks in the weight matrices: 1, 1, 3, 4.
    pub fn gates(self) -> usize {
        match self {
            Cell::Tanh | Cell::Relu => 1,
            Cell::Gru => 3,
            Cell::Lstm => 4,
        }
    }
}

named! {
    /// Order of the gates and of the axes, by the framework that wrote the weights.
    #[derive(Default)]
    pub enum GateLayout as "gate layout" {
        /// `[gates * H, sources]`; LSTM i, f, g, o; GRU r, z, n.
        #[default]
        PyTorch = "pytorch",
        /// `[gates * H, sources]`, optionally with the leading direction axis of size 1; LSTM i, o, f, c; GRU z, r, h.
        Onnx = "onnx",
        /// `[sources, gates * H]`; LSTM i, f, c, o; GRU z, r, h.
        Keras = "keras",
    }
}

/// A weight matrix in the crate's own layout.
#[derive(Debug, Clone, PartialEq)]
pub struct Canonical {
    /// `[gates * hidden, cols]`, row-major, gates in PyTorch's order.
    pub data: Vec<f32>,
    /// Hidden size.
    pub hidden: usize,
    /// Number of sources.
    pub cols: usize,
}

impl GateLayout {
    /// For each gate in PyTorch's order, the position of its block in this layout.
    pub fn positions(self, cell: Cell) -> &'static [usize] {
        match (cell, self) {
            (Cell::Tanh | Cell::Relu, _) => &[0],
            (Cell::Gru, Self::PyTorch) => &[0, 1, 2],
            (Cell::Gru, Self::Onnx | Self::Keras) => &[1, 0, 2],
            (Cell::Lstm, Self::PyTorch | Self::Keras) => &[0, 1, 2, 3],
            (Cell::Lstm, Self::Onnx) => &[0, 2, 3, 1],
        }
    }

    /// Reads a weight matrix of this layout.
    ///
    /// # Errors
    /// The rank or the number of rows does not fit the cell, or a value is not finite.
    pub fn to_canonical(self, name: &str, tensor: &Tensor, cell: Cell) -> Result<Canonical> {
        let wrong = || Error::Shape {
            tensor: name.into(),
            expected: match self {
                Self::PyTorch => format!("[{} * H, sources]", cell.gates()),
                Self::Onnx => format!("[{0} * H, sources] or [1, {0} * H, sources]", cell.gates()),
                Self::Keras => format!("[sources, {} * H]", cell.gates()),
            },
            found: tensor.dims().to_vec(),
        };
        let flat = match (self, tensor.dims()) {
            (Self::Onnx, [1, _, _]) => tensor.squeeze(0)?,
            (_, [_, _]) => tensor.clone(),
            _ => return Err(wrong()),
        };
        let flat = if self == Self::Keras { flat.t()? } else { flat };
        let (rows, cols) = flat.dims2()?;
        if rows == 0 || cols == 0 || rows % cell.gates() != 0 {
            return Err(wrong());
        }
        let hidden = rows / cell.gates();
        let source = values(&flat)?;
        check_finite(name, &source)?;
        let block = hidden * cols;
        let data = self
            .positions(cell)
            .iter()
            .flat_map(|&p| &source[p * block..(p + 1) * block])
            .copied()
            .collect();
        Ok(Canonical { data, hidden, cols })
    }

    /// Writes a matrix of the crate's layout back into this one (ONNX without the direction axis).
    ///
    /// # Errors
    /// The data does not fit the sizes.
    pub fn from_canonical(self, w: &Canonical, cell: Cell) -> Result<Tensor> {
        let block = w.hidden * w.cols;
        let mut data = vec![0.0; w.data.len()];
        for (gate, &p) in self.positions(cell).iter().enumerate() {
            data[p * block..(p + 1) * block]
                .copy_from_slice(&w.data[gate * block..(gate + 1) * block]);
        }
        let t = Tensor::from_vec(data, (cell.gates() * w.hidden, w.cols), &Device::Cpu)?;
        Ok(if self == Self::Keras {
            t.t()?.contiguous()?
        } else {
            t
        })
    }
}

/// The values of a tensor in row-major order as f32.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labelled(cell: Cell, labels: &[f32]) -> Tensor {
        let rows: Vec<f32> = labels.iter().flat_map(|&g| vec![g; 2 * 2]).collect();
        Tensor::from_vec(rows, (cell.gates() * 2, 2), &Device::Cpu).unwrap()
    }

    #[test]
    fn gate_orders_of_onnx_and_keras_come_out_in_pytorch_order() {
        // Labels: LSTM i=0 f=1 g=2 o=3, GRU r=0 z=1 n=2, in the order in which the framework stores them.
        let cases: [(Cell, GateLayout, &[f32]); 5] = [
            (Cell::Lstm, GateLayout::PyTorch, &[0., 1., 2., 3.]),
            (Cell::Lstm, GateLayout::Onnx, &[0., 3., 1., 2.]),
            (Cell::Gru, GateLayout::Onnx, &[1., 0., 2.]),
            (Cell::Gru, GateLayout::PyTorch, &[0., 1., 2.]),
            (Cell::Lstm, GateLayout::Keras, &[0., 1., 2., 3.]),
        ];
        for (cell, layout, stored) in cases {
            let mut t = labelled(cell, stored);
            if layout == GateLayout::Keras {
                t = t.t().unwrap();
            }
            let c = layout.to_canonical("w", &t, cell).unwrap();
            let gates: Vec<f32> = c.data.chunks(4).map(|b| b[0]).collect();
            assert_eq!(
                gates,
                (0..cell.gates()).map(|g| g as f32).collect::<Vec<_>>(),
                "{cell} {layout:?}"
            );
        }
        let keras_gru = labelled(Cell::Gru, &[1., 0., 2.]).t().unwrap();
        let c = GateLayout::Keras
            .to_canonical("w", &keras_gru, Cell::Gru)
            .unwrap();
        assert_eq!(
            c.data.chunks(4).map(|b| b[0]).collect::<Vec<_>>(),
            [0., 1., 2.]
        );
    }

    #[test]
    fn writing_back_is_the_inverse_of_reading() {
        for &cell in Cell::ALL {
            for layout in [GateLayout::PyTorch, GateLayout::Onnx, GateLayout::Keras] {
                let n = cell.gates() * 3 * 5;
                let dims = if layout == GateLayout::Keras {
                    (5, cell.gates() * 3)
                } else {
                    (cell.gates() * 3, 5)
                };
                let t = Tensor::arange(0f32, n as f32, &Device::Cpu)
                    .unwrap()
                    .reshape(dims)
                    .unwrap();
                let back = layout
                    .from_canonical(&layout.to_canonical("w", &t, cell).unwrap(), cell)
                    .unwrap();
                assert_eq!(values(&back).unwrap(), values(&t).unwrap());
                assert_eq!(back.dims(), t.dims());
            }
        }
    }
}
