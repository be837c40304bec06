//! Importance matrices of llama.cpp: the mean of x² over the inputs of each linear, column by column.
//!
//! Quantisers weight the columns of a row with it. Two forms are read, told apart by their first bytes, and written: GGUF
//! files of type `imatrix`, and the older `.dat` files. Entries go by the names of GGUF weights (`blk.0.attn_q.weight`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::atomic;
use crate::error::{Error, Result};
use crate::gguf::cursor::Cursor;
use crate::gguf::{BlockLayout, Gguf, GgufError, MAGIC, TensorSpec, Value, Writer};
use crate::map::MappedFile;
use crate::shard::open_regular;

/// `general.type` of the GGUF form.
pub const GENERAL_TYPE: &str = "imatrix";

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
/// What llama.cpp writes beside the sums of squares and nothing here needs.
const PLAIN_SUMS: &str = ".in_sum";

/// Importance of the input columns of one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Importance {
    /// Mean of x² of each input column, for one matrix after the other: one matrix, or one for each expert.
    pub means: Vec<f64>,
    /// Tokens that each matrix has seen. In files of the older form, which do not say: chunks.
    pub counts: Vec<u64>,
}

impl Importance {
    /// Of a single matrix.
    pub fn new(means: Vec<f64>, tokens: u64) -> Self {
        Self {
            means,
            counts: vec![tokens],
        }
    }

    /// The means of matrix number `matrix`; `None` if there is no such matrix.
    pub fn matrix(&self, matrix: usize) -> Option<&[f64]> {
        let columns = self.means.len() / self.counts.len();
        self.means.chunks_exact(columns).nth(matrix)
    }

    fn check(&self) -> Result<(), String> {
        let (values, matrices) = (self.means.len(), self.counts.len());
        if matrices == 0 || values == 0 || !values.is_multiple_of(matrices) {
            return Err(format!("{values} columns of {matrices} matrices"));
        }
        let bad = |mean: &&f64| !(mean.is_finite() && **mean >= 0.0);
        if let Some(mean) = self.means.iter().find(bad) {
            return Err(format!("expected means of squares, found {mean}"));
        }
        if self.means.iter().all(|&mean| mean == 0.0) {
            return Err("all columns are 0".into());
        }
        Ok(())
    }
}

/// Importances of the weights of a model, by GGUF name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Imatrix {
    /// Names of the texts that it was measured on.
    pub datasets: Vec<String>,
    /// Number of chunks of text.
    pub chunks: Option<u32>,
    /// Tokens of a chunk; the older form does not say.
    pub chunk_tokens: Option<u32>,
    /// By the name of the weight.
    pub entries: BTreeMap<String, Importance>,
}

