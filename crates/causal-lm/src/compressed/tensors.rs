//! A folder of compressed linears under the names of the dense weights.

use std::any::Any;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use packed::{BlockType, QuantRows};
use rayon::prelude::*;
use tensor_io::{Checkpoint, Dtype, TensorSource, TensorSpec};

use super::stored::{self, refuse};
use super::{Format, SECTIONS, Sparse, StoredGroups, blocks, compressed_tensors, gptq, sparse};
use crate::Result;

/// The tensors of a folder whose linears are compressed: decoded to floats for a checkpoint, or as codes.
#[derive(Debug)]
pub struct CompressedTensors {
    folder: Checkpoint,
    format: Format,
    /// Paths of the compressed modules by the name of the dense weight.
    modules: BTreeMap<String, String>,
    /// The codes of the weight that rows were last asked of: an embedding, of which each token takes one.
    looked_up: Mutex<Option<(String, Arc<StoredGroups>)>>,
}

/// Tensors that make up a weight, by the last part of their names.
const PARTS: [&str; 13] = [
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "compressed",
    "bitmask",
    "shape",
    "row_offsets",
];

/// The module of which a tensor may be a part.
fn part_of(name: &str) -> Option<&str> {
    let (path, part) = name.rsplit_once('.')?;
    let module = path.strip_suffix(".weight").unwrap_or(path);
    PARTS.contains(&part).then_some(module)
}

/// The checkpoint that decodes `folder`.
pub(super) fn decoded(folder: Checkpoint, format: Format) -> Result<Checkpoint> {
    let marker = marker(&format);
    let mut specs = Vec::new();
    let mut modules = BTreeMap::new();
    let names = folder.names();
    let compressed: HashSet<&str> = names.filter_map(|name| module_of(name, marker)).collect();
    for name in folder.names() {
        if let Some(module) = module_of(name, marker) {
            let shape = shape(&folder, module, &format)?;
            let weight = format!("{module}.weight");
            specs.push(TensorSpec::new(&weight, Dtype::F32, shape));
            modules.insert(weight, module.to_string());
            continue;
        }
        if let Some((module, ty)) = blocks::module_of(name) {
            let weight = format!("{module}.weight");
            let shape = blocks::shape(&folder, module, ty)?;
            specs.push(TensorSpec::new(&weight, Dtype::F32, shape));
            modules.insert(weight, module.to_string());
            continue;
        }
        if !part_of(name).is_some_and(|module| compressed.contains(module)) {
            let info = folder.info(name)?;
            specs.push(TensorSpec::new(name, info.dtype, info.shape.clone()));
        }
    }
    let mut config = folder.config().clone();
    for field in SECTIONS {
        config.remove(field);
    }
    let path = folder.dir().to_path_buf();
    let source = CompressedTensors {
        folder,
        format,
        modules,
        looked_up: Mutex::new(None),
    };
    Ok(Checkpoint::from_source(
        path,
        config,
        specs,
        Box::new(source),
    )?)
}

/// What stands behind the path of a compressed module in the name of one of its tensors.
fn marker(format: &Format) -> &'static str {
    match format {
        Format::Gptq { .. } => ".qweight",
        Format::PackQuantized { .. } => ".weight_packed",
        Format::SparseBitmask => ".bitmask",
        Format::Dense | Format::Gguf | Format::Blocks => ".",
    }
}

fn module_of<'n>(name: &'n str, marker: &str) -> Option<&'n str> {
    let module = name.strip_suffix(marker)?;
    Some(module.strip_suffix(".weight").unwrap_or(module))
}

/// Shape of a module's weight, without reading its codes.
fn shape(folder: &Checkpoint, module: &str, format: &Format) -> tensor_io::Result<[usize; 2]> {
    let name = |tensor: &str| format!("{module}.{tensor}");
    match *format {
        Format::Gptq { bits, .. } => {
            let qweight = name("qweight");
            let shape = &folder.info(&qweight)?.shape;
            let [words, m] = stored::matrix(folder, &qweight, shape)?;
            let inputs = match folder.contains(&name("g_idx")) {
                true => folder.info(&name("g_idx"))?.elements(),
                false => 0,
            };
            match inputs {
                0 => Ok([m, words * 32 / bits]),
                inputs => Ok([m, inputs]),
            }
        }
        Format::PackQuantized { .. } => stored::shape(folder, &name("weight_shape")),
        Format::SparseBitmask => {
            let prefix = sparse::prefix(folder, module).unwrap_or_else(|| module.to_string());
            stored::shape(folder, &format!("{prefix}.shape"))
        }
        Format::Dense | Format::Gguf | Format::Blocks => {
            refuse(folder, module, "it is not compressed")
        }
    }
}

