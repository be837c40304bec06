//! Weight files of RNNoise: named arrays, and matrices as lists of blocks of 8 outputs by 4 inputs.
//!
//! The library loads such a file at run time and skips blocks that are not listed, so that a pruned matrix makes the original
//! program faster. A record is `DNNw`, version, type, size and padded size (32 bits each, little endian), a name of 44 bytes of
//! which the last is zero, and the data, padded to 64 bytes.
//!
//! [`WeightFile::network`] takes the three GRUs out as an [`Rnn`](crate::rnn::Rnn), [`WeightFile::set_network`] puts a pruned
//! one back, `WeightFile::merged` (feature `train`) removes neurons.

#[cfg(feature = "train")]
mod clips;
#[cfg(feature = "train")]
mod merge;
mod network;

#[cfg(feature = "train")]
pub use clips::Clips;
#[cfg(feature = "train")]
pub use network::refit_config;
pub use network::{BANDS, FEATURES, HIDDEN, Stored};

use crate::{
    error::{Error, Result, check_finite},
    order::bits::BitMatrix,
};
use std::path::{Path, PathBuf};
use tensor_io::atomic;

const MAGIC: &[u8; 4] = b"DNNw";
const HEAD: usize = 64;
const NAME: usize = 44;
/// Types of elements.
const FLOAT: i32 = 0;
const INT: i32 = 1;
/// Quantised weights, which RNNoise's library knows and its files do not have: kept as they are.
const QUANTISED: i32 = 2;
const INT8: i32 = 3;
/// Outputs and inputs of a block.
const OUTPUTS: usize = 8;
const INPUTS: usize = 4;

/// One array of a weight file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Its name, 43 bytes at most.
    pub name: String,
    /// Type of its elements: 0 f32, 1 i32, 2 bytes without a meaning here, 3 int8.
    pub kind: i32,
    /// Its bytes, little endian, without padding.
    pub data: Vec<u8>,
}

impl Array {
    /// Checks that the type is known and the data are whole elements of it; the error says what is wrong.
    fn check(&self) -> Result<(), String> {
        let Self { name, kind, data } = self;
        let size = match *kind {
            FLOAT | INT => 4,
            QUANTISED | INT8 => 1,
            _ => {
                return Err(format!(
                    "`{name}` has elements of type {kind}; {FLOAT} (f32), {INT} (i32), {QUANTISED} (quantised) and {INT8} (int8) are known"
                ));
            }
        };
        match data.len().is_multiple_of(size) {
            true => Ok(()),
            false => Err(format!(
                "`{name}` has {} bytes, elements of type {kind} have {size}",
                data.len()
            )),
        }
    }
}

/// The entries of a list of blocks, in their places.
struct Blocks {
    matrix: Vec<f32>,
    /// Whether they are codes of 8 bits.
    codes: bool,
}

/// The arrays of a weight file, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WeightFile {
    /// The arrays.
    pub arrays: Vec<Array>,
}

impl WeightFile {
    /// Reads a file.
    ///
    /// # Errors
    /// Those of reading, and of [`from_bytes`](Self::from_bytes).
    pub fn open(file: &Path) -> Result<Self> {
        let bytes = std::fs::read(file).map_err(|source| Error::Io {
            file: file.into(),
            source,
        })?;
        Self::from_bytes(&bytes, file)
    }

    /// Writes a file, which appears under its name when it is complete.
    ///
    /// # Errors
    /// Those of [`to_bytes`](Self::to_bytes), and of writing.
    pub fn write(&self, to: &Path) -> Result<()> {
        Ok(atomic::write(to, &self.to_bytes()?)?)
    }

