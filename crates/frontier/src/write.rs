//! From a plan to files that a runtime loads.
//!
//! ```text
//! DIR/model/          folder for causal-lm and vLLM       DIR/model.gguf     file for llama.cpp
//! DIR/adapter/        PEFT adapter, where there are ranks DIR/adapter.gguf   LoRA, where there are ranks
//! DIR/plan.json       the plan
//! DIR/cache.json      caches of all layers, as a configuration of kv-lazy, where they are chosen
//! ```
//!
//! The folder appears under its name when it is complete.

use crate::bytes::precision;
use crate::driver::Frontier;
use crate::error::{Error, Result};
use crate::plan::{Plan, SitePlan};
use crate::site::Site;
use crate::target::Target;
use candle_core::DType;
use causal_lm::{Decoder, Progress};
use lowrank_eora::output::{
    Adapter, AdapterOptions, AdapterRanks, CheckpointOptions, GgufAdapterOptions, GgufModelOptions,
    Layout, Weights, check_layout, gptq, write_checkpoint, write_gguf,
};
use lowrank_eora::repair::{Repaired, RepairedLayer};
use prune_structured::Settings;
use prune_structured::experts::{self, ExpertRefits, ExpertSettings};
use prune_structured::gguf::{self, Precision};
use std::path::{Path, PathBuf};
use tensor_io::atomic::Overwrite;
use tensor_io::gguf::Gguf;
use tensor_io::{Checkpoint, NoProgress, PendingFolder};

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The folder or file of the model.
    pub model: PathBuf,
    /// The adapter beside it, where the plan has ranks.
    pub adapter: Option<PathBuf>,
    /// Bytes of all files of weights.
    pub bytes: u64,
}

/// Names of the model, and of the adapter where there is one, in the folder of both.
type Names = (&'static str, Option<&'static str>);

impl Written {
    fn new(dir: &Path, (model, adapter): Names, bytes: u64) -> Self {
        Self {
            model: dir.join(model),
            adapter: adapter.map(|adapter| dir.join(adapter)),
            bytes,
        }
    }

    /// Opens what was written, with the adapter.
    ///
    /// # Errors
    /// What opening reports.
    pub fn open(&self) -> Result<Checkpoint> {
        Ok(match &self.adapter {
            None => causal_lm::open(&self.model)?,
            Some(adapter) => causal_lm::open_adapted(&self.model, adapter)?,
        })
    }
}

/// How compressed weights become the files of a runtime.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The runtime.
    pub target: Target,
    /// What a GGUF file stores the tensors as that were not compressed.
    pub rest: Precision,
    /// A folder for what is needed while writing.
    pub scratch: &'a Path,
}

impl Files<'_> {
    /// Writes what `repaired` made of the linears of `decoder` into the new folder `dst`. A step of `progress` is a block.
    ///
    /// # Errors
    /// What the runtime cannot store, and what reading and writing report, among it that `dst` exists. A failed run leaves
    /// nothing under `dst`.
    pub fn write(
        &self,
        decoder: &Decoder<'_>,
        repaired: &Repaired,
        dst: impl AsRef<Path>,
        progress: &dyn Progress,
    ) -> Result<Written> {
        let folder = PendingFolder::create(dst, Overwrite::Never)?;
        let names = self.write_into(decoder, repaired, folder.path(), progress)?;
        let bytes = weights_of(folder.path(), names)?;
        Ok(Written::new(&folder.persist()?, names, bytes))
    }

    /// The same into a folder that exists; names of model and adapter in it.
    fn write_into(
        &self,
        decoder: &Decoder<'_>,
        repaired: &Repaired,
        dir: &Path,
        progress: &dyn Progress,
    ) -> Result<Names> {
        let corrected = repaired.reports().any(|report| report.rank > 0);
        match self.target {
            Target::Gguf => {
                let path = self.scratch.join("template.gguf");
                gguf::export(decoder, self.rest, &path, &NoProgress)?;
                let template = Gguf::open(&path)?;
                let options = GgufModelOptions::new(Weights::Compressed, &template);
                write_gguf(
                    decoder,
                    repaired,
                    &options,
                    dir.join("model.gguf"),
                    progress,
                )?;
                if !corrected {
                    return Ok(("model.gguf", None));
                }
                let options = GgufAdapterOptions::of_base(&template)?;
                Adapter::write_gguf(repaired, decoder, &options, dir.join("adapter.gguf"))?;
                Ok(("model.gguf", Some("adapter.gguf")))
            }
            target => {
                let version = match target {
                    Target::Vllm => gptq::Version::V1,
                    _ => gptq::Version::V2,
                };
                let gptq = Layout::Gptq { version };
                // GPTQ packs whole words of outputs; here either form is multiplied with as it is stored.
                let fits = |layout| {
                    let compressor = repaired.compressor();
                    compressor.is_none_or(|one| check_layout(decoder, &one, layout).is_ok())
                };
                let layout = match target {
                    Target::Here if !fits(gptq) => Layout::CompressedTensors,
                    _ => gptq,
                };
                let options = CheckpointOptions::new(Weights::Compressed, layout);
                write_checkpoint(decoder, repaired, dir.join("model"), &options, progress)?;
                if !corrected {
                    return Ok(("model", None));
                }
                let ranks = match target {
                    Target::Vllm => AdapterRanks::Uniform,
                    _ => AdapterRanks::Mixed,
                };
                let options = AdapterOptions::new("../model").with_ranks(ranks);
                Adapter::write(repaired, &options, dir.join("adapter"))?;
                Ok(("model", Some("adapter")))
            }
        }
    }
}