impl CompressedTensors {
    /// The folder as it is.
    pub fn folder(&self) -> &Checkpoint {
        &self.folder
    }

    /// How its linears are stored.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// Whether the weight that the checkpoint has under `name` is stored compressed.
    pub fn is_compressed(&self, name: &str) -> bool {
        self.modules.contains_key(name)
    }

    /// The codes of the weight that the checkpoint has under `name`; `None` if it is not stored as codes.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit each other.
    pub fn groups(&self, name: &str) -> tensor_io::Result<Option<StoredGroups>> {
        match self.modules.get(name) {
            Some(module) => self.format.groups(&self.folder, module),
            None => Ok(None),
        }
    }

    /// The blocks of the weight that the checkpoint has under `name`, checked; `None` if it is not stored in blocks.
    ///
    /// # Errors
    /// Tensors of another shape, and scales that are not finite.
    pub fn blocks(&self, name: &str) -> tensor_io::Result<Option<QuantRows<'_>>> {
        match self.modules.get(name) {
            Some(module) => blocks::read(&self.folder, module),
            None => Ok(None),
        }
    }

    /// The type of the blocks of the weight that the checkpoint has under `name`; `None` if it is not stored in blocks.
    pub fn block_type(&self, name: &str) -> Option<BlockType> {
        blocks::of(&self.folder, self.modules.get(name)?)
    }

    /// The codes of a weight, kept for the next call; `None` if it is not stored as codes.
    fn codes_for_rows(&self, name: &str) -> tensor_io::Result<Option<Arc<StoredGroups>>> {
        // A thread that panicked left nothing half done here.
        let mut kept = self
            .looked_up
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((last, groups)) = &*kept
            && last == name
        {
            return Ok(Some(groups.clone()));
        }
        let Some(groups) = self.groups(name)?.map(Arc::new) else {
            return Ok(None);
        };
        self.check_scales(name, &groups)?;
        *kept = Some((name.to_string(), groups.clone()));
        Ok(Some(groups))
    }

    /// Refuses a weight with a scale that is NaN or infinite.
    fn check_scales(&self, name: &str, groups: &StoredGroups) -> tensor_io::Result<()> {
        let bad = groups.scales.iter().position(|scale| !scale.is_finite());
        let Some(at) = bad else { return Ok(()) };
        let (row, group) = (at / groups.groups(), at % groups.groups());
        let reason = format!("row {row}, group {group}: the scale is not finite");
        refuse(&self.folder, name, reason)
    }

    /// The values of some rows, each checked.
    fn rows_in_blocks(
        &self,
        name: &str,
        blocks: &QuantRows<'_>,
        rows: &[usize],
    ) -> tensor_io::Result<Vec<u8>> {
        let part = blocks.select(rows).and_then(|part| {
            part.check()?;
            Ok(part.dequantise())
        });
        match part {
            Ok(values) => Ok(values.into_iter().flat_map(f32::to_le_bytes).collect()),
            Err(error) => refuse(&self.folder, name, error.to_string()),
        }
    }

    /// Names of the tensors of a compressed module.
    fn parts(&self, module: &str) -> Vec<String> {
        let within = |part: &&str| ["", ".weight"].map(|path| format!("{module}{path}.{part}"));
        let in_blocks = blocks::of(&self.folder, module).map(|ty| blocks::tensor(module, ty));
        let names = PARTS.iter().flat_map(within).chain(in_blocks);
        names.filter(|name| self.folder.contains(name)).collect()
    }
}

