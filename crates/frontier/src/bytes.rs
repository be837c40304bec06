//! What a plan takes on disk, counted before anything is written.
//!
//! The bytes of a plan are those of its files of weights: all tensors, padding of blocks, scales, zero points, indices and
//! factors, and the headers of the files, where each tensor has an entry. Tensors are counted to the byte; an entry of a
//! header is counted with the longest offsets that it may have, so that files are never larger than their plan and smaller by
//! some bytes a tensor at most. `config.json` and tokenizer files are no weights and are left out; a GGUF file is counted
//! whole, because its header holds the tokenizer.

use crate::cache::{Cache, CacheFormat, Caching};
use crate::error::{Error, Result};
use crate::make::Maker;
use crate::site::Site;
use crate::target::Target;
use crate::treatment::{Format, Treatment};
use candle_core::DType;
use causal_lm::compressed::blocks;
use causal_lm::names::{ExpertLayout, Names};
use causal_lm::{Decoder, LayerShape, LinearName};
use lowrank_eora::compress::{BlockTypes, Compressor, Storage};
use lowrank_eora::output::gptq;
use packed::BlockType;
use prune_structured::gguf::{self, Precision};
use std::collections::BTreeSet;
use std::path::Path;
use tensor_io::TensorSpec;

/// Bytes of a file's header that no tensor accounts for: length, metadata and padding of a safetensors file.
const HEADER: u64 = 96;
/// Bytes of a LoRA file in GGUF that no tensor accounts for.
const GGUF_ADAPTER: u64 = 512;
/// Metadata of a GGUF file that lists widths by block, beyond those of one with a number for all.
const GGUF_LISTS: u64 = 256;
/// What a GGUF file says of how it was compressed.
const GGUF_PROVENANCE: u64 = 512;
/// Longest offset in a header.
const OFFSET: &str = "999999999999";
/// Tensors of GGUF files begin at multiples of this.
const ALIGNMENT: u64 = 32;
/// Bytes of an entry of a correction.
const FACTOR: u64 = 2;

/// Counts bytes for one model and target.
pub(crate) struct Counter<'a> {
    maker: &'a Maker<'a>,
    target: Target,
    /// Bytes of everything that no treatment changes.
    pub(crate) fixed: u64,
    /// What the caches have in common, where they count.
    caching: Option<Caching>,
}

impl<'a> Counter<'a> {
    /// `scratch` is a folder for a GGUF file of the dense model, which is removed again.
    pub(crate) fn new(
        maker: &'a Maker<'a>,
        target: Target,
        sites: &[Site],
        caching: Option<Caching>,
        scratch: &Path,
    ) -> Result<Self> {
        let mut counter = Self {
            maker,
            target,
            fixed: 0,
            caching,
        };
        let dense = |site: &Site| counter.weights(*site, maker.dense(*site));
        let of_sites = sites.iter().map(dense).sum::<Result<Option<u64>>>()?;
        let of_sites = of_sites
            .ok_or_else(|| Error::PlanMismatch("the dense model cannot be stored".to_string()))?;
        counter.fixed = match target {
            Target::Gguf => counter.rest_of_gguf(scratch)?.saturating_sub(of_sites),
            _ => counter.rest_of_folder(sites)?,
        };
        Ok(counter)
    }

    /// Bytes of a treatment; `None` where the target cannot store it.
    pub(crate) fn of(&self, site: Site, treatment: Treatment) -> Result<Option<u64>> {
        let weights = self.weights(site, treatment)?;
        let cache = self.cache_of(site, treatment.width, treatment.cache);
        Ok(weights.zip(cache).map(|(weights, cache)| weights + cache))
    }

    /// Bytes of the cache of the layer of an attention site; `None` where its heads do not fit the format.
    pub(crate) fn cache_of(&self, site: Site, width: usize, cache: Option<Cache>) -> Option<u64> {
        let (Site::Attention(layer), Some(caching), Some(cache)) = (site, self.caching, cache)
        else {
            return Some(0);
        };
        let config = self.maker.decoder.config();
        let dense = config.widths[layer];
        // Units are key/value heads, or query heads that leave keys and values alone.
        let kv_heads = match self.maker.units(site) == dense.kv_heads {
            true if self.maker.ranking(site).is_some() => width,
            _ => dense.kv_heads,
        };
        let attention = &config.attention[layer];
        let shape = LayerShape {
            query_heads: dense.heads,
            kv_heads,
            head_dim: attention.head_dim,
            sliding_window: attention.sliding_window,
        };
        if self.target == Target::Here {
            return caching.bytes(cache, shape, self.decoder().dtype());
        }
        // Other runtimes keep keys and values in 16 bits.
        let held = cache.tokens.min(shape.sliding_window.unwrap_or(usize::MAX));
        let elements = 2 * kv_heads * shape.head_dim * held * caching.batch;
        Some(2 * elements as u64)
    }

