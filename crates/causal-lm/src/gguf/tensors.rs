//! The tensors of a GGUF file under the names and in the order of Hugging Face.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use packed::{BlockType, QuantRows};
use rayon::prelude::*;
use tensor_io::gguf::Gguf;
use tensor_io::{Error, SharedBytes, TensorSource};

use super::{Architecture, Order, tokenizer};
use crate::Result;

/// Values that a thread decodes at once.
const TASK: usize = 1 << 14;

/// The tensors of a GGUF file: decoded to floats for a checkpoint, or as the blocks that the file holds.
#[derive(Debug)]
pub struct GgufTensors {
    file: Gguf,
    architecture: Architecture,
    stored: HashMap<String, Stored>,
}

/// What stands behind a tensor of the checkpoint.
#[derive(Debug)]
pub(super) enum Stored {
    /// Rows of tensors of the file, one piece below the other, with a number subtracted from all values.
    Pieces { pieces: Vec<Piece>, offset: f32 },
    /// The norm before a half that its block does not have: ones, which nothing reads.
    Ones(usize),
}

/// Rows of a tensor of the file.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) name: String,
    pub(super) ty: BlockType,
    /// Rows that it has of the tensor.
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// The first of them in the file.
    pub(super) first: usize,
    /// Where its rows are in the file, counted from the first, if not in their order.
    pub(super) order: Option<Order>,
}

/// Neighbouring floats of a file, as [`GgufTensors::in_place`] finds them.
pub(crate) struct InPlace {
    pub(crate) ty: BlockType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: SharedBytes,
}

impl Stored {
    /// The type that all pieces have whose values are taken as they are.
    pub(super) fn block_type(&self) -> Option<BlockType> {
        let Self::Pieces {
            pieces,
            offset: 0.0,
        } = self
        else {
            return None;
        };
        let first = pieces.first()?.ty;
        pieces
            .iter()
            .all(|piece| piece.ty == first)
            .then_some(first)
    }
}

/// Neighbouring rows, counted through all pieces, as neighbouring rows of each piece.
fn within<'p>(
    pieces: &'p [Piece],
    rows: &Range<usize>,
) -> impl Iterator<Item = (&'p Piece, Range<usize>)> {
    let (mut before, rows) = (0, rows.clone());
    pieces.iter().filter_map(move |piece| {
        let first = before;
        before += piece.rows;
        let (start, end) = (rows.start.max(first), rows.end.min(before));
        (start < end).then(|| (piece, start - first..end - first))
    })
}

/// Rows of all pieces.
fn count(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.rows).sum()
}

impl GgufTensors {
    pub(super) fn new(
        file: Gguf,
        architecture: Architecture,
        stored: HashMap<String, Stored>,
    ) -> Self {
        Self {
            file,
            architecture,
            stored,
        }
    }

    /// The file.
    pub fn file(&self) -> &Gguf {
        &self.file
    }

    /// What the file says it is.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Type of the tensor that the checkpoint has under `name`; `None` if there is none in the file, or only in parts of
    /// several types or with other values.
    pub fn block_type(&self, name: &str) -> Option<BlockType> {
        self.stored.get(name)?.block_type()
    }

    /// A quantised type in which the tensor that the checkpoint has under `name`, or a part of it, is stored.
    pub(crate) fn quantised(&self, name: &str) -> Option<BlockType> {
        let Stored::Pieces { pieces, .. } = self.stored.get(name)? else {
            return None;
        };
        let mut types = pieces.iter().map(|piece| piece.ty);
        types.find(|ty| ty.is_quantised())
    }

