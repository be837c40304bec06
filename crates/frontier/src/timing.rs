//! Seconds of a decoded token by treatment, measured on this machine.
//!
//! A treatment's matrices are multiplied with one token as they are stored, those that read the same input together, after
//! as many other bytes were read as the model has, so that the caches of the processor hold them as little as they do when
//! a whole model is decoded. What no treatment changes, such as attention over what is cached, is what decoding the dense
//! model takes beyond its matrices. The table is kept in the folder of a run, so that a run goes on with what it has
//! measured.

use crate::bytes::stored_type;
use crate::error::{Error, Result};
use crate::make::Maker;
use crate::site::Site;
use crate::treatment::{Format, Treatment};
use candle_core::{DType, Device};
use causal_lm::{Arithmetic, Decoder, Execution, LinearName, Model, Progress, Windows};
use half::f16;
use lowrank_eora::compress::{BlockTypes, Compressor};
use packed::{
    Activations, BlockType, Context, GroupBits, GroupParts, Groups, Linear, LowRank, Matrix,
    QuantRows,
};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tensor_io::atomic::{read_sealed_json, write_sealed_json};

/// Measurements of each product, of which the middle one counts.
const ROUNDS: usize = 9;
/// Bytes that are read between two products at most: several times the caches of a processor.
const FLUSH: usize = 64 << 20;
/// Tokens that the dense model decodes, and those before them.
const DECODED: usize = 24;
const PROMPT: usize = 8;

/// Measures products, or finds them in the table.
pub(crate) struct Timer<'a> {
    maker: &'a Maker<'a>,
    /// Seconds by what was multiplied.
    known: BTreeMap<String, f64>,
    path: PathBuf,
    /// Read between two products.
    flush: Vec<u64>,
}

/// A matrix by its shape and format.
type Stored = ([usize; 2], Format);

impl<'a> Timer<'a> {
    /// With the table in `dir` of this number of threads.
    pub(crate) fn new(maker: &'a Maker<'a>, dir: &Path) -> Result<Self> {
        let threads = Context::new(Activations::F32).team.threads();
        let path = dir.join(format!("seconds-{threads}.json"));
        let bytes = maker.decoder.checkpoint().total_bytes() as usize;
        Ok(Self {
            maker,
            known: read_sealed_json(&path)?.unwrap_or_default(),
            path,
            flush: vec![1; bytes.min(FLUSH) / 8],
        })
    }

    /// Seconds that the matrices of a treatment take.
    pub(crate) fn seconds(&mut self, site: Site, treatment: Treatment) -> Result<f64> {
        let mut sum = 0.0;
        for matrices in self.products(site, treatment)? {
            let (rank, dtype) = (treatment.rank, self.dtype(site)?);
            let name = |(shape, format): &Stored| format!("{shape:?} {format}");
            let names: Vec<String> = matrices.iter().map(name).collect();
            let key = format!("{} r{rank} {dtype:?}", names.join(", "));
            let seconds = match self.known.get(&key) {
                Some(&seconds) => seconds,
                None => {
                    let linears = matrices
                        .iter()
                        .map(|&(shape, format)| linear(shape, format, rank, dtype));
                    let linears: Vec<Linear> = linears.collect::<Result<_>>()?;
                    let seconds = self.time(&linears)?;
                    self.known.insert(key, seconds);
                    seconds
                }
            };
            sum += seconds;
        }
        Ok(sum)
    }

    /// Keeps the table.
    pub(crate) fn save(&self) -> Result<()> {
        Ok(write_sealed_json(&self.path, &self.known)?)
    }

    /// Shapes and formats of a site's matrices, those with one input together. Rows of an embedding that is no head are looked
    /// up.
    fn products(&self, site: Site, treatment: Treatment) -> Result<Vec<Vec<Stored>>> {
        let decoder = self.maker.decoder;
        let Treatment { width, format, .. } = treatment;
        if let Some(name) = site.matrix(decoder) {
            if site == Site::Embedding && !decoder.config().tied {
                return Ok(Vec::new());
            }
            let info = decoder.checkpoint().info(&name)?;
            return Ok(match info.shape.as_slice() {
                &[rows, cols] => vec![vec![([rows, cols], format)]],
                _ => Vec::new(),
            });
        }
        if let Site::Experts(layer) = site {
            // A token goes through some of them, one after the other.
            let (hidden, chosen) = (decoder.config().hidden, self.maker.mixture(layer)?.chosen);
            let of = |shape: [usize; 2]| (shape, format);
            let expert = [vec![of([width, hidden]); 2], vec![of([hidden, width])]];
            return Ok(vec![expert; chosen].concat());
        }
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for &(id, shape) in self.maker.shapes(site, width)?.iter() {
            let of = (shape, self.maker.format_of(id, format));
            match id.module().is_output() {
                true => outputs.push(of),
                false => inputs.push(of),
            }
        }
        Ok(vec![inputs, outputs])
    }

    /// The dtype of the weights of a site in the checkpoint.
    fn dtype(&self, site: Site) -> Result<DType> {
        let decoder = self.maker.decoder;
        if let Site::Experts(layer) = site {
            return self.maker.expert_dtype(layer, 0, LinearName::Up);
        }
        let linear = || site.linears(decoder).first().map(|(_, id, _)| id.weight());
        let name = site.matrix(decoder).or_else(linear).unwrap_or_default();
        let info = decoder.checkpoint().info(&name)?;
        Ok(info.candle_dtype().unwrap_or(DType::F32))
    }

