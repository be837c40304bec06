//! Matrices stored as the list of their blocks, or dense in panels of rows.
//!
//! A panel is as many rows as a block has (32 when dense). Its weights lie in the order in which they are multiplied, eight
//! floats or sixteen codes at a time, so that a product reads them once from the first to the last. Panels of a masked
//! matrix do not cross the border between two gates.

use super::{
    input::{BlockInput, MAX_COLS, QUADS},
    kernel::{Floats, Integers},
    machine::dispatch,
};
use crate::{
    error::{Error, Result, check_finite},
    mask::Block,
    order::bits::BitMatrix,
};

/// Rows of a panel of a dense matrix.
pub(super) const DENSE_ROWS: usize = 32;

/// How the weights of a panel follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// 32 rows, all columns.
    Dense,
    /// Blocks of 8 rows and 4 columns.
    B8x4,
    /// Blocks of 8 rows and 1 column.
    B8x1,
    /// Blocks of 4 rows and 1 column.
    B4x1,
}

impl Kind {
    fn of(block: Block) -> Result<Self> {
        match (block.rows, block.cols) {
            (8, 4) => Ok(Self::B8x4),
            (8, 1) => Ok(Self::B8x1),
            (4, 1) => Ok(Self::B4x1),
            (rows, cols) => Err(Error::Setting {
                setting: "block",
                reason: format!("there are kernels for 8x4, 8x1 and 4x1, not for {rows}x{cols}"),
            }),
        }
    }

    /// Entries of a panel's list are a multiple of this, so that kernels have no remainder.
    fn multiple(self) -> usize {
        match self {
            Self::B8x4 => 2,
            Self::Dense | Self::B8x1 => 4,
            Self::B4x1 => 8,
        }
    }

    /// The entry of a list that stands for components that are always zero.
    fn padding(self) -> u16 {
        match self {
            Self::B8x4 => (QUADS - 1) as u16,
            _ => u16::MAX,
        }
    }

    /// Units of eight floats for two entries of a list.
    fn units_of_two(self) -> usize {
        match self {
            Self::Dense | Self::B8x4 => 8,
            Self::B8x1 => 2,
            Self::B4x1 => 1,
        }
    }
}

/// Rows of the output that a panel adds to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panel {
    pub(super) row: usize,
    pub(super) rows: usize,
    /// Where its list of columns begins and ends; for a dense matrix the same as numbers of columns.
    pub(super) from: usize,
    pub(super) to: usize,
}

/// The weights in the order of the kernels.
#[derive(Debug, Clone)]
enum Weights {
    Floats(Vec<[f32; 8]>),
    Integers {
        codes: Vec<[i8; 16]>,
        /// What a code of 1 stands for, in each row.
        scales: Vec<f32>,
    },
}

/// What a matrix is made from.
#[derive(Debug, Clone, Copy)]
pub struct BlockSource<'a> {
    /// Named in errors.
    pub name: &'a str,
    /// `[gates * rows, cols]`, row-major.
    pub weights: &'a [f32],
    /// Rows of a gate.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The entries to keep; `None` keeps all, without a list of blocks.
    pub keep: Option<&'a BitMatrix>,
}

/// A matrix for products with one vector.
#[derive(Debug, Clone)]
pub struct BlockMatrix {
    kind: Kind,
    rows: usize,
    gate: usize,
    cols: usize,
    panels: Vec<Panel>,
    /// For blocks of 4 columns the number of the first column divided by 4, otherwise the column.
    columns: Vec<u16>,
    weights: Weights,
    /// Entries `(g * rows + i, i)` that are kept outside the blocks.
    diagonal: Vec<f32>,
}

impl BlockMatrix {
    /// Whether there are kernels for blocks of that size.
    pub fn supports(block: Block) -> bool {
        Kind::of(block).is_ok()
    }

