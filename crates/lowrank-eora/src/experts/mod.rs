//! Compressing and repairing the experts of a mixture, one expert in memory at a time.
//!
//! A token counts by the square of its gate, because that is what an expert's error is multiplied by on the way to the
//! layer's output. Most experts see few tokens, so that H is drawn towards that of a pool,
//!
//! ```text
//! H̃ = (n_e H̄_e + n_0 H̄_pool) / (n_e + n_0),    n_e = (Σ g²)² / Σ g⁴
//! ```
//!
//! with means per unit of weight. The pool of gate and up is every token of the layer; that of down the same expert run on
//! the tokens that came closest to choosing it, for neurons of different experts have nothing in common. An expert without
//! tokens has the pool alone. The router, the expert that every token passes through, attention and norms stay as they are,
//! and each layer reads what the compressed layers before it put out. An expert that several router rows share has the tokens of
//! all of them, each with the sum of its gates.
//!
//! The result is W_c + B A merged, in the dense model's shapes and layout, which every runtime opens; or W_c, and B A
//! beside it as a PEFT adapter ([`ExpertRepair::adapter`]), and the merged model beside both ([`ExpertRepair::merged`]).

mod adapter;
mod grams;
mod owl;
mod sums;
mod write;

use crate::compress::{Compressor, Inputs, Needs, Storage, SweepReport};
use crate::matrix::{from_tensor, to_tensor};
use crate::repair::Damping;
use crate::solve::{LowRank, Options, Weighting, solve};
use crate::{Error, Result};
use adapter::ExpertAdapter;
use candle_core::{DType, Device, Tensor};
use causal_lm::block::Mlp;
use causal_lm::mixture::{ExpertInputs, Moe, Routing};
use causal_lm::names::ExpertLayout;
use causal_lm::{
    Decoder, Hidden, Linear, LinearName, NoTap, Routed, Site, Tap, TapResult, Windows,
};
use serde::Serialize;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use tensor_io::{Progress, WriteOptions, Written};
use write::Writer;

pub use grams::{ExpertGrams, GramOptions, LayerPool};
pub use owl::Owl;

/// Linears of an expert in the order in which they are stored.
const LINEARS: [LinearName; 3] = [LinearName::Gate, LinearName::Up, LinearName::Down];

/// How experts are compressed and repaired.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExpertRepair {
    /// How their weights are compressed.
    pub compressor: Compressor,
    /// Rank of the correction of each linear by EoRA; 0 for none.
    pub rank: usize,
    /// Whether tokens count by the square of their gates.
    pub gate_weight: bool,
    /// Tokens of the pool of an expert's down projection.
    pub pool_tokens: usize,
    /// Weight of the pool, in tokens; `None` for a quarter of the width of the input.
    pub prior: Option<f64>,
    /// Where B A goes as a PEFT adapter, with W_c as the model; `None` to merge them. Applications that do not know the form
    /// of PEFT 0.19 ignore it in silence: merged weights are safer.
    pub adapter: Option<PathBuf>,
    /// Where W_c + B A goes as a model of its own, beside W_c and an adapter.
    pub merged: Option<PathBuf>,
    /// How experts are stored; as they were unless this says otherwise.
    pub layout: Option<ExpertLayout>,
    /// How much of each layer is pruned, for compressors that prune a share of the weights; `None` for the same of all.
    pub owl: Option<Owl>,
    /// Shards and overwriting.
    pub files: WriteOptions,
}

impl ExpertRepair {
    /// Compression without a correction.
    pub fn new(compressor: Compressor) -> Self {
        Self {
            compressor,
            rank: 0,
            gate_weight: true,
            pool_tokens: 1024,
            prior: None,
            adapter: None,
            merged: None,
            layout: None,
            owl: None,
            files: WriteOptions::default(),
        }
    }

    /// The same with a correction of this rank.
    pub fn rank(self, rank: usize) -> Self {
        Self { rank, ..self }
    }