    /// Reads a file from its bytes; `file` is named in errors.
    ///
    /// # Errors
    /// A record is cut off, has another mark or version, sizes that do not fit, a type that is not known, or a name that is no
    /// text or does not end inside the 44 bytes.
    pub fn from_bytes(bytes: &[u8], file: &Path) -> Result<Self> {
        let wrong = |at: usize, reason: String| Error::Data {
            file: PathBuf::from(file),
            reason: format!("record at byte {at}: {reason}"),
        };
        let mut arrays = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let Some(head) = bytes.get(at..at + HEAD) else {
                return Err(wrong(
                    at,
                    format!("{} bytes are no head of {HEAD}", bytes.len() - at),
                ));
            };
            let word =
                |k: usize| i32::from_le_bytes([head[k], head[k + 1], head[k + 2], head[k + 3]]);
            if &head[..4] != MAGIC || word(4) != 0 {
                return Err(wrong(
                    at,
                    "it does not begin with DNNw and version 0".into(),
                ));
            }
            let sizes = usize::try_from(word(12))
                .ok()
                .zip(usize::try_from(word(16)).ok());
            let Some((size, room)) =
                sizes.filter(|(size, room)| *room == size.next_multiple_of(64))
            else {
                return Err(wrong(
                    at,
                    format!("size {} padded to {}", word(12), word(16)),
                ));
            };
            if head[HEAD - 1] != 0 {
                let name = head[HEAD - NAME..].escape_ascii();
                return Err(wrong(
                    at,
                    format!("the last of the {NAME} bytes of the name `{name}` is not zero"),
                ));
            }
            let name = head[HEAD - NAME..]
                .split(|&b| b == 0)
                .next()
                .unwrap_or_default();
            let name =
                std::str::from_utf8(name).map_err(|_| wrong(at, "its name is no text".into()))?;
            let start = at + HEAD;
            let Some(data) = bytes.get(start..start + room) else {
                let found = bytes.len() - start;
                return Err(wrong(at, format!("`{name}` has {found} of {room} bytes")));
            };
            let array = Array {
                name: name.to_owned(),
                kind: word(8),
                data: data[..size].to_vec(),
            };
            array.check().map_err(|reason| wrong(at, reason))?;
            arrays.push(array);
            at = start + room;
        }
        Ok(Self { arrays })
    }

    /// The bytes of the file: what was read and not changed is the same byte for byte, but for the bytes behind the end of a name
    /// and behind the data of a record. Those mean nothing, and are written as zeros.
    ///
    /// # Errors
    /// A name that is too long or contains a zero, an array of 2 GiB or more, a type that is not known, or data that are no whole
    /// elements of it.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for array in &self.arrays {
            array.check().map_err(setting)?;
            let room = array.data.len().next_multiple_of(64);
            let sizes = i32::try_from(array.data.len())
                .ok()
                .zip(i32::try_from(room).ok());
            let fits = array.name.len() < NAME && !array.name.contains('\0');
            let Some((size, padded)) = sizes.filter(|_| fits) else {
                return Err(setting(format!(
                    "`{}` has a name or data that do not fit a record",
                    array.name
                )));
            };
            out.extend_from_slice(MAGIC);
            for word in [0, array.kind, size, padded] {
                out.extend_from_slice(&word.to_le_bytes());
            }
            let start = out.len();
            out.extend_from_slice(array.name.as_bytes());
            out.resize(start + NAME, 0);
            let start = out.len();
            out.extend_from_slice(&array.data);
            out.resize(start + room, 0);
        }
        Ok(out)
    }

    /// The array of that name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn get(&self, name: &str) -> Result<&Array> {
        self.arrays
            .iter()
            .find(|a| a.name == name)
            .ok_or_else(|| Error::MissingTensor { name: name.into() })
    }

    /// The data of the array of that name.
    ///
    /// # Errors
    /// There is no such array, it has elements of another type, or no whole ones.
    fn data(&self, name: &str, kind: i32) -> Result<&[u8]> {
        let array = self.get(name)?;
        array.check().map_err(setting)?;
        match array.kind == kind {
            true => Ok(&array.data),
            false => Err(setting(format!(
                "`{name}` has elements of type {}, {kind} is expected",
                array.kind
            ))),
        }
    }

    /// Replaces an array, or appends it.
    pub fn set(&mut self, array: Array) {
        match self.arrays.iter_mut().find(|a| a.name == array.name) {
            Some(old) => *old = array,
            None => self.arrays.push(array),
        }
    }

    /// The matrix `[outputs, inputs]` of the list of blocks `{name}_idx`: of the floats `{name}_float`, or where the file has none
    /// of the codes `{name}_int8`, as codes.
    ///
    /// # Errors
    /// An array is missing or does not fit the sizes.
    fn blocks_of(&self, name: &str, outputs: usize, inputs: usize) -> Result<Blocks> {
        let has = |kind: &str| {
            self.arrays
                .iter()
                .any(|a| a.name == format!("{name}_{kind}"))
        };
        let codes = !has("float") && has("int8");
        let index = self.data(&format!("{name}_idx"), INT)?;
        let index = words(index, i32::from_le_bytes);
        let values = if codes {
            let data = self.data(&format!("{name}_int8"), INT8)?;
            data.iter().map(|&b| f32::from(b as i8)).collect()
        } else {
            let data = self.data(&format!("{name}_float"), FLOAT)?;
            words(data, f32::from_le_bytes)
        };
        // Output and input of an entry of a block.
        let place = |k: usize| match codes {
            true => (k / INPUTS, k % INPUTS),
            false => (k % OUTPUTS, k / OUTPUTS),
        };
        let wrong = |reason: String| Error::Shape {
            tensor: name.into(),
            expected: format!(
                "blocks of {OUTPUTS} x {INPUTS} of a [{outputs}, {inputs}] matrix; {reason}"
            ),
            found: vec![index.len(), values.len()],
        };
        let mut matrix = vec![0.0; outputs * inputs];
        let (mut at, mut block) = (0, 0);
        for group in 0..outputs / OUTPUTS {
            let count = index
                .get(at)
                .and_then(|&n| usize::try_from(n).ok())
                .ok_or_else(|| wrong(format!("group {group} has no count")))?;
            let columns = index
                .get(at + 1..(at + 1).saturating_add(count))
                .ok_or_else(|| wrong(format!("group {group} is cut off")))?;
            for &column in columns {
                let column = usize::try_from(column)
                    .ok()
                    .filter(|c| c + INPUTS <= inputs);
                let entries = values.get(block * 32..(block + 1) * 32);
                let (Some(column), Some(entries)) = (column, entries) else {
                    return Err(wrong(format!("block {block} lies outside")));
                };
                for (k, &v) in entries.iter().enumerate() {
                    let (i, j) = place(k);
                    matrix[(group * OUTPUTS + i) * inputs + column + j] = v;
                }
                block += 1;
            }
            at += 1 + count;
        }
        match at == index.len() && block * 32 == values.len() && outputs.is_multiple_of(OUTPUTS) {
            true => Ok(Blocks { matrix, codes }),
            false => Err(wrong("entries are left over".into())),
        }
    }

    /// The matrix `[outputs, inputs]` of a list of blocks: of its floats, or of its 8-bit codes times the steps of their rows
    /// where it has no floats.
    ///
    /// # Errors
    /// An array is missing or does not fit the sizes; a weight that is not finite.
    pub fn matrix(&self, name: &str, outputs: usize, inputs: usize) -> Result<Vec<f32>> {
        let Blocks { mut matrix, codes } = self.blocks_of(name, outputs, inputs)?;
        if codes {
            let short = name.trim_end_matches("_weights");
            let scales = self.floats(&format!("{short}_scale"), outputs)?;
            for (row, scale) in matrix.chunks_exact_mut(inputs.max(1)).zip(scales) {
                // Scales are for inputs that are multiplied by 127.
                row.iter_mut().for_each(|w| *w *= scale * 127.0);
            }
        }
        check_finite(name, &matrix)?;
        Ok(matrix)
    }

    /// Stores a matrix `[outputs, inputs]` as the list of its blocks in which `keep` has an entry; the int8 form of the array,
    /// which no longer fits, is removed. The library asks for it: [`set_network`](Self::set_network) writes both.
    ///
    /// # Errors
    /// Sizes that are no multiples of the block, or a mask of another shape.
    pub fn set_matrix(&mut self, name: &str, matrix: &[f32], keep: &BitMatrix) -> Result<()> {
        let (index, blocks) = blocks(name, keep, matrix, |k| (k % OUTPUTS, k / OUTPUTS))?;
        self.arrays.retain(|a| a.name != format!("{name}_int8"));
        self.set_index(name, &index);
        self.set_floats(&format!("{name}_float"), &blocks);
        Ok(())
    }

    fn set_index(&mut self, name: &str, index: &[i32]) {
        self.set(Array {
            name: format!("{name}_idx"),
            kind: INT,
            data: index.iter().flat_map(|v| v.to_le_bytes()).collect(),
        });
    }

    fn set_floats(&mut self, name: &str, values: &[f32]) {
        self.set(Array {
            name: name.into(),
            kind: FLOAT,
            data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        });
    }

    /// The numbers of a float array of known size.
    fn floats(&self, name: &str, count: usize) -> Result<Vec<f32>> {
        let values = words(self.data(name, FLOAT)?, f32::from_le_bytes);
        if values.len() != count {
            return Err(Error::Shape {
                tensor: name.into(),
                expected: format!("[{count}]"),
                found: vec![values.len()],
            });
        }
        check_finite(name, &values)?;
        Ok(values)
    }
}