const PLAN: &str = "plan.json";
const CACHE: &str = "cache.json";

impl Frontier<'_> {
    /// Writes what a plan describes into the new folder `dst`; a step of `progress` is a block.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`] for a plan of another model or target, [`Error::Larger`] where the files take more than the
    /// plan says, and what writing reports, among it that `dst` exists. A failed run leaves nothing under `dst`.
    pub fn write(
        &self,
        plan: &Plan,
        dst: impl AsRef<Path>,
        progress: &dyn Progress,
    ) -> Result<Written> {
        self.check_plan(plan)?;
        let folder = PendingFolder::create(dst, Overwrite::Never)?;
        let scratch = folder.path().join("scratch");
        std::fs::create_dir_all(&scratch).map_err(tensor_io::Error::io("create", &scratch))?;
        let names = self.write_into(plan, folder.path(), &scratch, progress)?;
        std::fs::remove_dir_all(&scratch).map_err(tensor_io::Error::io("remove", &scratch))?;
        let json = |value: serde_json::Result<Vec<u8>>| {
            value.map_err(|error| Error::PlanMismatch(error.to_string()))
        };
        folder.write(PLAN, &json(serde_json::to_vec_pretty(plan))?)?;
        if let Some(cache) = &plan.cache {
            folder.write(CACHE, &json(serde_json::to_vec_pretty(cache))?)?;
        }
        let bytes = weights_of(folder.path(), names)?;
        if bytes > plan.weight_bytes {
            return Err(Error::Larger {
                path: folder.destination().to_owned(),
                written: bytes,
                planned: plan.weight_bytes,
            });
        }
        Ok(Written::new(&folder.persist()?, names, bytes))
    }

    /// The files in `dst` if a run that was stopped finished them for this very plan; `None` where `dst` does not exist.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`] where the folder holds something else.
    pub fn written(&self, plan: &Plan, dst: impl AsRef<Path>) -> Result<Option<Written>> {
        let dst = dst.as_ref();
        if !dst.exists() {
            return Ok(None);
        }
        let path = dst.join(PLAN);
        let expected = serde_json::to_value(plan).ok();
        let found: Option<serde_json::Value> = tensor_io::atomic::read_json(&path)?;
        if found.is_none() || found != expected {
            let path = path.display();
            return Err(Error::PlanMismatch(format!("{path} is not this plan")));
        }
        let exists = |name: &&'static str| dst.join(name).exists();
        let model = ["model", "model.gguf"].into_iter().find(exists);
        let Some(model) = model else {
            let dst = dst.display();
            return Err(Error::PlanMismatch(format!("{dst} holds no model")));
        };
        let names = (model, ["adapter", "adapter.gguf"].into_iter().find(exists));
        Ok(Some(Written::new(dst, names, weights_of(dst, names)?)))
    }

    /// A plan must be one for this model and target, of treatments that were considered.
    fn check_plan(&self, plan: &Plan) -> Result<()> {
        let mismatch = |reason: String| Err(Error::PlanMismatch(reason));
        if plan.target != self.options.target {
            return mismatch(format!(
                "it is for {}, not {}",
                plan.target, self.options.target
            ));
        }
        if plan.sites.len() != self.menus.len() {
            return mismatch(format!(
                "{} sites, expected {}",
                plan.sites.len(),
                self.menus.len()
            ));
        }
        for (planned, menu) in plan.sites.iter().zip(&self.menus) {
            if planned.site != menu.site || menu.position(planned.treatment).is_none() {
                return mismatch(format!("{}: {}", planned.site, planned.treatment));
            }
        }
        Ok(())
    }

    /// Names of model and adapter within `dir`.
    fn write_into(
        &self,
        plan: &Plan,
        dir: &Path,
        scratch: &Path,
        progress: &dyn Progress,
    ) -> Result<Names> {
        let widths: Vec<(Site, usize)> = plan
            .sites
            .iter()
            .map(|site| (site.site, site.treatment.width))
            .collect();
        let pruned = self.maker.plan(&widths)?;
        let narrow;
        let narrowed;
        let decoder = match pruned.is_identity(self.decoder) {
            true => self.decoder,
            false => {
                let path = scratch.join("pruned");
                let settings = Settings::new(&self.maker.calibration);
                prune_structured::write(self.decoder, &pruned, &path, &settings, &NoProgress)?;
                narrow = causal_lm::open(&path)?;
                narrowed = Decoder::new(&narrow, DType::F32, self.decoder.device())?;
                &narrowed
            }
        };
        let moved;
        let placed;
        let refits = ExpertRefits::new(scratch);
        let decoder = match self.maker.expert_plan(&plan.sites, &refits)? {
            None => decoder,
            Some((experts, layout)) => {
                let path = scratch.join("experts");
                let settings = ExpertSettings::default();
                let settings = settings.refits(Some(&refits)).layout(Some(layout));
                experts::write(decoder, &experts, &path, &settings, &NoProgress)?;
                moved = causal_lm::open(&path)?;
                placed = Decoder::new(&moved, DType::F32, self.decoder.device())?;
                &placed
            }
        };
        let whole = plan.is_dense() && plan.weight_bytes >= self.dense_weight_bytes();
        if whole && self.options.target != Target::Gguf {
            let settings = Settings::new(&self.maker.calibration);
            prune_structured::write(decoder, &pruned, dir.join("model"), &settings, progress)?;
            return Ok(("model", None));
        }
        let repaired = self.assemble(plan, decoder, &scratch.join("linears"))?;
        let files = Files {
            target: self.options.target,
            rest: precision(self.decoder)?,
            scratch,
        };
        files.write_into(decoder, &repaired, dir, progress)
    }

    /// The linears of a plan in their stored form.
    fn assemble(&self, plan: &Plan, decoder: &Decoder<'_>, folder: &Path) -> Result<Repaired> {
        let matrix = |site: &SitePlan| {
            let name = site.site.matrix(self.decoder)?;
            let module = name.strip_suffix(".weight").unwrap_or(&name).to_string();
            let stored = self.maker.matrix(site.site, site.treatment).transpose()?;
            Some(stored.map(|stored| (module, stored)))
        };
        let matrices = plan.sites.iter().filter_map(matrix);
        let others = matrices.chain(self.maker.quantised_experts(&plan.sites));
        let block = |layer: usize| -> Result<Vec<RepairedLayer>> {
            let mut layers = Vec::new();
            for site in &plan.sites {
                let experts = matches!(site.site, Site::Experts(_));
                if !experts && site.site.half().is_some_and(|(of, _)| of == layer) {
                    layers.extend(self.maker.layers(decoder, site.site, site.treatment)?);
                }
            }
            Ok(layers)
        };
        let blocks = (0..self.decoder.config().layers()).map(block);
        Repaired::assemble(folder, decoder, blocks, others)
    }
}

/// Bytes of the weights of a model and its adapter.
fn weights_of(dir: &Path, (model, adapter): Names) -> Result<u64> {
    let mut bytes = weights_in(&dir.join(model))?;
    if let Some(adapter) = adapter {
        bytes += weights_in(&dir.join(adapter))?;
    }
    Ok(bytes)
}

/// Bytes of the weights in a file or folder: of safetensors and GGUF files.
fn weights_in(path: &Path) -> Result<u64> {
    let size = |path: &Path| -> Result<u64> {
        let metadata = path
            .metadata()
            .map_err(tensor_io::Error::io("read", path))?;
        Ok(metadata.len())
    };
    if path.is_file() {
        return size(path);
    }
    let mut sum = 0;
    for entry in std::fs::read_dir(path).map_err(tensor_io::Error::io("read", path))? {
        let path = entry.map_err(tensor_io::Error::io("read", path))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            sum += size(&path)?;
        }
    }
    Ok(sum)
}