    /// The blocks of the tensor that the checkpoint has under `name`, bit for bit, rows in the order of Hugging Face; `None`
    /// where [`block_type`](Self::block_type) is.
    ///
    /// # Errors
    /// Scales that are not finite, by row and block.
    pub fn packed(&self, name: &str) -> Result<Option<QuantRows<'_>>> {
        match self.pieces(name) {
            None => Ok(None),
            Some((_, pieces)) => {
                let all = 0..count(pieces);
                self.packed_rows(name, std::slice::from_ref(&all))
            }
        }
    }

    /// As [`packed`](Self::packed), of the rows of `runs` alone, one run after the other; all dimensions but the last count as
    /// rows, so that an expert of many is a run.
    ///
    /// # Errors
    /// As there, and for rows that the tensor does not have.
    pub fn packed_rows(&self, name: &str, runs: &[Range<usize>]) -> Result<Option<QuantRows<'_>>> {
        let Some((ty, pieces)) = self.pieces(name) else {
            return Ok(None);
        };
        self.check_runs(name, pieces, runs)?;
        // Runs of the same piece are taken together.
        let mut parts: Vec<(&Piece, Vec<Range<usize>>)> = Vec::new();
        for (piece, rows) in runs.iter().flat_map(|run| within(pieces, run)) {
            match parts.last_mut() {
                Some((last, runs)) if std::ptr::eq(*last, piece) => runs.push(rows),
                _ => parts.push((piece, vec![rows])),
            }
        }
        if let [(piece, runs)] = &parts[..] {
            return Ok(Some(self.matrix(piece, runs)?));
        }
        let mut bytes = Vec::new();
        let mut rows = 0;
        for (piece, runs) in parts {
            let matrix = self.matrix(piece, &runs)?;
            bytes.extend_from_slice(matrix.bytes());
            rows += matrix.rows();
        }
        let cols = pieces.first().map_or(0, |piece| piece.cols);
        let joined = QuantRows::new(ty, rows, cols, bytes);
        Ok(Some(joined.map_err(|error| self.decode(name, &error))?))
    }

    /// The rows of `runs`, where they are floats that lie in the file one after the other in their order.
    ///
    /// # Errors
    /// Rows that the tensor does not have.
    pub(crate) fn in_place(
        &self,
        name: &str,
        runs: Option<&[Range<usize>]>,
    ) -> Result<Option<InPlace>> {
        let Some((ty, pieces)) = self.pieces(name).filter(|(ty, _)| !ty.is_quantised()) else {
            return Ok(None);
        };
        let all = 0..count(pieces);
        let runs = runs.unwrap_or(std::slice::from_ref(&all));
        self.check_runs(name, pieces, runs)?;
        let mut parts = runs.iter().flat_map(|run| within(pieces, run));
        let (Some((piece, rows)), None) = (parts.next(), parts.next()) else {
            return Ok(None);
        };
        if piece.order.is_some() {
            return Ok(None);
        }
        let row_bytes = self.row_bytes(piece)?;
        let first = piece.first + rows.start;
        let range = first * row_bytes..(first + rows.len()) * row_bytes;
        Ok(Some(InPlace {
            ty,
            rows: rows.len(),
            cols: piece.cols,
            bytes: self.file.shared_bytes(&piece.name, range)?,
        }))
    }

    /// The pieces of a tensor that are all of one type and hold its values.
    fn pieces(&self, name: &str) -> Option<(BlockType, &[Piece])> {
        let stored = self.stored.get(name)?;
        match (stored.block_type(), stored) {
            (Some(ty), Stored::Pieces { pieces, .. }) => Some((ty, pieces)),
            _ => None,
        }
    }

    fn check_runs(
        &self,
        name: &str,
        pieces: &[Piece],
        runs: &[Range<usize>],
    ) -> tensor_io::Result<()> {
        let rows = count(pieces);
        match runs.iter().find(|run| run.end > rows) {
            Some(run) => Err(Error::Decode {
                file: self.file.path().to_path_buf(),
                tensor: name.to_string(),
                reason: format!("it has no rows {run:?}, but {rows}"),
            }),
            None => Ok(()),
        }
    }

    fn get(&self, name: &str) -> tensor_io::Result<&Stored> {
        self.stored.get(name).ok_or_else(|| Error::UnknownTensor {
            file: self.file.path().to_path_buf(),
            tensor: name.to_string(),
        })
    }

    fn row_bytes(&self, piece: &Piece) -> tensor_io::Result<usize> {
        let bytes = piece.ty.row_bytes(piece.cols);
        bytes.map_err(|error| self.decode(&piece.name, &error))
    }

    /// The bytes of neighbouring rows of a piece, in the order of the file.
    fn piece_bytes(&self, piece: &Piece, rows: Range<usize>) -> tensor_io::Result<&[u8]> {
        let (bytes, row_bytes) = (self.file.bytes(&piece.name)?, self.row_bytes(piece)?);
        let first = piece.first + rows.start;
        let range = first * row_bytes..(first + rows.len()) * row_bytes;
        bytes.get(range).ok_or_else(|| Error::Decode {
            file: self.file.path().to_path_buf(),
            tensor: piece.name.clone(),
            reason: format!("it has no rows {first} and on"),
        })
    }

    /// Neighbouring rows of a piece, in the order of the file and not checked.
    fn rows_of(&self, piece: &Piece, rows: Range<usize>) -> tensor_io::Result<QuantRows<'_>> {
        let bytes = self.piece_bytes(piece, rows.clone())?;
        let rows = QuantRows::new(piece.ty, rows.len(), piece.cols, bytes);
        rows.map_err(|error| self.decode(&piece.name, &error))
    }

    /// The rows of `runs` of a piece in their order, checked. The others are not looked at.
    fn matrix(&self, piece: &Piece, runs: &[Range<usize>]) -> tensor_io::Result<QuantRows<'_>> {
        if let (None, [run]) = (piece.order, runs) {
            let rows = self.rows_of(piece, run.clone())?;
            return self.checked(piece, rows, |row| run.start + row);
        }
        let in_file = |row: usize| piece.order.map_or(row, |order| order.in_file(row));
        let places: Vec<usize> = runs.iter().cloned().flatten().map(in_file).collect();
        let stored = self.rows_of(piece, 0..piece.rows)?;
        let rows = stored.select(&places);
        let rows = rows.map_err(|error| self.decode(&piece.name, &error))?;
        self.checked(piece, rows, |row| places[row])
    }

    /// Refuses rows with values that are not finite; `place` gives the place of a row in the piece.
    fn checked<'r>(
        &self,
        piece: &Piece,
        rows: QuantRows<'r>,
        place: impl Fn(usize) -> usize,
    ) -> tensor_io::Result<QuantRows<'r>> {
        let in_tensor = |row: usize| piece.first + place(row);
        match rows.check() {
            Ok(()) => Ok(rows),
            Err(packed::Error::Scale { row, block }) => {
                let row = in_tensor(row);
                Err(self.decode(&piece.name, &packed::Error::Scale { row, block }))
            }
            Err(packed::Error::Value { row, column }) => {
                let row = in_tensor(row);
                Err(self.decode(&piece.name, &packed::Error::Value { row, column }))
            }
            Err(error) => Err(self.decode(&piece.name, &error)),
        }
    }

    fn decode(&self, tensor: &str, error: &packed::Error) -> Error {
        Error::Decode {
            file: self.file.path().to_path_buf(),
            tensor: tensor.to_string(),
            reason: error.to_string(),
        }
    }

    /// The values of neighbouring rows of a piece as floats of 32 bits.
    fn decoded(
        &self,
        piece: &Piece,
        rows: Range<usize>,
        offset: f32,
    ) -> tensor_io::Result<Vec<u8>> {
        let matrix = self.matrix(piece, &[rows])?;
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let rows_at_once = (TASK / cols).max(1);
        let mut bytes = vec![0; rows * cols * size_of::<f32>()];
        bytes
            .par_chunks_mut(rows_at_once * cols * size_of::<f32>())
            .enumerate()
            .try_for_each(|(task, bytes)| {
                let first = task * rows_at_once;
                let mut values = vec![0f32; bytes.len() / size_of::<f32>()];
                let range = first..first + values.len() / cols;
                matrix.dequantise_rows(range, &mut values)?;
                for (bytes, value) in bytes.chunks_exact_mut(size_of::<f32>()).zip(values) {
                    bytes.copy_from_slice(&(value - offset).to_le_bytes());
                }
                Ok(())
            })
            .map_err(|error| self.decode(&piece.name, &error))?;
        Ok(bytes)
    }
}

