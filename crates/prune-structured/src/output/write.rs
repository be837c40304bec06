//! Writing a pruned checkpoint: a second streaming pass that slices stored tensors.
//!
//! Tensors that a plan leaves alone are copied byte for byte, rows and columns are cut without
//! looking at the values, and only compensated tensors are computed anew.

use super::form::Form;
use super::layout::{Output, Source, kept_features, outputs, part_of};
use super::refits::Refits;
use super::{config, slice};
use crate::compensation::{Change, Compensation, complement};
use crate::plan::Plan;
use crate::{Calibration, Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::names::Module;
use causal_lm::{Decoder, Progress};
use std::path::Path;
use tensor_io::{CheckpointWriter, WriteOptions, Written};

/// How and from what a plan is written.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Settings<'a> {
    /// Statistics that the plan's compensation reads: those that the plan was made from, or others of the same model.
    pub calibration: Option<&'a Calibration>,
    /// The weights of a refinement, for plans that were refined.
    pub refits: Option<&'a Refits>,
    /// Sliced or masked.
    pub form: Form,
    /// Shards and overwriting.
    pub files: WriteOptions,
}

impl<'a> Settings<'a> {
    /// A sliced checkpoint, compensated from `calibration`.
    pub fn new(calibration: &'a Calibration) -> Self {
        Self {
            calibration: Some(calibration),
            ..Self::default()
        }
    }

    /// The same in another form.
    pub fn form(self, form: Form) -> Self {
        Self { form, ..self }
    }

    /// The same with the weights of a refinement.
    pub fn refits(self, refits: Option<&'a Refits>) -> Self {
        Self { refits, ..self }
    }

    /// The same with other files.
    pub fn files(self, files: WriteOptions) -> Self {
        Self { files, ..self }
    }
}

/// Writes `plan` applied to `decoder` as a new checkpoint folder; a step of `progress` is a tensor.
///
/// # Errors
/// [`Error::PlanMismatch`] for a plan of another model, [`Error::Missing`] for statistics that the compensation reads,
/// [`Error::Cancelled`], and what reading and writing report. A failed run leaves nothing under `dst`.
pub fn write(
    decoder: &Decoder<'_>,
    plan: &Plan,
    dst: impl AsRef<Path>,
    settings: &Settings<'_>,
    progress: &dyn Progress,
) -> Result<Written> {
    plan.check(decoder)?;
    let form = settings.form;
    let outputs = outputs(decoder, plan, form)?;
    let (config, files) = config::pruned(decoder, plan, form)?;
    let specs = outputs.iter().map(|output| output.spec.clone()).collect();
    let mut writer = CheckpointWriter::create(dst, &config, specs, &settings.files)?;
    writer.carry_from(decoder.checkpoint())?;
    for (name, text) in files {
        writer.add_file(name, text.as_bytes())?;
    }
    let mut sources = Sources {
        decoder,
        plan,
        settings,
        change: None,
    };
    progress.begin("writing", outputs.len() as u64);
    for output in &outputs {
        sources.write(output, &mut writer)?;
        progress.advance(1)?;
    }
    Ok(writer.finish()?)
}

