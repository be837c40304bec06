//! Recorded clips with the gains that the library computes for them.

use super::{BANDS, FEATURES, HIDDEN, WeightFile};
use crate::{
    cell::values,
    data::{Examples, Inputs, Sequences, Targets, step_labels},
    error::{Error, Result},
    io,
    rnn::{Evaluation, Rnn, auc},
};
use std::path::Path;

/// Clips of one length: features `[clips, frames, 65]` of a safetensors file, with `gains` `[clips, frames, 32]` and `labels`
/// `[clips, frames]` (1 voice, 0 none, 255 not counted).
#[derive(Debug, Clone)]
pub struct Clips {
    frames: usize,
    features: Vec<f32>,
    gains: Vec<f32>,
    labels: Vec<Option<bool>>,
}

impl Clips {
    /// Reads a file.
    ///
    /// # Errors
    /// A file that cannot be read, a tensor that is missing or has another shape, another label.
    pub fn load(file: &Path) -> Result<Self> {
        let tensors = io::load(file)?;
        let wrong = |reason: String| Error::Data {
            file: file.into(),
            reason,
        };
        let tensor = |name: &str| {
            let found = tensors.get(name);
            found.ok_or_else(|| wrong(format!("it has no tensor `{name}`")))
        };
        let dims = tensor("features")?.dims().to_vec();
        let &[clips, frames, FEATURES] = dims.as_slice() else {
            return Err(wrong(format!(
                "features {dims:?}, [clips, frames, {FEATURES}] is expected"
            )));
        };
        let of = |name: &str, expected: &[usize]| -> Result<Vec<f32>> {
            let tensor = tensor(name)?;
            match tensor.dims() == expected {
                true => values(tensor),
                false => Err(wrong(format!(
                    "{name} {:?}, {expected:?} is expected",
                    tensor.dims()
                ))),
            }
        };
        if clips == 0 || frames == 0 {
            return Err(wrong("it has no frames".into()));
        }
        Ok(Self {
            frames,
            features: of("features", &[clips, frames, FEATURES])?,
            gains: of("gains", &[clips, frames, BANDS])?,
            labels: step_labels(&of("labels", &[clips, frames])?, frames, file)?,
        })
    }

    /// Number of clips.
    pub fn len(&self) -> usize {
        self.labels.len() / self.frames
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The clips without the last quarter (one at least), and the last quarter; a single clip is both.
    pub fn split(&self) -> (Self, Self) {
        let n = self.len();
        let at = (n - n.div_ceil(4)).max(1);
        (self.part(0, at), self.part(at.min(n - 1), n))
    }

    fn part(&self, from: usize, to: usize) -> Self {
        let of = |v: &[f32], width: usize| {
            v[from * self.frames * width..to * self.frames * width].to_vec()
        };
        Self {
            frames: self.frames,
            features: of(&self.features, FEATURES),
            gains: of(&self.gains, BANDS),
            labels: self.labels[from * self.frames..to * self.frames].to_vec(),
        }
    }

    fn each(&self) -> impl Iterator<Item = &[f32]> {
        self.features.chunks_exact(self.frames * FEATURES)
    }

    /// What the GRUs of a file read, to record their states on. What is asked of the network does not matter there: the targets
    /// are all 0.
    ///
    /// # Errors
    /// Arrays of the convolutions are missing.
    pub fn examples(&self, file: &WeightFile) -> Result<Examples> {
        let mut values = Vec::new();
        for clip in self.each() {
            values.extend(file.convolutions(clip)?);
        }
        let inputs = Inputs::Vectors {
            dim: HIDDEN,
            values,
        };
        let lengths = vec![self.frames; self.len()];
        let targets = Targets::Classes(vec![0; self.len()]);
        Ok(Examples::Sequences(Sequences::new(
            inputs, &lengths, targets,
        )?))
    }

    /// Quality of a network with the convolutions and read-outs of `file`: the loss is the mean squared difference of the gains to
    /// those of the clips; accuracy and area under the curve are those of the voice probability.
    ///
    /// # Errors
    /// A network or a file that do not fit.
    pub fn quality(&self, file: &WeightFile, rnn: &Rnn) -> Result<Evaluation> {
        let (mut square, mut right) = (0.0, 0usize);
        let mut decisions = Vec::new();
        let clips = self
            .each()
            .zip(self.gains.chunks_exact(self.frames * BANDS));
        for ((clip, expected), labels) in clips.zip(self.labels.chunks_exact(self.frames)) {
            let (gains, voice) = file.run(rnn, clip)?;
            let pairs = gains.iter().zip(expected);
            square += pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            for (&v, &label) in voice.iter().zip(labels) {
                if let Some(label) = label {
                    right += usize::from((v > 0.5) == label);
                    decisions.push((v, f32::from(u8::from(label))));
                }
            }
        }
        Ok(Evaluation {
            loss: square / self.gains.len() as f64,
            accuracy: Some(right as f64 / decisions.len().max(1) as f64),
            auc: auc(&decisions),
            targets: decisions.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};
    use std::collections::HashMap;

    #[test]
    fn labels_of_clips_are_0_1_or_not_counted_and_anything_else_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("clips.safetensors");
        let write = |label: u8| {
            let zeros =
                |width: usize| Tensor::zeros((2, 3, width), DType::F32, &Device::Cpu).unwrap();
            let labels = vec![0u8, 1, 255, 1, label, 0];
            let labels = Tensor::from_vec(labels, (2, 3), &Device::Cpu).unwrap();
            let tensors = HashMap::from([
                ("features".to_owned(), zeros(FEATURES)),
                ("gains".to_owned(), zeros(BANDS)),
                ("labels".to_owned(), labels),
            ]);
            io::save(&tensors, &file).unwrap();
            Clips::load(&file)
        };
        let counted = write(255).unwrap().labels;
        let expected = [Some(false), Some(true), None, Some(true), None, Some(false)];
        assert_eq!(counted, expected);
        let text = write(2).unwrap_err().to_string();
        assert!(
            text.contains("clips.safetensors: labels: 2 in clip 1, step 1"),
            "{text}"
        );
    }
}