    /// Lays out a matrix. Kept entries must form whole blocks of each gate, cut off at the border where the matrix is no
    /// multiple of them; beside them, entries on the diagonal of each gate of a square matrix may be kept alone.
    ///
    /// # Errors
    /// Sizes that do not fit, weights that are not finite, a block without a kernel, more than 65,520 columns, or
    /// [`Error::PartialBlock`].
    pub fn new(source: &BlockSource<'_>, block: Block) -> Result<Self> {
        let &BlockSource {
            name,
            weights,
            rows,
            cols,
            keep,
        } = source;
        let wrong = |expected: String| Error::Shape {
            tensor: name.into(),
            expected,
            found: vec![weights.len()],
        };
        if rows == 0
            || cols == 0
            || !weights.len().is_multiple_of(rows * cols)
            || weights.is_empty()
        {
            return Err(wrong(format!("[gates * {rows}, {cols}]")));
        }
        if cols > MAX_COLS {
            return Err(wrong(format!("at most {MAX_COLS} columns")));
        }
        let all = weights.len() / cols;
        if let Some(keep) = keep
            && (keep.rows(), keep.cols()) != (all, cols)
        {
            return Err(wrong(format!(
                "[{}, {}] (its mask)",
                keep.rows(),
                keep.cols()
            )));
        }
        check_finite(name, weights)?;
        let mut matrix = Self {
            kind: Kind::Dense,
            rows: all,
            gate: rows,
            cols,
            panels: Vec::new(),
            columns: Vec::new(),
            weights: Weights::Floats(Vec::new()),
            diagonal: Vec::new(),
        };
        if let Some(keep) = keep {
            matrix.kind = Kind::of(block)?;
            matrix.list_blocks(source, keep, block)?;
        } else {
            matrix.panels = (0..all)
                .step_by(DENSE_ROWS)
                .map(|row| Panel {
                    row,
                    rows: DENSE_ROWS.min(all - row),
                    from: 0,
                    to: cols.next_multiple_of(Kind::Dense.multiple()),
                })
                .collect();
        }
        let value = |row: usize, col: usize| weights[row * cols + col];
        matrix.weights = Weights::Floats(matrix.units(value));
        Ok(matrix)
    }

    /// Fills the panels and their lists of columns, and the diagonal.
    fn list_blocks(
        &mut self,
        source: &BlockSource<'_>,
        keep: &BitMatrix,
        block: Block,
    ) -> Result<()> {
        let (rows, cols) = (source.rows, source.cols);
        let (down, across) = block.grid(rows, cols);
        for gate in 0..self.rows / rows {
            for p in 0..down {
                let from = self.columns.len();
                let row = gate * rows + p * block.rows;
                let count = block.rows.min(rows - p * block.rows);
                for b in 0..across {
                    let columns = b * block.cols..cols.min((b + 1) * block.cols);
                    let entries = || {
                        let columns = columns.clone();
                        (row..row + count).flat_map(move |i| columns.clone().map(move |j| (i, j)))
                    };
                    let kept = entries().filter(|&(i, j)| keep.get(i, j)).count();
                    let of = count * columns.len();
                    if kept == of {
                        self.columns.push(b as u16);
                        continue;
                    }
                    let alone = |&(i, j): &(usize, usize)| i - gate * rows == j && rows == cols;
                    let diagonal = entries().filter(|e| keep.get(e.0, e.1) && alone(e));
                    let diagonal: Vec<(usize, usize)> = diagonal.collect();
                    if diagonal.len() != kept {
                        return Err(Error::PartialBlock {
                            tensor: source.name.into(),
                            block: (block.rows, block.cols),
                            at: (row, columns.start),
                            kept,
                            of,
                        });
                    }
                    for (i, j) in diagonal {
                        if self.diagonal.is_empty() {
                            self.diagonal = vec![0.0; self.rows];
                        }
                        self.diagonal[i] = source.weights[i * cols + j];
                    }
                }
                let listed = self.columns.len() - from;
                let padded = listed.next_multiple_of(self.kind.multiple());
                self.columns.resize(from + padded, self.kind.padding());
                self.panels.push(Panel {
                    row,
                    rows: count,
                    from,
                    to: self.columns.len(),
                });
            }
        }
        Ok(())
    }

    /// The weights of all panels, eight rows at a time (two times four for blocks of four rows).
    fn units(&self, value: impl Fn(usize, usize) -> f32) -> Vec<[f32; 8]> {
        let mut units = Vec::new();
        for panel in &self.panels {
            let at = |row: usize, col: usize| match row < panel.rows && col < self.cols {
                true => value(panel.row + row, col),
                false => 0.0,
            };
            let eight = |first: usize, col: usize| std::array::from_fn(|l| at(first + l, col));
            match self.kind {
                Kind::Dense => {
                    let columns = panel.from..panel.to;
                    let rows = (0..DENSE_ROWS).step_by(8);
                    units.extend(columns.flat_map(|j| rows.clone().map(move |r| eight(r, j))));
                }
                Kind::B8x4 => {
                    let blocks = &self.columns[panel.from..panel.to];
                    let columns = blocks
                        .iter()
                        .flat_map(|&b| (0..4).map(move |c| 4 * usize::from(b) + c));
                    units.extend(columns.map(|j| eight(0, j)));
                }
                Kind::B8x1 => {
                    let columns = &self.columns[panel.from..panel.to];
                    units.extend(columns.iter().map(|&j| eight(0, usize::from(j))));
                }
                Kind::B4x1 => {
                    let (two, _) = self.columns[panel.from..panel.to].as_chunks::<2>();
                    units.extend(two.iter().map(|columns| {
                        std::array::from_fn(|l| at(l % 4, usize::from(columns[l / 4])))
                    }));
                }
            }
        }
        units
    }

