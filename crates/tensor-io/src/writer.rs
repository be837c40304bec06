//! Writing a checkpoint.
//!
//! All tensors are declared up front, which fixes the shards and the place of every byte; then they are written in any
//! order, straight to their place, so that no more than one tensor need be in memory. The folder appears under its name
//! when it is complete, or not at all; see [`PendingFolder`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::atomic::{Overwrite, PendingFolder};
use crate::checkpoint::Checkpoint;
use crate::config::{CONFIG_FILE, Config};
use crate::error::{Error, Result};
use crate::folder::{INDEX_FILE, SINGLE_FILE, is_of_checkpoint, shard_file_name};
use crate::header::element_count;
use crate::index::Index;
use crate::shard_writer::ShardWriter;
use crate::spec::TensorSpec;

/// How to write.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WriteOptions {
    /// Replace the destination if it exists. A folder is only replaced if it holds a `config.json` or nothing.
    pub overwrite: bool,
    /// Bytes of tensors after which a new shard is begun; a larger tensor gets a shard of its own.
    pub max_shard_bytes: u64,
}

impl Default for WriteOptions {
    /// No overwriting; shards of 5 GB, as transformers has it.
    fn default() -> Self {
        Self {
            overwrite: false,
            max_shard_bytes: 5_000_000_000,
        }
    }
}

impl WriteOptions {
    /// Whether to replace the destination if it exists.
    #[must_use]
    pub fn with_overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Sees that a checkpoint can be written to `dst`: an existing folder may be replaced, and nothing stands in the way of
    /// a new one. Missing parent folders are made; all else stays as it is.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::create`].
    pub fn check(&self, dst: impl AsRef<Path>) -> Result<()> {
        PendingFolder::create(dst, self.replaces()).map(drop)
    }

    fn replaces(&self) -> Overwrite {
        match self.overwrite {
            true => Overwrite::IfHolds {
                marker: CONFIG_FILE,
                owns: is_of_checkpoint,
            },
            false => Overwrite::Never,
        }
    }

    /// Bytes of tensors after which a new shard is begun.
    #[must_use]
    pub fn with_max_shard_bytes(mut self, bytes: u64) -> Self {
        self.max_shard_bytes = bytes;
        self
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The checkpoint folder.
    pub dir: PathBuf,
    /// Number of files with weights.
    pub shards: usize,
    /// Number of elements of all tensors.
    pub parameters: u64,
    /// Size of all tensors as stored, in bytes.
    pub bytes: u64,
}

/// A checkpoint folder that is being written. Dropped before [`CheckpointWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct CheckpointWriter {
    shards: Vec<ShardWriter>,
    specs: Vec<TensorSpec>,
    /// By name: position in `specs`, shard, entry in the shard.
    places: HashMap<String, (usize, usize, usize)>,
    written: Vec<bool>,
    /// File names that `add_file` must not take.
    reserved: BTreeSet<String>,
    summary: Written,
    folder: PendingFolder,
}

impl CheckpointWriter {
    /// Begins a checkpoint at `dst` with this configuration and exactly these tensors. Missing parent folders are
    /// created; until [`CheckpointWriter::finish`], everything is in a hidden folder beside `dst`.
    ///
    /// # Errors
    /// [`Error::Exists`] unless overwriting, [`Error::NotReplaceable`], [`Error::Busy`], [`Error::BadDeclaration`],
    /// [`Error::Io`].
    pub fn create(
        dst: impl AsRef<Path>,
        config: &Config,
        tensors: Vec<TensorSpec>,
        options: &WriteOptions,
    ) -> Result<Self> {
        let plan = plan_shards(&tensors, options.max_shard_bytes)?;
        let folder = PendingFolder::create(dst, options.replaces())?;
        let mut writer = Self {
            shards: Vec::new(),
            places: HashMap::new(),
            written: vec![false; tensors.len()],
            reserved: [CONFIG_FILE, INDEX_FILE, SINGLE_FILE]
                .map(String::from)
                .into(),
            summary: summarise(&tensors, plan.len(), folder.destination())?,
            specs: tensors,
            folder,
        };
        writer.create_shards(&plan)?;
        writer.folder.write(CONFIG_FILE, &config.to_file_bytes())?;
        Ok(writer)
    }

