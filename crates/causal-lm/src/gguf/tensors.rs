//! The tensors of a GGUF file under the names and in the order of Hugging Face.

use std::any::Any;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use packed::{BlockType, QuantRows};
use rayon::prelude::*;
use tensor_io::gguf::Gguf;
use tensor_io::{Config, Dtype, Error, TensorSource, TensorSpec};

use super::layout::{self, Experts, FileTensor, Rows};
use super::names::{self, in_block};
use super::{Architecture, content, tokenizer};
use crate::config::ModelConfig;
use crate::names::{LLAMA, Names};
use crate::{LinearName, Result};

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
enum Stored {
    /// Rows of tensors of the file, one piece below the other, with a number subtracted from all values.
    Pieces { pieces: Vec<Piece>, offset: f32 },
    /// The norm before a half that its block does not have: ones, which nothing reads.
    Ones(usize),
}

/// Rows of a tensor of the file.
#[derive(Debug)]
struct Piece {
    name: String,
    ty: BlockType,
    /// Rows that it has of the tensor.
    rows: usize,
    cols: usize,
    /// The first of them in the file.
    first: usize,
    /// For each row its row in the file, counted from the first, where they differ.
    order: Option<Vec<usize>>,
}

impl Stored {
    /// The type that all pieces have whose values are taken as they are.
    fn block_type(&self) -> Option<BlockType> {
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

/// Finds the place of every tensor of `file`.
pub(super) fn map(
    file: Gguf,
    architecture: Architecture,
    config: &Config,
) -> Result<(Vec<TensorSpec>, GgufTensors)> {
    check_heads(&file, architecture, config)?;
    let model = ModelConfig::new(config)?;
    let experts = match file.contains(&in_block(0, "ffn_gate.0.weight")) {
        true => Experts::Alone,
        false => Experts::Stacked,
    };
    let expected = layout::tensors(&model, architecture, experts);
    check_places(&file, architecture, &model, &expected)?;
    // Pieces of each tensor of the checkpoint by their first row.
    let mut found: BTreeMap<String, (BTreeMap<usize, Piece>, &FileTensor)> = BTreeMap::new();
    for tensor in &expected {
        let Ok(info) = file.info(&tensor.name) else {
            continue;
        };
        let metadata = file.metadata();
        let Some(ty) = BlockType::from_id(info.layout.id) else {
            let (name, layout) = (&info.name, info.layout.name);
            let what = format!("tensor `{name}`: type {layout} is not supported");
            return Err(content(&metadata, what));
        };
        let in_parts = tensor
            .parts
            .iter()
            .any(|part| matches!(part.rows, Rows::Range(_)))
            || tensor.parts.len() > 1;
        if in_parts && info.shape != tensor.shape {
            let (name, found, expected) = (&info.name, &info.shape, &tensor.shape);
            let what = format!("tensor `{name}` has shape {found:?}, expected {expected:?}");
            return Err(content(&metadata, what));
        }
        let mut first = 0;
        for part in &tensor.parts {
            let (of_file, cols) = match (&part.rows, info.shape.len()) {
                // A vector has one value for each row of the matrix.
                (Rows::Order(_), 1) => (info.elements(), 1),
                _ => (info.elements() / info.width().max(1), info.width()),
            };
            let rows = match &part.rows {
                Rows::Range(range) => range.len(),
                _ => of_file / tensor.parts.len(),
            };
            let (at, order) = match &part.rows {
                Rows::All => (0, None),
                Rows::Range(range) => (range.start, None),
                Rows::Order(order) if order.len() == rows => (0, Some(inverse(order))),
                Rows::Order(_) => (0, None),
            };
            let piece = Piece {
                name: info.name.clone(),
                ty,
                rows,
                cols,
                first,
                order,
            };
            first += rows;
            let of_tensor = found.entry(part.tensor.clone());
            of_tensor
                .or_insert_with(|| (BTreeMap::new(), tensor))
                .0
                .insert(at, piece);
        }
    }
    let shapes: HashMap<String, Vec<usize>> = model.tensors().into_iter().collect();
    let (mut specs, mut stored) = (Vec::new(), HashMap::new());
    for (name, (pieces, tensor)) in found {
        let pieces: Vec<Piece> = pieces.into_values().collect();
        let of_file = || file.info(&tensor.name).map(|info| info.shape.clone());
        // What the file has in another shape is compared with the config later.
        let shape = match (&pieces[..], shapes.get(&name)) {
            ([_], Some(shape)) if tensor.parts.len() > 1 || of_file()? == tensor.shape => {
                shape.clone()
            }
            ([_], _) => of_file()?,
            (_, Some(shape)) => shape.clone(),
            (_, None) => continue,
        };
        // A tensor of which the file lacks a part is missing.
        let values = |piece: &Piece| piece.rows * piece.cols;
        if pieces.iter().map(values).sum::<usize>() != shape.iter().product::<usize>() {
            continue;
        }
        let offset = tensor.offset;
        let tensor = Stored::Pieces { pieces, offset };
        let dtype = match tensor.block_type() {
            Some(BlockType::F16) => Dtype::F16,
            Some(BlockType::BF16) => Dtype::BF16,
            _ => Dtype::F32,
        };
        specs.push(TensorSpec::new(&name, dtype, shape));
        stored.insert(name, tensor);
    }
    if architecture == Architecture::Deci {
        add_norms_of_absent_halves(config, &mut specs, &mut stored)?;
    }
    let tensors = GgufTensors {
        file,
        architecture,
        stored,
    };
    Ok((specs, tensors))
}

/// For each row of the result its place in `order`.
fn inverse(order: &[usize]) -> Vec<usize> {
    let mut places = vec![0; order.len()];
    for (place, &row) in order.iter().enumerate() {
        places[row] = place;
    }
    places
}

/// Refuses q and k whose rows are no whole heads, where they have to be reordered.
fn check_heads(file: &Gguf, architecture: Architecture, config: &Config) -> Result<()> {
    if !architecture.rotates_neighbours() {
        return Ok(());
    }
    let head_dim = config.usize("head_dim")?;
    for info in file.tensors() {
        let Some((_, part)) = info
            .name
            .strip_prefix("blk.")
            .and_then(|name| name.split_once('.'))
        else {
            continue;
        };
        let of_heads = [LinearName::Q, LinearName::K].map(names::linear);
        let Some((module, kind)) = part.rsplit_once('.') else {
            continue;
        };
        if !of_heads.contains(&module) || !matches!(kind, "weight" | "bias") {
            continue;
        }
        let rows = match info.shape.len() {
            1 => info.elements(),
            _ => info.elements() / info.width().max(1),
        };
        let whole_heads =
            head_dim > 0 && head_dim.is_multiple_of(2) && rows.is_multiple_of(head_dim);
        let is_quantised = BlockType::from_id(info.layout.id).is_some_and(BlockType::is_quantised);
        if !(whole_heads && (info.shape.len() == 2 || !is_quantised)) {
            let what = format!(
                "tensor `{}`: {rows} rows are no heads of {head_dim}",
                info.name
            );
            return Err(content(&file.metadata(), what));
        }
    }
    Ok(())
}

/// Refuses tensors that the model does not have: reading on would ignore them.
fn check_places(
    file: &Gguf,
    architecture: Architecture,
    model: &ModelConfig,
    expected: &[FileTensor],
) -> Result<()> {
    let known: HashSet<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
    let of_rotation = [
        names::ROPE_FACTORS,
        names::SHORT_FACTORS,
        names::LONG_FACTORS,
    ];
    for info in file.tensors() {
        let name = info.name.as_str();
        // Frequencies that old files carry and nothing reads.
        let ignored = name.starts_with("blk.") && name.ends_with(".attn_rot_embd.weight");
        if known.contains(name) || of_rotation.contains(&name) || ignored {
            continue;
        }
        let block = name
            .strip_prefix("blk.")
            .and_then(|name| name.split_once('.'));
        let block = block.and_then(|(block, _)| block.parse::<usize>().ok());
        let metadata = file.metadata();
        let what = match block.filter(|block| *block >= model.layers()) {
            Some(block) => format!(
                "tensor `{name}` is of {}, but the file states {} blocks",
                model.names.block(block, ""),
                model.layers()
            ),
            None => format!(
                "tensor `{name}` has no place in a {} model; reading on would ignore it",
                architecture.name()
            ),
        };
        return Err(content(&metadata, what));
    }
    Ok(())
}

/// Files leave out the norm before a half that a block does not have.
fn add_norms_of_absent_halves(
    config: &Config,
    specs: &mut Vec<TensorSpec>,
    stored: &mut HashMap<String, Stored>,
) -> Result<()> {
    let hidden = config.usize("hidden_size")?;
    for layer in 0..config.usize("num_hidden_layers")? {
        for (attention, norm) in [(true, LLAMA.attention_before), (false, LLAMA.mlp_before)] {
            let Some(norm) = norm else { continue };
            let norm = Names::new(&LLAMA).block(layer, &format!("{norm}.weight"));
            if !stored.contains_key(&norm) && has_no_half(config, layer, attention) {
                specs.push(TensorSpec::new(&norm, Dtype::F32, [hidden]));
                stored.insert(norm, Stored::Ones(hidden));
            }
        }
    }
    Ok(())
}

/// Whether the config gives block `layer` no attention, or no MLP.
fn has_no_half(config: &Config, layer: usize, attention: bool) -> bool {
    let field = match attention {
        true => "num_attention_heads",
        false => "intermediate_size",
    };
    let list = config
        .get(crate::config::WIDTHS_KEY)
        .map(|lists| &lists[field][layer]);
    list.is_some_and(|width| width.as_u64() == Some(0))
}

impl GgufTensors {
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

    /// The blocks of the tensor that the checkpoint has under `name`, bit for bit, rows in the order of Hugging Face; `None`
    /// where [`block_type`](Self::block_type) is.
    ///
    /// # Errors
    /// Scales that are not finite, by row and block.
    pub fn packed(&self, name: &str) -> Result<Option<QuantRows<'_>>> {
        let Some(stored) = self.stored.get(name) else {
            return Ok(None);
        };
        let (Some(ty), Stored::Pieces { pieces, .. }) = (stored.block_type(), stored) else {
            return Ok(None);
        };
        if let [piece] = &pieces[..] {
            return Ok(Some(self.matrix(piece)?));
        }
        let mut bytes = Vec::new();
        let (mut rows, mut cols) = (0, 0);
        for piece in pieces {
            bytes.extend_from_slice(self.matrix(piece)?.bytes());
            (rows, cols) = (rows + piece.rows, piece.cols);
        }
        let joined = QuantRows::new(ty, rows, cols, bytes);
        Ok(Some(joined.map_err(|error| self.decode(name, &error))?))
    }

    fn get(&self, name: &str) -> tensor_io::Result<&Stored> {
        self.stored.get(name).ok_or_else(|| Error::UnknownTensor {
            file: self.file.path().to_path_buf(),
            tensor: name.to_string(),
        })
    }

    /// The bytes of the rows of a piece, in the order of the file.
    fn piece_bytes(&self, piece: &Piece) -> tensor_io::Result<&[u8]> {
        let bytes = self.file.bytes(&piece.name)?;
        let row_bytes = piece.ty.row_bytes(piece.cols);
        let row_bytes = row_bytes.map_err(|error| self.decode(&piece.name, &error))?;
        let range = piece.first * row_bytes..(piece.first + piece.rows) * row_bytes;
        bytes.get(range).ok_or_else(|| Error::Decode {
            file: self.file.path().to_path_buf(),
            tensor: piece.name.clone(),
            reason: format!("it has no rows {} and on", piece.first),
        })
    }

    fn rows_of(&self, piece: &Piece) -> tensor_io::Result<QuantRows<'_>> {
        let rows = QuantRows::new(piece.ty, piece.rows, piece.cols, self.piece_bytes(piece)?);
        rows.map_err(|error| self.decode(&piece.name, &error))
    }