    /// The same with weights of 8 bits, one scale for each row; products then take the codes of the input.
    #[must_use]
    pub fn quantised(mut self) -> Self {
        let Weights::Floats(floats) = &self.weights else {
            return self;
        };
        let mut largest = vec![0f32; self.rows];
        let mut unit = 0;
        let lanes = |panel: &Panel, k: usize, l: usize| match self.kind {
            Kind::Dense => panel.row + k % 4 * 8 + l,
            Kind::B4x1 => panel.row + l % 4,
            Kind::B8x4 | Kind::B8x1 => panel.row + l,
        };
        let count = |panel: &Panel| (panel.to - panel.from) * self.kind.units_of_two() / 2;
        for panel in &self.panels {
            for (k, eight) in floats[unit..unit + count(panel)].iter().enumerate() {
                for (l, v) in eight.iter().enumerate() {
                    if let Some(m) = largest.get_mut(lanes(panel, k, l)) {
                        *m = m.max(v.abs());
                    }
                }
            }
            unit += count(panel);
        }
        let code = |row: usize, v: f32| match largest.get(row) {
            Some(&m) if m > 0.0 => (v / m * 127.0).round() as i8,
            _ => 0,
        };
        let mut codes = Vec::with_capacity(floats.len() / 2);
        unit = 0;
        for panel in &self.panels {
            let floats = &floats[unit..unit + count(panel)];
            let value = |k: usize, l: usize| code(lanes(panel, k, l), floats[k][l]);
            let mut push = |of: &dyn Fn(usize) -> i8| codes.push(std::array::from_fn(of));
            match self.kind {
                // Two columns side by side.
                Kind::Dense => {
                    for k in (0..floats.len()).step_by(8) {
                        for r in 0..4 {
                            push(&|b| value(k + 4 * (b % 2) + r, b / 2));
                        }
                    }
                }
                Kind::B8x4 | Kind::B8x1 => {
                    for k in (0..floats.len()).step_by(2) {
                        push(&|b| value(k + b % 2, b / 2));
                    }
                }
                // Four columns: two in the lower lanes, two in the upper.
                Kind::B4x1 => {
                    for k in (0..floats.len()).step_by(2) {
                        push(&|b| {
                            let (lane, second) = (b / 2, b % 2);
                            value(k + lane / 4, lane % 4 + 4 * second)
                        });
                    }
                }
            }
            unit += count(panel);
        }
        let scales = largest.iter().map(|m| m / 127.0).collect();
        self.weights = Weights::Integers { codes, scales };
        self
    }

    /// Adds the product with `x` to `y`. Weights of 8 bits read the codes of `x`.
    ///
    /// # Panics
    /// `x` has another number of components than the matrix has columns, or `y` another length than it has rows.
    pub fn add_product(&self, x: &BlockInput, y: &mut [f32]) {
        assert_eq!(x.len, self.cols, "columns");
        assert_eq!(y.len(), self.rows, "rows");
        for (gate, d) in y
            .chunks_exact_mut(self.gate)
            .zip(self.diagonal.chunks_exact(self.gate))
        {
            let x = x.floats.as_flattened();
            gate.iter_mut()
                .zip(d)
                .zip(x)
                .for_each(|((y, d), x)| *y += d * x);
        }
        let (kind, panels, columns) = (self.kind, &self.panels[..], &self.columns[..]);
        match &self.weights {
            Weights::Floats(units) => dispatch(Floats {
                kind,
                panels,
                columns,
                units,
                x,
                y,
            }),
            Weights::Integers { codes, scales } => dispatch(Integers {
                kind,
                panels,
                columns,
                codes,
                scales,
                x,
                y,
            }),
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Bytes that a product reads of the matrix: weights, scales, columns and diagonal.
    pub fn bytes(&self) -> usize {
        let weights = match &self.weights {
            Weights::Floats(units) => size_of_val(&units[..]),
            Weights::Integers { codes, scales } => {
                size_of_val(&codes[..]) + size_of_val(&scales[..])
            }
        };
        weights + size_of_val(&self.columns[..]) + size_of_val(&self.diagonal[..])
    }
}