    /// The same with another weight of the pool.
    pub fn prior(self, prior: Option<f64>) -> Self {
        Self { prior, ..self }
    }

    /// The same with tokens and pools that count in this way.
    pub fn grams(self, grams: GramOptions) -> Self {
        Self {
            gate_weight: grams.gate_weight,
            pool_tokens: grams.pool_tokens,
            prior: grams.prior,
            ..self
        }
    }

    /// The same with B A in a folder of their own.
    pub fn adapter(self, adapter: Option<PathBuf>) -> Self {
        Self { adapter, ..self }
    }

    /// The same with W_c + B A in a folder of its own, beside W_c and an adapter.
    pub fn merged(self, merged: Option<PathBuf>) -> Self {
        Self { merged, ..self }
    }

    /// The same with experts stored in this way.
    pub fn layout(self, layout: Option<ExpertLayout>) -> Self {
        Self { layout, ..self }
    }

    /// The same with shares of pruned weights by layer.
    pub fn owl(self, owl: Option<Owl>) -> Self {
        Self { owl, ..self }
    }

    /// The same with other files.
    pub fn files(self, files: WriteOptions) -> Self {
        Self { files, ..self }
    }

    /// Refuses what cannot be done to this model, before anything is computed: a model without experts, a weight of the pool
    /// or a number of its tokens that is out of range, a layout that the architecture does not have, an adapter that PEFT
    /// would not apply, a compressor without a share for OWL to divide.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self, decoder: &Decoder<'_>) -> Result<()> {
        let config = decoder.config();
        let refuse = |name, value: String, expected| {
            Err(Error::Setting {
                name,
                value,
                expected,
            })
        };
        if config.mixtures.iter().all(Option::is_none) {
            return refuse("model", config.model_type.into(), "a mixture of experts");
        }
        if self.pool_tokens == 0 {
            return refuse("tokens of the pool", "0".into(), "at least 1");
        }
        if let Some(prior) = self
            .prior
            .filter(|prior| !(0.0..f64::INFINITY).contains(prior))
        {
            let expected = "a finite number of tokens, at least 0";
            return refuse("weight of the pool", prior.to_string(), expected);
        }
        if let Some(owl) = self.owl {
            owl.check(&self.compressor)?;
        }
        if self.merged.is_some() && self.adapter.is_none() {
            let expected = "an adapter beside which there is something to merge";
            return refuse("merged model", "no adapter".into(), expected);
        }
        if self.adapter.is_some() {
            ExpertAdapter::check(decoder, self.rank)?;
        }
        write::target(decoder, self.layout).map(drop)
    }
}

/// What became of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ExpertReport {
    /// Its layer.
    pub layer: usize,
    /// Its number.
    pub expert: usize,
    /// Tokens that chose it.
    pub tokens: usize,
    /// Tokens of equal gates that say as much.
    pub effective: f64,
    /// Share of the pool in the H of its down projection.
    pub pool: f64,
    /// Σ‖W X‖² over its three linears, in H̃.
    pub energy: f64,
    /// Σ‖(W − W_c) X‖².
    pub compressed: f64,
    /// Σ‖(W − W_c − B A) X‖².
    pub repaired: f64,
}

/// A mixture whose experts are compressed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RepairedExperts {
    /// The checkpoint.
    pub written: Written,
    /// Bytes of the experts in the form that the compressor is for, factors in 16 bits included.
    pub expert_bytes: u64,
    /// Bytes of the dense experts as stored.
    pub expert_bytes_dense: u64,
    /// Each expert.
    pub experts: Vec<ExpertReport>,
    /// Share of the choices of tokens that differ from the dense model's.
    pub rerouted: f64,
    /// Linears of all experts.
    pub linears: usize,
    /// The damping that SparseGPT or GPTQ ended with; `None` where nothing swept.
    pub damping: Option<Damping>,
}

