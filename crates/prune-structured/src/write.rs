//! Writing a pruned checkpoint: a second streaming pass that slices stored tensors.
//!
//! Tensors that a plan leaves alone are copied byte for byte, rows and columns are cut without
//! looking at the values, and only compensated tensors are computed anew.

use crate::compensate::{Change, Compensation, complement};
use crate::config;
use crate::layout::{Form, Output, Source, kept_features, outputs, part_of};
use crate::plan::Plan;
use crate::slice;
use crate::{Calibration, Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, LinearName};
use std::path::Path;
use tensor_io::{CheckpointWriter, WriteOptions, Written};

/// Writes `plan` applied to `decoder` as a new checkpoint folder; `progress` is told after each
/// tensor.
///
/// The calibration is the one that the plan was made from, or one on other text; a plan without
/// compensation needs none.
///
/// # Errors
/// [`crate::Error::PlanMismatch`] for a plan of another model, [`crate::Error::Missing`] for
/// statistics that the compensation reads, and what reading and writing report. A failed run
/// leaves nothing under `dst`.
pub fn write(
    decoder: &Decoder<'_>,
    plan: &Plan,
    calibration: Option<&Calibration>,
    form: Form,
    dst: impl AsRef<Path>,
    options: &WriteOptions,
    progress: &mut dyn FnMut(),
) -> Result<Written> {
    plan.check(decoder)?;
    let outputs = outputs(decoder, plan, form)?;
    let (config, files) = config::pruned(decoder, plan, form);
    let specs = outputs.iter().map(|output| output.spec.clone()).collect();
    let mut writer = CheckpointWriter::create(dst, &config, specs, options)?;
    writer.carry_from(decoder.checkpoint())?;
    for (name, text) in files {
        writer.add_file(name, text.as_bytes())?;
    }
    let mut sources = Sources {
        decoder,
        plan,
        calibration,
        form,
        change: None,
    };
    for output in &outputs {
        sources.write(output, &mut writer)?;
        progress();
    }
    Ok(writer.finish()?)
}

/// Makes the tensors of the output.
struct Sources<'a> {
    decoder: &'a Decoder<'a>,
    plan: &'a Plan,
    calibration: Option<&'a Calibration>,
    form: Form,
    /// The last output projection's change, which its weight and its bias both need.
    change: Option<((usize, LinearName), Change)>,
}

impl Sources<'_> {
    fn write(&mut self, output: &Output, writer: &mut CheckpointWriter) -> Result<()> {
        let checkpoint = self.decoder.checkpoint();
        let name = &output.spec.name;
        match output.source {
            Source::Copy => writer.copy_tensor(name, checkpoint)?,
            Source::Weight(layer, linear) => {
                let weight = match self.refitted(layer, linear)? {
                    Some(weight) => Some(weight),
                    None if linear.is_output() => self.change(layer, linear)?.into_weight(),
                    None => None,
                };
                match weight {
                    Some(weight) => {
                        writer.write_tensor(name, &self.shaped(weight, layer, linear)?)?;
                    }
                    None => {
                        let bytes = self.cut(layer, linear, linear.is_output(), name)?;
                        writer.write_bytes(name, &bytes)?;
                    }
                }
                checkpoint.release([name.as_str()]);
            }
            Source::Bias(layer, linear) if linear.is_output() => {
                let outputs = output.spec.shape[0];
                let mut bias = if checkpoint.contains(name) {
                    checkpoint
                        .tensor_as(name, DType::F64, &Device::Cpu)?
                        .to_vec1::<f64>()?
                } else {
                    vec![0.0; outputs]
                };
                if let Change::Bias(change) = self.change(layer, linear)? {
                    for (bias, change) in bias.iter_mut().zip(change) {
                        *bias += change;
                    }
                }
                writer.write_tensor(name, &Tensor::new(bias, &Device::Cpu)?)?;
            }
            Source::Bias(layer, linear) if checkpoint.contains(name) => {
                writer.write_bytes(name, &self.cut(layer, linear, false, name)?)?;
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
    fn refitted(&self, layer: usize, linear: LinearName) -> Result<Option<Tensor>> {
        if !matches!(self.plan.compensation, Compensation::Alternating { .. }) {
            return Ok(None);
        }
        let refits = self.calibration.and_then(|c| c.refits.as_ref());
        let refits = refits.ok_or(Error::Missing {
            layer,
            what: "the refinement's weights",
            need: "refine the plan first",
        })?;
        refits.load(layer, linear)
    }

    fn change(&mut self, layer: usize, linear: LinearName) -> Result<Change> {
        if let Some((key, change)) = &self.change
            && *key == (layer, linear)
        {
            return Ok(change.clone());
        }
        let checkpoint = self.decoder.checkpoint();
        let weight = checkpoint.tensor_as(&linear.weight(layer), DType::F32, &Device::Cpu)?;
        let kept = kept_features(self.decoder, self.plan, layer, linear);
        let change = self.plan.compensation.change(
            self.calibration,
            (layer, part_of(linear)),
            &weight,
            &kept,
        )?;
        self.change = Some(((layer, linear), change.clone()));
        Ok(change)
    }

    /// Stored bytes of a weight or bias without, or with zeros for, what the plan removes.
    fn cut(&self, layer: usize, linear: LinearName, columns: bool, name: &str) -> Result<Vec<u8>> {
        let checkpoint = self.decoder.checkpoint();
        let info = checkpoint.info(name)?;
        let bytes = checkpoint.bytes(name)?;
        let kept = kept_features(self.decoder, self.plan, layer, linear);
        let row_bytes = info.bytes / info.shape[0];
        let width = info.shape.get(1).copied().unwrap_or(1);
        let element = row_bytes / width;
        Ok(match (self.form, columns) {
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
    fn shaped(&self, weight: Tensor, layer: usize, linear: LinearName) -> Result<Tensor> {
        if self.form == Form::Sliced {
            return Ok(weight);
        }
        let kept = kept_features(self.decoder, self.plan, layer, linear);
        let (outputs, width) = self
            .decoder
            .checkpoint()
            .info(&linear.weight(layer))
            .map(|i| (i.shape[0], i.shape[1]))?;
        if !linear.is_output() {
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