impl TensorSource for GgufTensors {
    fn bytes(&self, name: &str) -> tensor_io::Result<Cow<'_, [u8]>> {
        match self.get(name)? {
            Stored::Ones(count) => Ok(Cow::Owned(1f32.to_le_bytes().repeat(*count))),
            Stored::Pieces { pieces, .. } => self.row_range(name, 0..count(pieces)),
        }
    }

    fn row_range(&self, name: &str, rows: Range<usize>) -> tensor_io::Result<Cow<'_, [u8]>> {
        let stored = self.get(name)?;
        let (pieces, offset) = match stored {
            // A vector: one row.
            Stored::Ones(count) => {
                return Ok(Cow::Owned(1f32.to_le_bytes().repeat(rows.len() * count)));
            }
            Stored::Pieces { pieces, offset } => (pieces, *offset),
        };
        self.check_runs(name, pieces, std::slice::from_ref(&rows))?;
        // Floats are what the checkpoint has.
        let floats = stored.block_type().is_some_and(|ty| !ty.is_quantised());
        let decode = |piece: &Piece, rows: Range<usize>| -> tensor_io::Result<Vec<u8>> {
            match floats {
                true => Ok(self.matrix(piece, &[rows])?.into_bytes()),
                false => self.decoded(piece, rows, offset),
            }
        };
        let mut parts = within(pieces, &rows);
        let Some((piece, first)) = parts.next() else {
            return Ok(Cow::Borrowed(&[]));
        };
        let Some(second) = parts.next() else {
            return Ok(match floats && piece.order.is_none() {
                true => Cow::Borrowed(self.piece_bytes(piece, first)?),
                false => Cow::Owned(decode(piece, first)?),
            });
        };
        let mut bytes = decode(piece, first)?;
        for (piece, rows) in std::iter::once(second).chain(parts) {
            bytes.extend(decode(piece, rows)?);
        }
        Ok(Cow::Owned(bytes))
    }

    fn rows(&self, name: &str, rows: &[usize]) -> tensor_io::Result<Vec<u8>> {
        let stored = self.get(name)?;
        let (pieces, offset) = match stored {
            Stored::Ones(_) => return Ok(1f32.to_le_bytes().repeat(rows.len())),
            Stored::Pieces { pieces, offset } => (pieces, *offset),
        };
        let floats = stored.block_type().is_some_and(|ty| !ty.is_quantised());
        let mut matrices: Vec<(Range<usize>, &Piece, QuantRows<'_>)> = Vec::new();
        for piece in pieces {
            let first = matrices.last().map_or(0, |(range, ..)| range.end);
            let matrix = self.rows_of(piece, 0..piece.rows)?;
            matrices.push((first..first + piece.rows, piece, matrix));
        }
        let mut bytes = Vec::new();
        for &row in rows {
            let holder = matrices.iter().find(|(range, ..)| range.contains(&row));
            let Some((range, piece, matrix)) = holder else {
                return Err(Error::Decode {
                    file: self.file.path().to_path_buf(),
                    tensor: name.to_string(),
                    reason: format!("it has no row {row}"),
                });
            };
            let within = row - range.start;
            let within = piece.order.map_or(within, |order| order.in_file(within));
            if floats {
                bytes.extend_from_slice(matrix.row(within));
                continue;
            }
            let decode = |error: packed::Error| self.decode(&piece.name, &error);
            let one = matrix.slice(within..within + 1).map_err(decode)?;
            one.check().map_err(|_| {
                let reason = format!("row {}: a scale is not finite", piece.first + within);
                Error::Decode {
                    file: self.file.path().to_path_buf(),
                    tensor: piece.name.clone(),
                    reason,
                }
            })?;
            let mut values = vec![0f32; piece.cols];
            one.dequantise_rows(0..1, &mut values).map_err(decode)?;
            bytes.extend(
                values
                    .iter()
                    .flat_map(|value| (value - offset).to_le_bytes()),
            );
        }
        Ok(bytes)
    }

    fn stored(&self, name: &str) -> tensor_io::Result<Cow<'_, [u8]>> {
        match self.get(name)? {
            Stored::Ones(_) => Ok(Cow::Borrowed(&[])),
            Stored::Pieces { pieces, .. } => match &pieces[..] {
                [piece] => Ok(Cow::Borrowed(self.piece_bytes(piece, 0..piece.rows)?)),
                pieces => {
                    let mut bytes = Vec::new();
                    for piece in pieces {
                        bytes.extend_from_slice(self.piece_bytes(piece, 0..piece.rows)?);
                    }
                    Ok(Cow::Owned(bytes))
                }
            },
        }
    }

    fn total_bytes(&self) -> u64 {
        self.file.total_bytes()
    }

    fn release(&self, name: &str) {
        if let Some(Stored::Pieces { pieces, .. }) = self.stored.get(name) {
            let names = pieces.iter().map(|piece| piece.name.as_str());
            self.file.release(names);
        }
    }

    fn release_rows(&self, name: &str, rows: Range<usize>) {
        if let Some(Stored::Pieces { pieces, .. }) = self.stored.get(name) {
            let in_order = within(pieces, &rows).filter(|(piece, _)| piece.order.is_none());
            for (piece, rows) in in_order {
                let rows = piece.first + rows.start..piece.first + rows.end;
                self.file.release_rows(&piece.name, rows);
            }
        }
    }

    fn files(&self) -> tensor_io::Result<Vec<(String, Vec<u8>)>> {
        tokenizer::files(&self.file)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