    /// Bytes of the caches of all layers at their whole width with every token in 16 bits.
    pub(crate) fn caches_in_16_bits(&self, sites: &[Site]) -> u64 {
        let Some(caching) = self.caching else {
            return 0;
        };
        let cache = caching.cache(1.0, CacheFormat::F16);
        let of = |&site: &Site| self.cache_of(site, self.maker.units(site), Some(cache));
        sites.iter().filter_map(of).sum()
    }

    /// Parameters of a treatment, factors included.
    pub(crate) fn parameters(&self, site: Site, treatment: Treatment) -> Result<u64> {
        if let Some(name) = site.matrix(self.decoder()) {
            return Ok(self.decoder().checkpoint().info(&name)?.elements() as u64);
        }
        if let Site::Experts(layer) = site {
            let mixture = self.maker.mixture(layer)?;
            let weights = 3 * self.decoder().config().hidden * treatment.width;
            return Ok((mixture.experts * weights) as u64);
        }
        let shapes = self.maker.shapes(site, treatment.width)?;
        let of = |(_, [m, n]): &(_, [usize; 2])| {
            let rank = treatment.rank.min(*m).min(*n);
            (m * n + rank * (m + n)) as u64
        };
        Ok(shapes.iter().map(of).sum())
    }

    fn decoder(&self) -> &'a Decoder<'a> {
        self.maker.decoder
    }

    fn weights(&self, site: Site, treatment: Treatment) -> Result<Option<u64>> {
        if let Some(name) = site.matrix(self.decoder()) {
            let info = self.decoder().checkpoint().info(&name)?;
            let &[m, n] = info.shape.as_slice() else {
                return Ok(None);
            };
            return self.matrix((&name, self.dtype(&name)?), [m, n], treatment.format);
        }
        if let Site::Experts(layer) = site {
            return self.experts(layer, treatment);
        }
        let mut sum = 0;
        for &(id, [m, n]) in self.maker.shapes(site, treatment.width)?.iter() {
            let name = id.weight();
            let stored = (name.as_str(), self.dtype(&name)?);
            let format = self.maker.format_of(id, treatment.format);
            let Some(bytes) = self.matrix(stored, [m, n], format)? else {
                return Ok(None);
            };
            sum += bytes + self.bias(site, id, m)?;
            // Adapters of one rank are filled up with zeros.
            let rank = match self.target.needs_equal_ranks() {
                true => treatment.rank,
                false => treatment.rank.min(m).min(n),
            };
            if rank > 0 {
                sum += self.factors(&id.to_string(), [m, n], rank);
            }
        }
        Ok(Some(sum))
    }

    /// The dtype of a tensor of the checkpoint; f32 where it is not stored as floats.
    fn dtype(&self, name: &str) -> Result<DType> {
        let info = self.decoder().checkpoint().info(name)?;
        Ok(info.candle_dtype().unwrap_or(DType::F32))
    }

    /// The experts of a block with tensors of their own, where the architecture has names for these: codes are stored under no
    /// others. `None` for codes of one that has none.
    fn experts(&self, layer: usize, treatment: Treatment) -> Result<Option<u64>> {
        let Treatment { width, format, .. } = treatment;
        if self.target == Target::Gguf {
            return self.stacked(layer, treatment);
        }
        let alone = self.maker.expert_specs(layer, width, ExpertLayout::Alone)?;
        let Some(specs) = alone else {
            return match format {
                Format::Stored => self.fused(layer, width),
                Format::Quantised(_) => Ok(None),
            };
        };
        let names = self.decoder().config().names;
        let router = |names: Names| names.router(layer).unwrap_or_default().len() as u64;
        let renamed = names.with_layout(ExpertLayout::Alone).map_or(0, router);
        // What no treatment changes counts the router under the name that it has.
        let mut sum = renamed.saturating_sub(router(names));
        for spec in specs {
            let dtype = spec.dtype.try_into().unwrap_or(DType::F32);
            let stored = (spec.name.as_str(), dtype);
            let shape = [spec.shape[0], spec.shape[1]];
            let Some(bytes) = self.matrix(stored, shape, format)? else {
                return Ok(None);
            };
            sum += bytes;
        }
        Ok(Some(sum))
    }