/// Makes the tensors of the output.
struct Sources<'a> {
    decoder: &'a Decoder<'a>,
    plan: &'a Plan,
    settings: &'a Settings<'a>,
    /// The last output projection's change, which its weight and its bias both need.
    change: Option<((usize, &'static Module), Change)>,
}

impl Sources<'_> {
    fn write(&mut self, output: &Output, writer: &mut CheckpointWriter) -> Result<()> {
        let checkpoint = self.decoder.checkpoint();
        let (name, from) = (&output.spec.name, &output.from);
        match output.source {
            Source::Copy if name == from => writer.copy_tensor(name, checkpoint)?,
            Source::Copy => writer.write_bytes(name, &checkpoint.bytes(from)?)?,
            Source::Weight(layer, module) => {
                let weight = match self.refitted(layer, module)? {
                    Some(weight) => Some(weight),
                    None if module.is_output() => self.change(layer, module)?.into_weight(),
                    None => None,
                };
                match weight {
                    Some(weight) => {
                        writer.write_tensor(name, &self.shaped(weight, layer, module)?)?;
                    }
                    None => {
                        let bytes = self.cut(layer, module, module.is_output(), from)?;
                        writer.write_bytes(name, &bytes)?;
                    }
                }
                checkpoint.release([from.as_str()]);
            }
            Source::Bias(layer, module) if module.is_output() => {
                let outputs = output.spec.shape[0];
                let mut bias = if checkpoint.contains(from) {
                    checkpoint
                        .tensor_as(from, DType::F64, &Device::Cpu)?
                        .to_vec1::<f64>()?
                } else {
                    vec![0.0; outputs]
                };
                if let Change::Bias(change) = self.change(layer, module)? {
                    for (bias, change) in bias.iter_mut().zip(change) {
                        *bias += change;
                    }
                }
                writer.write_tensor(name, &Tensor::new(bias, &Device::Cpu)?)?;
            }
            Source::Bias(layer, module) if checkpoint.contains(from) => {
                writer.write_bytes(name, &self.cut(layer, module, false, from)?)?;
            }
            Source::Bias(..) => {
                writer.write_tensor(
                    name,
                    &Tensor::zeros(output.spec.shape.as_slice(), DType::F32, &Device::Cpu)?,
                )?;
            }
        }
        Ok(())
    }

    /// The weight that a refinement of the plan left, if the plan asks for one.
    fn refitted(&self, layer: usize, module: &'static Module) -> Result<Option<Tensor>> {
        if !matches!(self.plan.compensation, Compensation::Alternating(_)) {
            return Ok(None);
        }
        let refits = self.settings.refits.ok_or(Error::Missing {
            layer,
            what: "the refinement's weights",
            need: "refine the plan first",
        })?;
        let parts = module.parts.iter().map(|&part| refits.load(layer, part));
        let parts: Option<Vec<Tensor>> = parts.collect::<Result<_>>()?;
        // A refinement leaves all parts of a module or none.
        parts.map(|parts| Ok(Tensor::cat(&parts, 0)?)).transpose()
    }

    fn change(&mut self, layer: usize, module: &'static Module) -> Result<Change> {
        if let Some((key, change)) = &self.change
            && *key == (layer, module)
        {
            return Ok(change.clone());
        }
        let checkpoint = self.decoder.checkpoint();
        let weight = checkpoint.tensor_as(
            &self.decoder.config().names.weight(layer, module),
            DType::F32,
            &Device::Cpu,
        )?;
        let kept = kept_features(self.decoder, self.plan, layer, module);
        let change = self.plan.compensation.change(
            self.settings.calibration,
            (layer, part_of(module)),
            &weight,
            &kept,
        )?;
        self.change = Some(((layer, module), change.clone()));
        Ok(change)
    }

    /// Stored bytes of a weight or bias without, or with zeros for, what the plan removes.
    fn cut(
        &self,
        layer: usize,
        module: &'static Module,
        columns: bool,
        name: &str,
    ) -> Result<Vec<u8>> {
        let checkpoint = self.decoder.checkpoint();
        let info = checkpoint.info(name)?;
        let bytes = checkpoint.bytes(name)?;
        let kept = kept_features(self.decoder, self.plan, layer, module);
        let row_bytes = info.bytes / info.shape[0];
        let width = info.shape.get(1).copied().unwrap_or(1);
        let element = row_bytes / width;
        Ok(match (self.settings.form, columns) {
            (Form::Sliced, true) => slice::columns(&bytes, width, element, &kept),
            (Form::Sliced, false) => slice::rows(&bytes, row_bytes, &kept),
            (Form::Masked, true) => {
                let mut bytes = bytes.into_owned();
                slice::zero_columns(&mut bytes, width, element, &complement(&kept, width));
                bytes
            }
            (Form::Masked, false) => {
                let mut bytes = bytes.into_owned();
                slice::zero_rows(&mut bytes, row_bytes, &complement(&kept, info.shape[0]));
                bytes
            }
        })
    }

    /// A refitted weight in the form asked for: as it is, or spread over the dense columns, those of
    /// an output projection, or rows.
    fn shaped(&self, weight: Tensor, layer: usize, module: &'static Module) -> Result<Tensor> {
        if self.settings.form == Form::Sliced {
            return Ok(weight);
        }
        let kept = kept_features(self.decoder, self.plan, layer, module);
        let (outputs, width) = self
            .decoder
            .checkpoint()
            .info(&self.decoder.config().names.weight(layer, module))
            .map(|i| (i.shape[0], i.shape[1]))?;
        if !module.is_output() {
            let rows = weight.to_vec2::<f32>()?;
            let mut dense = vec![0f32; outputs * width];
            for (&row, values) in kept.iter().zip(rows) {
                dense[row * width..][..width].copy_from_slice(&values);
            }
            return Ok(Tensor::from_vec(dense, (outputs, width), &Device::Cpu)?);
        }
        let mut dense = vec![0f32; outputs * width];
        for (row, refitted) in dense.chunks_exact_mut(width).zip(weight.to_vec2::<f32>()?) {
            for (&column, value) in kept.iter().zip(refitted) {
                row[column] = value;
            }
        }
        Ok(Tensor::from_vec(dense, (outputs, width), &Device::Cpu)?)
    }
}