impl Imatrix {
    /// Reads a file of either form.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Gguf`] and [`Error::Imatrix`], also for values that cannot be means of squares: negative,
    /// NaN, infinite, or all 0.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = open_regular(path).map_err(Error::io("open", path))?;
        let map = MappedFile::new(&file).map_err(Error::io("map", path))?;
        if map.starts_with(&MAGIC) {
            return Self::checked(Self::from_gguf(&Gguf::open(path)?)?, path);
        }
        let read = Self::from_legacy(&map).map_err(|reason| fault(path, reason))?;
        Self::checked(read, path)
    }

    /// Reads a file of either form that is in memory; `name` stands for it in errors.
    ///
    /// # Errors
    /// As [`Imatrix::read`].
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<Self> {
        let path = name.into();
        let read = if bytes.starts_with(&MAGIC) {
            Self::from_gguf(&Gguf::from_bytes(&path, bytes)?)?
        } else {
            Self::from_legacy(&bytes).map_err(|reason| fault(&path, reason))?
        };
        Self::checked(read, &path)
    }

    fn checked(self, path: &Path) -> Result<Self> {
        self.check(path)?;
        Ok(self)
    }

    /// What the file holds for the weight `name`, which has `columns` input columns in each of `matrices` matrices.
    ///
    /// # Errors
    /// The sizes if they are others.
    pub fn of(
        &self,
        name: &str,
        columns: usize,
        matrices: usize,
    ) -> Result<Option<&Importance>, String> {
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        let found = (entry.means.len(), entry.counts.len());
        if found.0 == columns * matrices && (found.1 == matrices || found.1 == 1) {
            return Ok(Some(entry));
        }
        Err(format!(
            "{name}: expected {columns} columns of {matrices} matrices, found {} of {}",
            found.0 / found.1.max(1),
            found.1
        ))
    }

    /// Writes the GGUF form.
    ///
    /// # Errors
    /// [`Error::Imatrix`] for values that cannot be means of squares, [`Error::Io`].
    pub fn write_gguf(&self, path: impl Into<PathBuf>) -> Result<()> {
        let path = path.into();
        self.check(&path)?;
        let metadata: Vec<(String, Value)> = [
            ("general.type", Value::from(GENERAL_TYPE)),
            ("imatrix.datasets", self.datasets.clone().into()),
            ("imatrix.chunk_count", self.chunks.unwrap_or(0).into()),
            ("imatrix.chunk_size", self.chunk_tokens.unwrap_or(0).into()),
        ]
        .map(|(key, value)| (key.to_string(), value))
        .into();
        let f32s = BlockLayout::named("F32").expect("a type of the table");
        let mut specs = Vec::new();
        for (name, entry) in &self.entries {
            let matrices = entry.counts.len();
            let columns = entry.means.len() / matrices;
            let sums = TensorSpec::new(format!("{name}{SUMS}"), f32s, [matrices, columns]);
            let counts = TensorSpec::new(format!("{name}{COUNTS}"), f32s, [matrices, 1]);
            specs.extend([sums, counts]);
        }
        let mut writer = Writer::create(&path, &metadata, &specs)?;
        for (name, entry) in &self.entries {
            let columns = entry.means.len() / entry.counts.len();
            let sum = |(at, mean): (usize, &f64)| mean * entry.counts[at / columns] as f64;
            let sums = entry.means.iter().enumerate().map(sum);
            let counts = entry.counts.iter().map(|&count| count as f64);
            writer.write(&format!("{name}{SUMS}"), &f32_bytes(sums))?;
            writer.write(&format!("{name}{COUNTS}"), &f32_bytes(counts))?;
        }
        writer.finish().map(drop)
    }

    /// Writes the older form, which says chunks instead of tokens and knows one data set.
    ///
    /// # Errors
    /// [`Error::Imatrix`] for values that cannot be means of squares and for what the form cannot hold, [`Error::Io`].
    pub fn write_legacy(&self, path: impl Into<PathBuf>) -> Result<()> {
        let path = path.into();
        self.check(&path)?;
        let number = |what: &str, value: u64| {
            i32::try_from(value)
                .map(i32::to_le_bytes)
                .map_err(|_| fault(&path, format!("{what} of {value} is too large")))
        };
        let mut bytes = number("a number of entries", self.entries.len() as u64)?.to_vec();
        for (name, entry) in &self.entries {
            // The largest count stands for the whole entry: the form has one.
            let tokens = entry.counts.iter().max().copied().unwrap_or(0);
            let chunk = u64::from(self.chunk_tokens.unwrap_or(1).max(1));
            let calls = tokens.div_ceil(chunk).max(1);
            bytes.extend(number("a name", name.len() as u64)?);
            bytes.extend(name.as_bytes());
            bytes.extend(number("a number of chunks", calls)?);
            bytes.extend(number("a number of columns", entry.means.len() as u64)?);
            bytes.extend(f32_bytes(
                entry.means.iter().map(|mean| mean * calls as f64),
            ));
        }
        if let (Some(chunks), Some(name)) = (self.chunks, self.datasets.first()) {
            bytes.extend(number("a number of chunks", chunks.into())?);
            bytes.extend(number("a name", name.len() as u64)?);
            bytes.extend(name.as_bytes());
        }
        atomic::write(path, &bytes)
    }

    fn check(&self, path: &Path) -> Result<()> {
        for (name, entry) in &self.entries {
            let checked = entry.check();
            checked.map_err(|reason| fault(path, format!("{name}: {reason}")))?;
        }
        Ok(())
    }

    fn from_gguf(file: &Gguf) -> Result<Self> {
        let metadata = file.metadata();
        let fault = |reason: String| fault(file.path(), reason);
        match metadata.get_str("general.type")? {
            Some(GENERAL_TYPE) => {}
            other => {
                let found = other.unwrap_or("model");
                let reason = format!("this GGUF file holds a {found}, expected an {GENERAL_TYPE}");
                return Err(metadata.error(GgufError::Content(reason)));
            }
        }
        let small = |key: &str| -> Result<Option<u32>> {
            let value = metadata.get_u64(key)?.and_then(|n| u32::try_from(n).ok());
            Ok(value.filter(|&n| n > 0))
        };
        let datasets = metadata.get_strings("imatrix.datasets")?;
        let mut read = Self {
            datasets: datasets
                .unwrap_or_default()
                .into_iter()
                .map(String::from)
                .collect(),
            chunks: small("imatrix.chunk_count")?,
            chunk_tokens: small("imatrix.chunk_size")?,
            entries: BTreeMap::new(),
        };
        for info in file.tensors() {
            let Some(name) = info.name.strip_suffix(SUMS) else {
                let pair = [COUNTS, PLAIN_SUMS];
                let known = pair
                    .iter()
                    .find_map(|suffix| info.name.strip_suffix(suffix));
                match known.filter(|name| file.contains(&format!("{name}{SUMS}"))) {
                    Some(_) => continue,
                    None => return Err(fault(format!("unexpected tensor `{}`", info.name))),
                }
            };
            let sums = file.floats(&info.name)?;
            let counts = file.floats(&format!("{name}{COUNTS}"))?;
            let whole = |count: &f32| *count >= 0.0 && count.fract() == 0.0;
            if let Some(count) = counts.iter().find(|count| !whole(count)) {
                return Err(fault(format!("{name}: {count} is no number of tokens")));
            }
            let counts: Vec<u64> = counts.into_iter().map(|count| count as u64).collect();
            if counts.is_empty() || !sums.len().is_multiple_of(counts.len()) {
                let (sums, counts) = (sums.len(), counts.len());
                return Err(fault(format!(
                    "{name}: {sums} columns of {counts} matrices"
                )));
            }
            let columns = sums.len() / counts.len();
            let mean = |(at, &sum): (usize, &f32)| match counts[at / columns] {
                // A matrix that saw no token: all columns alike.
                0 => 1.0,
                count => f64::from(sum) / count as f64,
            };
            let means = sums.iter().enumerate().map(mean).collect();
            let entry = Importance { means, counts };
            read.entries.insert(name.to_string(), entry);
        }
        Ok(read)
    }

    fn from_legacy(file: &[u8]) -> Result<Self, String> {
        let mut cursor = Cursor::new(file);
        let mut read = Self::default();
        let count = number(&mut cursor, "the number of entries")?;
        for index in 0..count {
            let what = format!("entry {index} of {count}");
            let length = number(&mut cursor, &what)?;
            let name = text(&mut cursor, length, &what)?;
            let what = format!("entry `{name}`");
            let calls = number(&mut cursor, &what)?;
            let columns = number(&mut cursor, &what)?;
            let values = take(&mut cursor, columns * size_of::<f32>() as u64, &what)?;
            let value = |bytes: &[u8]| bytes.try_into().map_or(f32::NAN, f32::from_le_bytes);
            let values = values.chunks_exact(size_of::<f32>()).map(value);
            let means = values.map(|value| f64::from(value) / calls.max(1) as f64);
            let entry = Importance::new(means.collect(), calls);
            if read.entries.insert(name.clone(), entry).is_some() {
                return Err(format!("entry `{name}` is in the file twice"));
            }
        }
        if cursor.left() > 0 {
            let what = "the name of the data set";
            read.chunks = u32::try_from(number(&mut cursor, what)?).ok();
            let length = number(&mut cursor, what)?;
            read.datasets.push(text(&mut cursor, length, what)?);
        }
        match cursor.left() {
            0 => Ok(read),
            left => Err(format!("{left} bytes behind the last entry")),
        }
    }
}

fn fault(path: &Path, reason: impl Into<String>) -> Error {
    Error::Imatrix {
        file: path.to_path_buf(),
        reason: reason.into(),
    }
}

fn take<'a>(cursor: &mut Cursor<'a>, count: u64, what: &str) -> Result<&'a [u8], String> {
    let taken = cursor.take(count, || what.to_string());
    taken.map_err(|error| error.to_string())
}

/// A number of the older form: 32 bits with a sign, which none of them has.
fn number(cursor: &mut Cursor<'_>, what: &str) -> Result<u64, String> {
    let read = cursor.u32(|| what.to_string());
    let value = read.map_err(|error| error.to_string())?.cast_signed();
    u64::try_from(value).map_err(|_| format!("{what}: expected a number of things, found {value}"))
}

fn text(cursor: &mut Cursor<'_>, length: u64, what: &str) -> Result<String, String> {
    let bytes = take(cursor, length, what)?;
    let text = std::str::from_utf8(bytes).map_err(|_| format!("{what}: the name is not UTF-8"))?;
    Ok(text.to_string())
}

fn f32_bytes(values: impl Iterator<Item = f64>) -> Vec<u8> {
    values
        .flat_map(|value| (value as f32).to_le_bytes())
        .collect()
}