    /// The middle of some measurements of a product of one token.
    fn time(&self, linears: &[Linear]) -> Result<f64> {
        let cols = linears.first().map_or(0, Linear::cols);
        let x: Vec<f32> = (0..cols).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
        let mut outputs: Vec<Vec<f32>> = linears.iter().map(|l| vec![0.0; l.rows()]).collect();
        let layers: Vec<&Linear> = linears.iter().collect();
        let context = Context::new(Activations::F32);
        let mut rounds = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            black_box(self.flush.iter().fold(0u64, |sum, &word| sum ^ word));
            let mut y: Vec<&mut [f32]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
            let start = Instant::now();
            packed::forward(&layers, black_box(&x), &mut y, &context).map_err(products)?;
            rounds.push(start.elapsed().as_secs_f64());
        }
        rounds.sort_by(f64::total_cmp);
        Ok(rounds[ROUNDS / 2])
    }

    /// Seconds that decoding a token of the dense model takes beyond `matrices`, on the first of `windows`.
    pub(crate) fn rest(
        &mut self,
        windows: &Windows,
        matrices: f64,
        progress: &dyn Progress,
    ) -> Result<f64> {
        const KEY: &str = "the dense model";
        progress.begin("decoding the dense model", 1);
        let whole = match self.known.get(KEY) {
            Some(&whole) => whole,
            None => {
                let checkpoint = self.maker.decoder.checkpoint();
                let decoder = Decoder::new(checkpoint, DType::F32, &Device::Cpu)?;
                let whole = decoded(&decoder.packed(Execution::new(Arithmetic::F32)), windows)?;
                self.known.insert(KEY.into(), whole);
                whole
            }
        };
        progress.advance(1)?;
        Ok((whole - matrices).max(0.0))
    }
}

/// The middle of the seconds that single tokens take.
fn decoded(decoder: &Decoder<'_>, windows: &Windows) -> Result<f64> {
    let model = Model::load(decoder)?;
    let mut cache = model.full_cache(1)?;
    let tokens: Vec<u32> = windows.iter().flatten().copied().collect();
    let len = windows.window_len();
    let prompt = PROMPT.min(len.saturating_sub(1)).max(1);
    model.forward(&[&tokens[..prompt]], &mut cache)?;
    let mut seconds = Vec::new();
    for token in &tokens[prompt..(prompt + DECODED).min(tokens.len())] {
        let start = Instant::now();
        model.forward(&[&[*token]], &mut cache)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds.get(seconds.len() / 2).copied().unwrap_or(0.0))
}

fn products(source: packed::Error) -> Error {
    lowrank_eora::Error::from(source).into()
}

/// A matrix of zeros as it is stored: only its shape and format decide what a product takes.
fn linear([rows, cols]: [usize; 2], format: Format, rank: usize, dtype: DType) -> Result<Linear> {
    let matrix = match format.compressor() {
        None => blocks(stored_type(dtype), [rows, cols])?,
        Some(compressor) => quantised(&compressor, [rows, cols])?,
    };
    let linear = Linear::from(matrix);
    let rank = rank.min(rows).min(cols);
    if rank == 0 {
        return Ok(linear);
    }
    let factor = |rows, cols| {
        let bytes = Arc::new(vec![0u8; 4 * rows * cols]);
        Matrix::dense(BlockType::F32, rows, cols, bytes).map_err(products)
    };
    let low_rank = LowRank::new(&factor(rank, cols)?, &factor(rows, rank)?, 1.0);
    let linear = linear.with_low_rank(low_rank.map_err(products)?);
    linear.map_err(products)
}

fn blocks(ty: BlockType, [rows, cols]: [usize; 2]) -> Result<Matrix> {
    let bytes = rows * ty.row_bytes(cols).map_err(products)?;
    let rows = QuantRows::new(ty, rows, cols, vec![0; bytes]).map_err(products)?;
    Matrix::from_rows(&rows).map_err(products)
}

fn quantised(compressor: &Compressor, [rows, cols]: [usize; 2]) -> Result<Matrix> {
    if let Some(blocks_of) = compressor.blocks
        && let BlockTypes::One(ty) = blocks_of.types
    {
        return blocks(ty.for_rows(cols), [rows, cols]);
    }
    let grid = compressor.quantise.map(|quantise| quantise.grid);
    let known = grid.and_then(|grid| {
        let bits = GroupBits::new(u32::try_from(grid.bits.get()).ok()?)?;
        Some((bits, grid.group.width(cols)))
    });
    let Some((bits, width)) = known else {
        // What has no kernel is multiplied as floats.
        return blocks(BlockType::F32, [rows, cols]);
    };
    let groups = rows * cols.div_ceil(width);
    let groups = Groups::new(GroupParts {
        bits,
        rows,
        cols,
        width,
        codes: vec![0; rows * cols],
        scales: vec![f16::ONE; groups],
        zeros: Some(vec![0; groups]),
        group_index: None,
    });
    Ok(Matrix::from_groups(&groups.map_err(products)?))
}