impl RepairedExperts {
    /// `sqrt(Σ‖(W − W_c − B A) X‖² / Σ‖W X‖²)` over all experts, on the windows that they were fitted to.
    pub fn loss(&self) -> f64 {
        self.relative(|expert| expert.repaired)
    }

    /// `sqrt(Σ‖(W − W_c) X‖² / Σ‖W X‖²)`, the same without the corrections.
    pub fn loss_compressed(&self) -> f64 {
        self.relative(|expert| expert.compressed)
    }

    fn relative(&self, of: fn(&ExpertReport) -> f64) -> f64 {
        let sum = |of: fn(&ExpertReport) -> f64| self.experts.iter().map(of).sum::<f64>();
        let energy = sum(|expert| expert.energy);
        match energy > 0.0 {
            true => (sum(of) / energy).sqrt(),
            false => 0.0,
        }
    }
}

/// Compresses and repairs all experts of `decoder` on what it makes of `windows`, and writes the model to `dst`; a step of
/// `progress` is an expert.
///
/// # Errors
/// [`Error::Setting`] for what [`ExpertRepair::check`] refuses, [`Error::Layer`] with the linear where a compressor or rank does not fit
/// or a weight is not finite, [`Error::Cancelled`], and what running the model and writing report. A failed run leaves
/// nothing under `dst`.
pub fn repair_experts(
    decoder: &Decoder<'_>,
    windows: &Windows,
    options: &ExpertRepair,
    dst: impl AsRef<Path>,
    progress: &dyn Progress,
) -> Result<RepairedExperts> {
    options.check(decoder)?;
    let mixtures = &decoder.config().mixtures;
    let count: usize = mixtures
        .iter()
        .flatten()
        .map(|mixture| mixture.experts)
        .sum();
    let adapter = options
        .adapter
        .as_ref()
        .map(|folder| ExpertAdapter::new(decoder, folder, options.rank, options.files.overwrite))
        .transpose()?;
    let compressors = match options.owl {
        None => vec![Some(options.compressor); mixtures.len()],
        Some(owl) => owl.compressors(decoder, windows, options, progress)?,
    };
    progress.begin("experts", count as u64);
    let writer = |dst: &Path| Writer::create(decoder, dst, options.layout, &options.files);
    let mut run = Run {
        compressors,
        adapter,
        decoder,
        options,
        progress,
        writer: writer(dst.as_ref())?,
        merged: options.merged.as_deref().map(writer).transpose()?,
        expert_bytes: 0,
        linears: 0,
        sweeps: vec![],
        reports: vec![],
    };
    let mut hidden = Hidden::embed(decoder, windows)?;
    let mut dense = hidden.clone();
    let (mut choices, mut other) = (0, 0);
    for (layer, mixture) in mixtures.iter().enumerate() {
        if mixture.is_none() {
            hidden.advance_stored(decoder, layer, &mut NoTap)?;
            dense.advance_stored(decoder, layer, &mut NoTap)?;
            continue;
        }
        let mut reference = ExpertInputs::default();
        dense.advance_stored(decoder, layer, &mut reference)?;
        let seen = run.layer(layer, &mut hidden)?;
        for (a, b) in seen.routings.iter().zip(&reference.routings) {
            choices += a.ids.len();
            other += rerouted(a, b);
        }
    }
    let expert_bytes_dense = run.writer.expert_bytes();
    // Whatever can fail of the adapter does before the model that it belongs to is in its place.
    let adapter = run.adapter.map(|adapter| adapter.pending(dst.as_ref()));
    let adapter = adapter.transpose()?;
    if let Some(merged) = run.merged {
        merged.finish()?;
    }
    let written = run.writer.finish()?;
    if let Some(adapter) = adapter {
        adapter.persist()?;
    }
    Ok(RepairedExperts {
        written,
        expert_bytes: run.expert_bytes,
        expert_bytes_dense,
        experts: run.reports,
        rerouted: other as f64 / choices.max(1) as f64,
        linears: run.linears,
        damping: Damping::of(run.sweeps.into_iter()),
    })
}