impl Format {
    /// The codes of a module of a checkpoint in this format; `None` if it is not stored as codes.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit each other.
    pub fn groups(
        &self,
        folder: &Checkpoint,
        module: &str,
    ) -> tensor_io::Result<Option<StoredGroups>> {
        let has = |tensor: &str| folder.contains(&format!("{module}.{tensor}"));
        match *self {
            Self::Gptq {
                version,
                bits,
                group_size,
                symmetric,
            } if has("qweight") => {
                let stated = gptq::Stated {
                    version,
                    bits,
                    group_size,
                    symmetric,
                };
                gptq::read(folder, module, stated).map(Some)
            }
            Self::PackQuantized {
                bits,
                group_size,
                symmetric,
            } if has("weight_packed") => {
                compressed_tensors::read(folder, module, bits, group_size, symmetric).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The weight of a module of a checkpoint in this format that is stored without its zeros; `None` for others.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit each other.
    pub fn sparse(&self, folder: &Checkpoint, module: &str) -> tensor_io::Result<Option<Sparse>> {
        match (self, sparse::prefix(folder, module)) {
            (Self::SparseBitmask, Some(prefix)) => sparse::read(folder, &prefix).map(Some),
            _ => Ok(None),
        }
    }
}

impl TensorSource for CompressedTensors {
    fn bytes(&self, name: &str) -> tensor_io::Result<Cow<'_, [u8]>> {
        let Some(module) = self.modules.get(name) else {
            return self.folder.bytes(name);
        };
        if let Some(sparse) = self.format.sparse(&self.folder, module)? {
            let values = sparse.values.iter();
            return Ok(Cow::Owned(
                values
                    .flat_map(|&value| (value as f32).to_le_bytes())
                    .collect(),
            ));
        }
        if let Some(blocks) = blocks::read(&self.folder, module)? {
            let values = blocks.dequantise().into_iter();
            return Ok(Cow::Owned(values.flat_map(f32::to_le_bytes).collect()));
        }
        let Some(groups) = self.format.groups(&self.folder, module)? else {
            return Ok(Cow::Borrowed(&[]));
        };
        self.check_scales(name, &groups)?;
        let mut bytes = vec![0; groups.rows * groups.cols * size_of::<f32>()];
        bytes
            .par_chunks_mut((groups.cols * size_of::<f32>()).max(1))
            .enumerate()
            .for_each(|(row, bytes)| {
                let cells = bytes.chunks_exact_mut(size_of::<f32>());
                for (bytes, value) in cells.zip(groups.row(row)) {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
            });
        Ok(Cow::Owned(bytes))
    }

    fn rows(&self, name: &str, rows: &[usize]) -> tensor_io::Result<Vec<u8>> {
        let Some(module) = self.modules.get(name) else {
            return self.folder.rows(name, rows);
        };
        if let Some(groups) = self.codes_for_rows(name)? {
            let values = rows.iter().flat_map(|&row| groups.row(row));
            return Ok(values.flat_map(f32::to_le_bytes).collect());
        }
        if let Some(blocks) = blocks::unchecked(&self.folder, module)? {
            return self.rows_in_blocks(name, &blocks, rows);
        }
        let [_, cols] = shape(&self.folder, module, &self.format)?;
        let (all, row_bytes) = (self.bytes(name)?, cols * size_of::<f32>());
        let mut bytes = Vec::with_capacity(rows.len() * row_bytes);
        for row in rows {
            bytes.extend_from_slice(&all[row * row_bytes..][..row_bytes]);
        }
        Ok(bytes)
    }

    fn stored(&self, name: &str) -> tensor_io::Result<Cow<'_, [u8]>> {
        let Some(module) = self.modules.get(name) else {
            return self.folder.bytes(name);
        };
        let mut bytes = Vec::new();
        for part in self.parts(module) {
            bytes.extend_from_slice(&self.folder.bytes(&part)?);
        }
        Ok(Cow::Owned(bytes))
    }

    fn total_bytes(&self) -> u64 {
        self.folder.total_bytes()
    }

    fn release(&self, name: &str) {
        match self.modules.get(name) {
            Some(module) => {
                let parts = self.parts(module);
                self.folder.release(parts.iter().map(String::as_str));
            }
            None => self.folder.release([name]),
        }
    }

    fn release_rows(&self, name: &str, rows: Range<usize>) {
        if !self.modules.contains_key(name) {
            self.folder.release_rows(name, rows);
        }
    }

    fn files(&self) -> tensor_io::Result<Vec<(String, Vec<u8>)>> {
        crate::open::carried_files(&self.folder)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