    /// Copies the tokenizer and generation files of `source`.
    ///
    /// # Errors
    /// [`Error::Io`], and what a [`TensorSource`](crate::TensorSource) reports that has to make them.
    pub fn carry_from(&mut self, source: &Checkpoint) -> Result<()> {
        for path in source.files_to_carry() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let contents = fs::read(path).map_err(Error::io("read", path))?;
            self.add_file(&name, &contents)?;
        }
        if let Some(made) = source.source() {
            for (name, contents) in made.files()? {
                self.add_file(&name, &contents)?;
            }
        }
        Ok(())
    }

    /// Adds a file, replacing one of the same name that was added or carried before.
    ///
    /// # Errors
    /// [`Error::FileName`] for a path, or the name of a file that the writer itself writes; [`Error::Io`].
    pub fn add_file(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        if self.reserved.contains(name) {
            return Err(Error::FileName {
                name: name.to_string(),
                reason: "the writer writes this file itself",
            });
        }
        self.folder.write(name, contents)
    }

    /// Writes a tensor from its stored form (little endian, row-major), without looking at the values.
    ///
    /// # Errors
    /// [`Error::NotDeclared`], [`Error::WrittenTwice`], [`Error::WrongLength`], [`Error::Io`].
    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (spec, shard, entry) = self.place(name)?;
        self.shards[shard].write_bytes(entry, bytes, &self.summary.dir)?;
        self.written[spec] = true;
        Ok(())
    }

    /// The same from parts of the stored form, one behind the other, so that only one of them need be in memory. A tensor whose
    /// parts fail counts as not written.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::write_bytes`], and that of the part that could not be made.
    pub fn write_parts<E: From<Error>>(
        &mut self,
        name: &str,
        parts: impl IntoIterator<Item = std::result::Result<impl AsRef<[u8]>, E>>,
    ) -> std::result::Result<(), E> {
        let (spec, shard, entry) = self.place(name)?;
        self.shards[shard].write_parts(entry, parts, &self.summary.dir)?;
        self.written[spec] = true;
        Ok(())
    }

    /// Writes a tensor of the declared shape, from any device and with any strides. Floats are converted to the
    /// declared dtype with one rounding to nearest even, integers to a declared float; other conversions are refused.
    ///
    /// # Errors
    /// [`Error::NotDeclared`], [`Error::WrittenTwice`], [`Error::WrongShape`], [`Error::WrongDtype`],
    /// [`Error::NonFinite`] and [`Error::TooLarge`] with the position of the value, [`Error::Tensor`], [`Error::Io`].
    pub fn write_tensor(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let (spec, shard, entry) = self.place(name)?;
        self.shards[shard].write_tensor(entry, tensor, &self.summary.dir)?;
        self.written[spec] = true;
        Ok(())
    }

    /// Copies a tensor byte for byte and releases its memory in `source`.
    ///
    /// # Errors
    /// As [`CheckpointWriter::write_bytes`]; also [`Error::UnknownTensor`], and [`Error::WrongShape`] or
    /// [`Error::WrongDtype`] if `source` has it in another form than was declared.
    pub fn copy_tensor(&mut self, name: &str, source: &Checkpoint) -> Result<()> {
        let (spec, ..) = self.place(name)?;
        let (spec, info) = (
            &self.specs[spec],
            source.expect_shape(name, &self.specs[spec].shape)?,
        );
        if info.dtype != spec.dtype {
            return Err(Error::WrongDtype {
                path: self.summary.dir.clone(),
                tensor: name.to_string(),
                expected: spec.dtype,
                found: info.dtype.to_string(),
            });
        }
        self.write_bytes(name, &source.bytes(name)?)?;
        source.release([name]);
        Ok(())
    }

    /// Brings everything to disk and gives the folder its name.
    ///
    /// # Errors
    /// [`Error::NotWritten`], [`Error::Io`]; [`Error::Exists`] if the destination has appeared meanwhile. In each case
    /// the destination is as it was before.
    pub fn finish(mut self) -> Result<Written> {
        let missing: Vec<String> = self
            .specs
            .iter()
            .zip(&self.written)
            .filter(|(_, written)| !**written)
            .map(|(spec, _)| spec.name.clone())
            .collect();
        if !missing.is_empty() {
            return Err(Error::NotWritten {
                path: self.summary.dir,
                tensors: missing,
            });
        }
        for shard in &mut self.shards {
            shard.sync()?;
        }
        self.folder.persist()?;
        Ok(self.summary)
    }

    /// Creates the shards' files and, if there are several, their index.
    fn create_shards(&mut self, plan: &[Vec<usize>]) -> Result<()> {
        let position: HashMap<String, usize> = self
            .specs
            .iter()
            .enumerate()
            .map(|(i, spec)| (spec.name.clone(), i))
            .collect();
        let mut weight_map = BTreeMap::new();
        for (number, members) in plan.iter().enumerate() {
            let file_name = match plan.len() {
                1 => SINGLE_FILE.to_string(),
                count => shard_file_name(number + 1, count),
            };
            let specs: Vec<&TensorSpec> = members.iter().map(|&i| &self.specs[i]).collect();
            let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
            let path = self.folder.path().join(&file_name);
            let shard = ShardWriter::create(path, &specs, metadata)?;
            for (i, entry) in shard.entries().iter().enumerate() {
                let place = (position[&entry.name], number, i);
                self.places.insert(entry.name.clone(), place);
                weight_map.insert(entry.name.clone(), file_name.clone());
            }
            self.shards.push(shard);
            self.reserved.insert(file_name);
        }
        if plan.len() > 1 {
            let index = Index::new(self.summary.bytes, weight_map);
            self.folder.write(INDEX_FILE, &index.to_file_bytes())?;
        }
        Ok(())
    }

    fn place(&self, name: &str) -> Result<(usize, usize, usize)> {
        let path = self.summary.dir.clone();
        let tensor = name.to_string();
        match self.places.get(name) {
            None => Err(Error::NotDeclared { path, tensor }),
            Some(&(spec, ..)) if self.written[spec] => Err(Error::WrittenTwice { path, tensor }),
            Some(&place) => Ok(place),
        }
    }
}