    /// The experts of a block in a GGUF file, where a tensor holds a linear of all of them.
    fn stacked(&self, layer: usize, treatment: Treatment) -> Result<Option<u64>> {
        let Treatment { width, format, .. } = treatment;
        let config = self.decoder().config();
        // Codes are made under the names of single experts.
        let named = config.names.with_layout(ExpertLayout::Alone).is_some();
        if format != Format::Stored && !named {
            return Ok(None);
        }
        let experts = self.maker.mixture(layer)?.experts;
        let dtype = self.maker.expert_dtype(layer, 0, LinearName::Up)?;
        let mut sum = 0;
        for [m, n] in [
            [width, config.hidden],
            [width, config.hidden],
            [config.hidden, width],
        ] {
            let Some(bytes) = self.matrix(("experts", dtype), [experts * m, n], format)? else {
                return Ok(None);
            };
            sum += bytes;
        }
        Ok(Some(sum))
    }

    /// The experts of a block as floats in tensors that hold all of them; `None` where the architecture has no such tensors.
    fn fused(&self, layer: usize, width: usize) -> Result<Option<u64>> {
        let fused = self.maker.expert_specs(layer, width, ExpertLayout::Fused)?;
        fused
            .map(|specs| specs.iter().map(in_folder).sum())
            .transpose()
    }

    /// Bytes that experts as floats take less in a model whose tensors hold all of a block: they stay there as long as no
    /// expert of any block is quantised.
    pub(crate) fn saved_by_fusing(&self, site: Site, treatment: Treatment) -> Result<u64> {
        let Site::Experts(layer) = site else {
            return Ok(0);
        };
        let is_fused = self.decoder().config().names.layout() == ExpertLayout::Fused;
        let folder = self.target != Target::Gguf;
        if treatment.format != Format::Stored || !is_fused || !folder {
            return Ok(0);
        }
        let alone = self.experts(layer, treatment)?.unwrap_or(0);
        let fused = self.fused(layer, treatment.width)?.unwrap_or(0);
        Ok(alone.saturating_sub(fused))
    }

    /// A matrix in a format, given its name and its dtype where it stays as it is.
    fn matrix(
        &self,
        (name, dtype): (&str, DType),
        [m, n]: [usize; 2],
        format: Format,
    ) -> Result<Option<u64>> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match (self.target, format) {
            (Target::Gguf, Format::Stored) => {
                let bytes = stored_type(dtype)
                    .row_bytes(n)
                    .map_err(lowrank_eora::Error::from)?;
                Ok(Some(in_gguf(module, (m * bytes) as u64)))
            }
            (Target::Gguf, Format::Quantised(compressor)) => {
                let storage = Storage::predicted(&compressor, (m, n), 0);
                Ok(storage.map(|storage| in_gguf(module, storage.bytes() as u64)))
            }
            (_, Format::Stored) => {
                let spec = TensorSpec::new(name, dtype, vec![m, n]);
                Ok(Some(in_folder(&spec)?))
            }
            (_, Format::Quantised(compressor)) => match compressor.blocks {
                Some(blocks) => in_blocks(module, [m, n], blocks.types),
                None => in_gptq(module, [m, n], &compressor),
            },
        }
    }

    /// The bias of a linear with `rows` outputs, where it has one.
    fn bias(&self, site: Site, id: lowrank_eora::repair::LayerId, rows: usize) -> Result<u64> {
        let Some((layer, _)) = site.half() else {
            return Ok(0);
        };
        let name = self.decoder().config().names.bias(layer, id.module());
        let checkpoint = self.decoder().checkpoint();
        if !checkpoint.contains(&name) {
            return Ok(0);
        }
        match self.target {
            Target::Gguf => Ok(in_gguf(&name, 4 * rows as u64)),
            _ => {
                let dtype = checkpoint.info(&name)?.dtype;
                in_folder(&TensorSpec::new(name, dtype, vec![rows]))
            }
        }
    }

    fn factors(&self, module: &str, [m, n]: [usize; 2], rank: usize) -> u64 {
        let (a, b) = ((rank * n) as u64 * FACTOR, (rank * m) as u64 * FACTOR);
        match self.target {
            Target::Gguf => in_gguf(module, a) + in_gguf(module, b),
            _ => {
                let entry = |letter: &str, shape: [usize; 2]| {
                    let name = format!("base_model.model.{module}.lora_{letter}.weight");
                    entry(&name, "F16", &shape)
                };
                a + b + entry("A", [rank, n]) + entry("B", [m, rank])
            }
        }
    }

    /// Bytes of the files of the dense folder without the weights and biases of sites.
    fn rest_of_folder(&self, sites: &[Site]) -> Result<u64> {
        let decoder = self.decoder();
        let names = decoder.config().names;
        // A copy of the embedding as head is left out, unless the model stays as it is.
        let mut of_sites: BTreeSet<String> = self.copied_head().into_iter().collect();
        for &site in sites {
            of_sites.extend(site.matrix(decoder));
            if let Site::Experts(layer) = site {
                of_sites.extend(self.maker.expert_sources(layer)?);
            }
            for (_, id, module) in site.linears(decoder) {
                of_sites.insert(id.weight());
                of_sites.insert(names.bias(id.block(), module));
            }
        }
        // One header for the model, one for the adapter.
        let mut sum = 2 * HEADER;
        for name in decoder.checkpoint().names() {
            if !of_sites.contains(name) {
                let info = decoder.checkpoint().info(name)?;
                sum += in_folder(&TensorSpec::new(name, info.dtype, info.shape.clone()))?;
            }
        }
        Ok(sum)
    }

    /// The name of a head that is stored as a copy of the embedding.
    fn copied_head(&self) -> Option<String> {
        let (checkpoint, config) = (self.decoder().checkpoint(), self.decoder().config());
        let head = config.names.head();
        (config.tied && checkpoint.contains(head)).then(|| head.to_string())
    }

    /// Bytes of the copy of the embedding that the dense model has as head.
    pub(crate) fn copy(&self) -> Result<u64> {
        let Some(name) = self.copied_head().filter(|_| self.target != Target::Gguf) else {
            return Ok(0);
        };
        let info = self.decoder().checkpoint().info(&name)?;
        in_folder(&TensorSpec::new(name, info.dtype, info.shape.clone()))
    }

    /// Bytes of a GGUF file of the dense model, with what lists of widths and an adapter's header may add.
    fn rest_of_gguf(&self, scratch: &Path) -> Result<u64> {
        let path = scratch.join("dense.gguf");
        let decoder = self.decoder();
        let exported = gguf::export(decoder, precision(decoder)?, &path, &tensor_io::NoProgress)?;
        // Names differ in length from those in a folder, by as much in what is subtracted here as in what plans add.
        let layers = decoder.config().layers() as u64;
        let slack = GGUF_ADAPTER + GGUF_LISTS + GGUF_PROVENANCE + 4 * 3 * layers;
        std::fs::remove_file(&path).map_err(tensor_io::Error::io("remove", &path))?;
        Ok(exported.bytes + slack)
    }
}