/// Choices of tokens that another routing does not make.
fn rerouted(a: &Routing, b: &Routing) -> usize {
    let tokens = a.ids.chunks(a.chosen).zip(b.ids.chunks(b.chosen));
    let of_token = |(a, b): (&[u32], &[u32])| a.iter().filter(|id| !b.contains(id)).count();
    tokens.map(of_token).sum()
}

/// Keeps what a layer's experts read. Experts are compressed while the layer runs, so that it is shared.
#[derive(Default)]
struct Watch(RefCell<ExpertInputs>);

impl Tap for &Watch {
    fn observe(&mut self, _layer: usize, _site: Site, _x: &Tensor) -> TapResult {
        Ok(())
    }

    fn routed(&mut self, layer: usize, routed: &Routed<'_>) -> TapResult {
        self.0.borrow_mut().routed(layer, routed)
    }
}

struct Run<'a> {
    decoder: &'a Decoder<'a>,
    options: &'a ExpertRepair,
    progress: &'a dyn Progress,
    writer: Writer<'a>,
    /// Of W_c + B A, where it is written beside W_c.
    merged: Option<Writer<'a>>,
    /// Of each layer with experts.
    compressors: Vec<Option<Compressor>>,
    adapter: Option<ExpertAdapter>,
    expert_bytes: u64,
    linears: usize,
    sweeps: Vec<SweepReport>,
    reports: Vec<ExpertReport>,
}