/// Which tensors go into which shard: in declared order, a new shard where the next tensor would not fit any more.
fn plan_shards(specs: &[TensorSpec], max_shard_bytes: u64) -> Result<Vec<Vec<usize>>> {
    let mut names = BTreeSet::new();
    let mut shards = vec![Vec::new()];
    let mut filled = 0u64;
    for (i, spec) in specs.iter().enumerate() {
        if !names.insert(spec.name.as_str()) {
            return Err(spec.refuse("it is declared twice"));
        }
        let bytes = spec.bytes()? as u64;
        let full = filled
            .checked_add(bytes)
            .is_none_or(|total| total > max_shard_bytes);
        match shards.last_mut() {
            Some(shard) if shard.is_empty() || !full => shard.push(i),
            _ => {
                shards.push(vec![i]);
                filled = 0;
            }
        }
        filled = filled.saturating_add(bytes);
    }
    Ok(shards)
}

fn summarise(specs: &[TensorSpec], shards: usize, destination: &Path) -> Result<Written> {
    let mut parameters = 0u64;
    let mut bytes = 0u64;
    for spec in specs {
        let elements = element_count(&spec.shape).unwrap_or_default() as u64;
        let overflow = || spec.refuse("the checkpoint's size overflows");
        parameters = parameters.checked_add(elements).ok_or_else(overflow)?;
        bytes = bytes
            .checked_add(spec.bytes()? as u64)
            .ok_or_else(overflow)?;
    }
    Ok(Written {
        dir: destination.to_path_buf(),
        shards,
        parameters,
        bytes,
    })
}
