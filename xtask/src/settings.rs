//! What all suites share.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use causal_lm::{Adapter, Arithmetic, Level, WeightSummary};
use clap::ValueEnum;
use eval_report::{Cells, Row, Section};
use tensor_io::Checkpoint;

/// Settings of a run, whatever is measured.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Window in tokens; each suite has a default.
    pub window: Option<usize>,
    /// Number of windows, sequences or questions to evaluate; each suite has a default.
    pub samples: Option<usize>,
    /// Seed of everything random.
    pub seed: u64,
    /// Where tensors are.
    pub device: Device,
    /// How the weights of models under evaluation are run.
    pub weights: Weights,
    /// Whether to show no progress.
    pub quiet: bool,
    /// Where finished cells are kept.
    pub cells: Cells,
}

impl Settings {
    /// Whether cells are left to other processes, so that there is no report yet.
    pub(crate) fn is_part(&self) -> bool {
        !self.cells.missing().is_empty()
    }

    /// The settings of one of several suites of a run, whose cells have names of their own.
    pub(crate) fn within(&self, suite: &str) -> Self {
        Self {
            cells: self.cells.within(suite),
            ..self.clone()
        }
    }

    /// Refuses a cell that an earlier run has finished where what that run wrote is gone: its row would be taken from the folder, and
    /// nothing written.
    pub(crate) fn written(&self, cell: &str, flag: &str, path: &Path) -> Result<()> {
        ensure!(
            !self.cells.found(cell) || path.exists(),
            "{flag}: {} is not there, and nothing would write it, since --cells has the row already; name another folder for --cells",
            path.display()
        );
        Ok(())
    }

    /// Sections that are measured together, as one cell; none where another process measures it.
    pub(crate) fn whole(
        &self,
        cell: &str,
        measure: impl FnOnce() -> Result<Vec<Section>>,
    ) -> Result<Vec<Section>> {
        Ok(self.cells.sections(cell, measure)?.unwrap_or_default())
    }
}

/// Each value of a flag may stand once: a repeated one would be computed and saved twice.
pub(crate) fn once<T: Display>(flag: &str, values: impl Iterator<Item = T>) -> Result<()> {
    let mut seen: Vec<String> = Vec::new();
    for value in values {
        let value = value.to_string();
        ensure!(!seen.contains(&value), "{flag}: {value} is given twice");
        seen.push(value);
    }
    Ok(())
}

/// Refuses to write to `path` where one of the `inputs`, each with its flag, lies: what the user gave would be gone.
pub(crate) fn spares(flag: &str, path: &Path, inputs: &[(&str, &Path)]) -> Result<()> {
    let Ok(path_there) = path.canonicalize() else {
        return Ok(());
    };
    for (input, given) in inputs {
        let Ok(there) = given.canonicalize() else {
            continue;
        };
        // A folder is replaced with the files of models in it.
        let is_in_it = there.is_file() && there.parent() == Some(&path_there);
        ensure!(
            there != path_there && !is_in_it,
            "{flag} {}: {input} {} lies there; name another folder",
            path.display(),
            given.display()
        );
    }
    Ok(())
}

/// An error and its causes on one line. A cause that ends the text before it is not repeated, nor is a path that the cause
/// begins with, and line breaks become spaces.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let one_line = |text: String| text.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let texts = error.chain().map(|cause| one_line(cause.to_string()));
    let texts: Vec<String> = texts.collect();
    let mut line = String::new();
    for (i, text) in texts.iter().enumerate() {
        let next = texts
            .get(i + 1)
            .and_then(|next| next.strip_prefix(text.as_str()));
        if next.is_some_and(|rest| rest.starts_with(['/', ':'])) {
            continue;
        }
        if !line.ends_with(text.as_str()) {
            if !line.is_empty() {
                line += ": ";
            }
            line += text;
        }
    }
    line
}

/// What a process has to show that measured some of the cells: those that failed.
pub(crate) fn part(failures: Vec<String>) -> Vec<Section> {
    vec![Section {
        failures,
        ..Section::default()
    }]
}

/// How the weights of a model under evaluation are run.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    /// The arithmetic of quantised weights.
    pub arithmetic: Arithmetic,
    /// A LoRA adapter beside the weights.
    pub adapter: Option<PathBuf>,
    /// Factor on what the adapter adds, beside its own.
    pub adapter_scale: Option<f32>,
}

impl Weights {
    /// Opens a model: a folder of floats, GPTQ or compressed-tensors, or a GGUF file; with the adapter.
    ///
    /// # Errors
    /// What cannot be read or does not go together, by file and tensor.
    pub(crate) fn open(&self, model: &Path) -> Result<Checkpoint> {
        let base = causal_lm::open(model)?;
        let Some(adapter) = &self.adapter else {
            return Ok(base);
        };
        let added = Adapter::open(adapter, &base)
            .and_then(|adapter| adapter.with_scale(self.adapter_scale.unwrap_or(1.0)))
            .and_then(|adapter| adapter.added_to(base));
        added.context("--adapter")
    }

    /// What a report remarks where the adapter names another model as its base than it is added to: only shapes are compared.
    pub(crate) fn other_base(&self, model: &Path) -> Option<String> {
        let adapter = self.adapter.as_deref()?;
        let base = Adapter::base_model(adapter).ok()??;
        let model_there = model.canonicalize().ok();
        let mut places = [adapter.join(&base), PathBuf::from(&base)].into_iter();
        let leads = places.any(|place| place.canonicalize().ok() == model_there);
        (model_there.is_none() || !leads).then(|| {
            format!(
                "--adapter {} names {base} as the model that its factors were fitted to, which does not lead to {}; that these are the \
                 same weights was not checked.",
                adapter.display(),
                model.display()
            )
        })
    }