/// The block type that holds floats of a dtype.
pub(crate) fn stored_type(dtype: DType) -> BlockType {
    match dtype {
        DType::F16 => BlockType::F16,
        DType::BF16 => BlockType::BF16,
        _ => BlockType::F32,
    }
}

/// How a GGUF file holds the matrices that stay as they are.
pub(crate) fn precision(decoder: &Decoder<'_>) -> Result<Precision> {
    let info = decoder
        .checkpoint()
        .info(&decoder.config().names.embedding())?;
    Ok(
        match stored_type(info.candle_dtype().unwrap_or(DType::F32)) {
            BlockType::F16 => Precision::F16,
            BlockType::BF16 => Precision::Bf16,
            _ => Precision::F32,
        },
    )
}

/// Bytes of an entry of the header of a safetensors file.
fn entry(name: &str, dtype: &str, shape: &[usize]) -> u64 {
    let entry = format!(
        "\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{OFFSET},{OFFSET}]}},"
    );
    entry.len() as u64
}

/// A tensor and its entry in a safetensors file.
fn in_folder(spec: &TensorSpec) -> Result<u64> {
    let dtype = format!("{:?}", spec.dtype);
    let elements: usize = spec.shape.iter().product();
    Ok((elements * spec.dtype.bitsize() / 8) as u64 + entry(&spec.name, &dtype, &spec.shape))
}

/// The tensors of a quantised linear in a GPTQ folder; `None` where rows or columns do not fill whole words.
fn in_gptq(module: &str, shape: [usize; 2], compressor: &Compressor) -> Result<Option<u64>> {
    let Some(quantise) = compressor.quantise else {
        return Ok(None);
    };
    let grid = quantise.grid;
    let shape = (shape[0], shape[1]);
    match gptq::specs(module, shape, grid.bits, grid.group) {
        Err(lowrank_eora::Error::NotStorable { .. }) => Ok(None),
        specs => Ok(Some(specs?.iter().map(in_folder).sum::<Result<u64>>()?)),
    }
}

/// The tensor of a linear in blocks in a folder; `None` for mixes, which are one type by the time a linear is made.
fn in_blocks(module: &str, shape: [usize; 2], types: BlockTypes) -> Result<Option<u64>> {
    let BlockTypes::One(ty) = types else {
        return Ok(None);
    };
    let spec = blocks::spec(module, shape, ty.for_rows(shape[1]));
    Ok(Some(in_folder(&spec.map_err(lowrank_eora::Error::from)?)?))
}

/// A tensor and its entry in a GGUF file.
fn in_gguf(name: &str, bytes: u64) -> u64 {
    // Length of the name, number of dimensions, two of them, type and offset.
    let entry = 8 + name.len() as u64 + 4 + 16 + 4 + 8;
    bytes.next_multiple_of(ALIGNMENT) + entry
}