/// The list of the blocks in which `keep` has an entry, and their values in the order `within(0), within(1), ..` of (output,
/// input) inside a block.
fn blocks<T: Copy>(
    name: &str,
    keep: &BitMatrix,
    matrix: &[T],
    within: impl Fn(usize) -> (usize, usize),
) -> Result<(Vec<i32>, Vec<T>)> {
    let (outputs, inputs) = (keep.rows(), keep.cols());
    if matrix.len() != outputs * inputs
        || !outputs.is_multiple_of(OUTPUTS)
        || !inputs.is_multiple_of(INPUTS)
    {
        return Err(Error::Shape {
            tensor: name.into(),
            expected: format!("[{outputs}, {inputs}], multiples of {OUTPUTS} and {INPUTS}"),
            found: vec![matrix.len()],
        });
    }
    let (mut index, mut values) = (Vec::new(), Vec::new());
    for group in 0..outputs / OUTPUTS {
        let entry = |k: usize, column: usize| {
            let (i, j) = within(k);
            (group * OUTPUTS + i, column + j)
        };
        let entries = |column: usize| (0..OUTPUTS * INPUTS).map(move |k| (k, column));
        let kept = |column: &usize| {
            let mut entries = entries(*column).map(|(k, c)| entry(k, c));
            entries.any(|(i, j)| keep.get(i, j))
        };
        let columns: Vec<usize> = (0..inputs).step_by(INPUTS).filter(kept).collect();
        index.push(columns.len() as i32);
        for c in columns {
            index.push(c as i32);
            values.extend(entries(c).map(|(k, c)| {
                let (i, j) = entry(k, c);
                matrix[i * inputs + j]
            }));
        }
    }
    Ok((index, values))
}

fn setting(reason: String) -> Error {
    Error::Setting {
        setting: "weight file",
        reason,
    }
}

fn words<T>(data: &[u8], read: impl Fn([u8; 4]) -> T) -> Vec<T> {
    data.chunks_exact(4)
        .map(|w| read([w[0], w[1], w[2], w[3]]))
        .collect()
}

#[cfg(test)]
mod tests;