    /// The name of the arithmetic on the command line and in reports.
    pub(crate) fn arithmetic_name(&self) -> &'static str {
        match self.arithmetic {
            Arithmetic::F32 => "f32",
            Arithmetic::Int8 => "int8",
            Arithmetic::Bf16 => "bf16",
        }
    }

    /// The name of the arithmetic that a model of these weights runs in: floats are multiplied in f32 whatever was asked for, unless they are
    /// multiplied as they are stored and in bf16.
    pub(crate) fn ran(&self, weights: &WeightSummary) -> &'static str {
        let applies = match self.arithmetic {
            Arithmetic::F32 => true,
            Arithmetic::Int8 => weights.quantised() > 0,
            Arithmetic::Bf16 => !weights.packed.is_empty(),
        };
        match applies {
            true => self.arithmetic_name(),
            false => "f32",
        }
    }

    /// How a model runs, in words.
    pub(crate) fn run(&self, weights: &WeightSummary) -> String {
        format!(
            "{} arithmetic on {}",
            self.ran(weights),
            Level::detected().name()
        )
    }

    /// `section` with what its numbers depend on, the model's weights where it is of one model.
    pub(crate) fn facts(&self, section: Section, weights: Option<&WeightSummary>) -> Section {
        let section = match weights {
            Some(weights) => section
                .fact("arithmetic", self.ran(weights))
                .fact("linears", weights.to_string()),
            None => section.fact("arithmetic", self.arithmetic_name()),
        };
        let section = section.fact("instructions", Level::detected().name());
        let section = match &self.adapter {
            Some(adapter) => section.fact(
                "adapter",
                adapter
                    .file_name()
                    .unwrap_or(adapter.as_os_str())
                    .to_string_lossy(),
            ),
            None => section,
        };
        match self.adapter_scale {
            Some(scale) => section.fact("adapter scale", scale),
            None => section,
        }
    }

    /// Fills in the bytes that the weights take in memory, and how they are multiplied.
    pub(crate) fn fill(&self, row: &mut Row, weights: &WeightSummary) {
        row.extra
            .insert("weight_bytes".into(), weights.bytes.into());
        row.extra
            .insert("arithmetic".into(), self.ran(weights).into());
        row.extra
            .insert("linears".into(), weights.to_string().into());
    }
}

/// Where tensors are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// Processor
    #[default]
    Cpu,
    /// NVIDIA GPU; needs a build with the feature `cuda`
    Cuda,
    /// Apple GPU; needs a build with the feature `metal`
    Metal,
}

impl Device {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
            Device::Metal => "metal",
        }
    }

    /// The first device of this kind.
    ///
    /// # Errors
    /// No such device, or a program built without the feature of the same name.
    pub fn open(self) -> Result<candle_core::Device> {
        match self {
            Device::Cpu => Ok(candle_core::Device::Cpu),
            Device::Cuda => candle_core::Device::new_cuda(0),
            Device::Metal => candle_core::Device::new_metal(0),
        }
        .with_context(|| {
            format!(
                "--device {0}: needs the hardware and a build with --features {0}",
                self.name()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_without_repetition() {
        let cause = std::io::Error::other("no\nspace");
        let error = anyhow::Error::new(cause)
            .context("cannot write x: no space")
            .context("flap");
        assert_eq!(one_line(&error), "flap: cannot write x: no space");
        let error = anyhow::anyhow!("a/m/config.json: no vocab_size").context("a/m");
        assert_eq!(one_line(&error), "a/m/config.json: no vocab_size");
        let error = anyhow::anyhow!("a/mini: odd").context("a/m");
        assert_eq!(one_line(&error), "a/m: a/mini: odd");
    }

    #[cfg(unix)]
    #[test]
    fn nothing_is_written_to_where_an_input_lies_whatever_its_path_is_called() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(path("model/inner")).unwrap();
        std::fs::write(path("model/model.gguf"), "").unwrap();
        std::os::unix::fs::symlink(path("model"), path("link")).unwrap();
        let refused = |to: &str, input: &str| {
            let refused = spares("--save", &path(to), &[("--model", &path(input))]);
            refused.err().map(|error| error.to_string())
        };
        for (to, input) in [
            ("model", "model"),
            ("model/../model", "link"),
            ("link", "model"),
            ("model", "model/model.gguf"),
            ("model/model.gguf", "link/model.gguf"),
        ] {
            let error = refused(to, input).unwrap();
            assert!(
                error.contains("--save") && error.contains("--model"),
                "{error}"
            );
        }
        // What replaces a checkpoint leaves folders in it.
        for (to, input) in [
            ("model", "model/inner"),
            ("new", "model"),
            ("model", "none"),
        ] {
            assert_eq!(refused(to, input), None, "{to} {input}");
        }
    }

    #[test]
    fn an_adapter_of_another_model_is_remarked() {
        let dir = tempfile::tempdir().unwrap();
        let adapter = dir.path().join("adapter");
        for name in ["adapter", "model", "other"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let weights = Weights {
            adapter: Some(adapter.clone()),
            ..Weights::default()
        };
        let remark = |base: &str, model: &str| {
            let config = format!("{{\"base_model_name_or_path\": {base:?}}}");
            std::fs::write(adapter.join("adapter_config.json"), config).unwrap();
            weights.other_base(&dir.path().join(model))
        };
        let absolute = dir.path().join("model").display().to_string();
        assert_eq!(remark("../model", "model"), None);
        assert_eq!(remark(&absolute, "model"), None);
        for base in ["../model", &absolute, "owner/name"] {
            let remark = remark(base, "other").unwrap();
            assert!(
                remark.contains(base) && remark.contains("other"),
                "{remark}"
            );
        }
        assert_eq!(Weights::default().other_base(&adapter), None);
    }
}