    /// All rows of a piece in their order, checked.
    fn matrix(&self, piece: &Piece) -> tensor_io::Result<QuantRows<'_>> {
        let stored = self.rows_of(piece)?;
        stored.check().map_err(|error| match piece.first {
            0 => self.decode(&piece.name, &error),
            first => Error::Decode {
                file: self.file.path().to_path_buf(),
                tensor: piece.name.clone(),
                reason: format!("of the rows from {first} on, {error}"),
            },
        })?;
        match &piece.order {
            None => Ok(stored),
            Some(order) => stored
                .select(order)
                .map_err(|error| self.decode(&piece.name, &error)),
        }
    }

    fn decode(&self, tensor: &str, error: &packed::Error) -> Error {
        Error::Decode {
            file: self.file.path().to_path_buf(),
            tensor: tensor.to_string(),
            reason: error.to_string(),
        }
    }

    /// The values of a piece as floats of 32 bits.
    fn decoded(&self, piece: &Piece, offset: f32) -> tensor_io::Result<Vec<u8>> {
        let matrix = self.matrix(piece)?;
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
        let stored = self.get(name)?;
        let (pieces, offset) = match stored {
            Stored::Ones(count) => return Ok(Cow::Owned(1f32.to_le_bytes().repeat(*count))),
            Stored::Pieces { pieces, offset } => (pieces, *offset),
        };
        // Floats are what the checkpoint has.
        let floats = stored.block_type().is_some_and(|ty| !ty.is_quantised());
        if let ([piece], true) = (&pieces[..], floats) {
            return Ok(match piece.order {
                None => Cow::Borrowed(self.piece_bytes(piece)?),
                Some(_) => Cow::Owned(self.matrix(piece)?.into_bytes()),
            });
        }
        let mut bytes = Vec::new();
        for piece in pieces {
            match floats {
                true => bytes.extend_from_slice(self.matrix(piece)?.bytes()),
                false if pieces.len() == 1 => return Ok(Cow::Owned(self.decoded(piece, offset)?)),
                false => bytes.extend(self.decoded(piece, offset)?),
            }
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
            matrices.push((first..first + piece.rows, piece, self.rows_of(piece)?));
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
            let within = piece.order.as_ref().map_or(within, |order| order[within]);
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
                [piece] => Ok(Cow::Borrowed(self.piece_bytes(piece)?)),
                pieces => {
                    let mut bytes = Vec::new();
                    for piece in pieces {
                        bytes.extend_from_slice(self.piece_bytes(piece)?);
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

    fn files(&self) -> tensor_io::Result<Vec<(String, Vec<u8>)>> {
        tokenizer::files(&self.file)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