impl Run<'_> {
    /// Compresses the experts of a layer and sends the windows through them.
    fn layer(&mut self, layer: usize, hidden: &mut Hidden) -> Result<ExpertInputs> {
        let decoder = self.decoder;
        let frame = decoder.frame(layer)?;
        let watch = Watch::default();
        let mut pool: Option<LayerPool> = None;
        let mut next = 0;
        let experts = frame.experts.as_ref().map_or(0, Moe::experts);
        // Experts that no token chose are not asked for: each is made with the next one that is.
        let mut up_to = |last: usize| -> Result<Option<Mlp>> {
            let mut made = None;
            while next <= last {
                let seen = watch.0.borrow();
                if pool.is_none() && self.needs_gram() {
                    pool = Some(LayerPool::of(&seen)?);
                }
                made = Some(self.expert((layer, next), &seen, pool.as_ref())?);
                next += 1;
            }
            Ok(made)
        };
        let mut expert = |id: usize| {
            let made = up_to(id).map_err(|source| causal_lm::Error::Tap {
                layer,
                source: Box::new(source),
            })?;
            made.ok_or(causal_lm::Error::Routing {
                chosen: id + 1,
                experts,
            })
        };
        hidden.advance_experts(&frame, &mut expert, &mut &watch)?;
        if let Some(last) = experts.checked_sub(1) {
            up_to(last)?;
        }
        decoder.release(layer);
        self.writer.end_layer()?;
        if let Some(merged) = &mut self.merged {
            merged.end_layer()?;
        }
        if let Some(adapter) = &mut self.adapter {
            adapter.end_layer(layer)?;
        }
        Ok(watch.0.into_inner())
    }

    fn needs_gram(&self) -> bool {
        self.options.rank > 0 || self.options.compressor.needs() != Needs::Nothing
    }

    /// Compresses and repairs one expert; gives it as it is stored.
    fn expert(
        &mut self,
        (layer, expert): (usize, usize),
        seen: &ExpertInputs,
        pool: Option<&LayerPool>,
    ) -> Result<Mlp> {
        let (decoder, options) = (self.decoder, self.options);
        let dense = decoder.expert(layer, expert)?;
        decoder.release_expert(layer, expert);
        let settings = GramOptions {
            gate_weight: options.gate_weight,
            pool_tokens: options.pool_tokens,
            prior: options.prior,
        };
        let of = |pool| ExpertGrams::of(&dense, (seen, expert), pool, &settings);
        let grams = pool.map(of).transpose()?;
        let mut report = ExpertReport {
            layer,
            expert,
            tokens: seen.tokens(expert, 0).0.len(),
            effective: grams.as_ref().map_or(0.0, |grams| grams.effective),
            pool: grams.as_ref().map_or(0.0, |grams| grams.pool),
            energy: 0.0,
            compressed: 0.0,
            repaired: 0.0,
        };
        let mut mlp = dense.clone();
        for name in LINEARS {
            let linear = match name {
                LinearName::Gate => mlp.gate.as_mut(),
                LinearName::Up => Some(&mut mlp.up),
                _ => Some(&mut mlp.down),
            };
            let Some(linear) = linear else { continue };
            let gram = grams.as_ref().map(|grams| grams.gram(name));
            let (compressed, factors) =
                self.linear(linear, (layer, gram), &mut report)
                    .map_err(|source| Error::Layer {
                        layer: format!("layer {layer}, expert {expert}, {name}"),
                        source: Box::new(source),
                    })?;
            match (&mut self.adapter, factors) {
                (Some(adapter), Some(factors)) => {
                    adapter.add(name, factors);
                    self.writer.add((layer, expert), name, &compressed)?;
                    if let Some(merged) = &mut self.merged {
                        merged.add((layer, expert), name, &linear.weight()?)?;
                    }
                }
                _ => self.writer.add((layer, expert), name, &linear.weight()?)?,
            }
        }
        self.reports.push(report);
        self.progress.advance(1)?;
        Ok(mlp)
    }

    /// Puts W_c + B A in place of a weight; W_c, and B and A where there are some.
    fn linear(
        &mut self,
        linear: &mut Linear,
        (layer, gram): (usize, Option<faer::MatRef<'_, f64>>),
        report: &mut ExpertReport,
    ) -> Result<(Tensor, Option<LowRank>)> {
        let (options, like) = (self.options, linear.weight()?);
        let weight = from_tensor(&like, "weight")?;
        let inputs = gram.map(Inputs::Gram);
        let compressor = self.compressors[layer].unwrap_or(options.compressor);
        let compressed = compressor.compress(weight.as_ref(), inputs)?;
        let width = like.dtype().size_in_bytes().min(2);
        let (rows, columns) = weight.shape();
        let bytes = compressed.storage(width).bytes() + 2 * options.rank * (rows + columns);
        self.expert_bytes += bytes as u64;
        self.linears += 1;
        self.sweeps.extend(compressed.sweep);
        let mut left = &weight - &compressed.weight;
        let stored = to_tensor(compressed.weight.as_ref(), like.dtype(), like.device())?;
        let (mut merged, mut factors) = (compressed.weight, None);
        let energy = |of: &faer::Mat<f64>| match gram {
            Some(gram) => Weighting::Gram(gram).energy(of.as_ref()),
            None => Weighting::Identity.energy(of.as_ref()),
        };
        report.energy += energy(&weight)?;
        report.compressed += energy(&left)?;
        if options.rank > 0 {
            let weighting = gram.map_or(Weighting::Identity, Weighting::Gram);
            let solution = solve(left.as_ref(), &weighting, options.rank, &Options::default())?;
            merged += solution.factors.product();
            left = solution.factors.error(left.as_ref());
            factors = Some(solution.factors);
        }
        report.repaired += energy(&left)?;
        linear.set_weight(to_tensor(merged.as_ref(), like.dtype(), like.device())?);
        Ok((stored, factors))
    }
}

/// Row-major f32 values on the CPU.
fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// What storing a compressed linear of an expert takes; `None` where the compressor does not fit the shape.
pub fn predicted_bytes(
    compressor: &Compressor,
    shape: (usize, usize),
    rank: usize,
) -> Option<usize> {
    let storage = Storage::predicted(compressor, shape, 2)?;
    Some(storage.bytes() + 2 * rank * (shape.0 + shape.1))
}
