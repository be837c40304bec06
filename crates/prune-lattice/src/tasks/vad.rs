//! Voice activity: decisions at every step of recorded clips, from safetensors files.

use crate::{
    data::{Dataset, Examples, Inputs, Sequences, Targets, step_labels},
    error::{Error, Result},
    io,
    params::take_any,
    rnn::InputKind,
};
use std::path::Path;

struct Clips {
    clips: usize,
    steps: usize,
    dim: usize,
    features: Vec<f32>,
    labels: Vec<Option<bool>>,
    probs: Option<Vec<f32>>,
}

fn read(file: &Path) -> Result<Clips> {
    let tensors = io::load(file)?;
    let (dims, features) = take_any(&tensors, "features")?;
    let &[clips, steps, dim] = dims.as_slice() else {
        return Err(Error::Shape {
            tensor: "features".into(),
            expected: "[clips, steps, dim]".into(),
            found: dims,
        });
    };
    let of_steps = |name: &str| -> Result<Vec<f32>> {
        let (found, values) = take_any(&tensors, name)?;
        match found == [clips, steps] {
            true => Ok(values),
            false => Err(Error::Shape {
                tensor: name.into(),
                expected: format!("[{clips}, {steps}]"),
                found,
            }),
        }
    };
    let labels = step_labels(&of_steps("labels")?, steps, file)?;
    Ok(Clips {
        clips,
        steps,
        dim,
        labels,
        probs: tensors
            .contains_key("probs")
            .then(|| of_steps("probs"))
            .transpose()?,
        features,
    })
}

impl Clips {
    /// The clips `from..to` with labels as targets, or with the original network's probabilities.
    fn examples(&self, from: usize, to: usize, imitate: bool) -> Result<Examples> {
        let range = from * self.steps..to * self.steps;
        let labels = &self.labels[range.clone()];
        let counted = labels.iter().map(|l| imitate || l.is_some()).collect();
        let targets = match &self.probs {
            Some(probs) if imitate => probs[range.clone()].to_vec(),
            _ => labels
                .iter()
                .map(|&l| f32::from(u8::from(l == Some(true))))
                .collect(),
        };
        let values = &self.features[range.start * self.dim..range.end * self.dim];
        let inputs = Inputs::Vectors {
            dim: self.dim,
            values: values.to_vec(),
        };
        let targets = Targets::Binary { targets, counted };
        let lengths = vec![self.steps; to - from];
        Ok(Examples::Sequences(Sequences::new(
            inputs, &lengths, targets,
        )?))
    }
}

/// The last quarter of the training clips is for validation.
pub(super) fn dataset(folder: &Path) -> Result<Dataset> {
    let train = read(&folder.join("train.safetensors"))?;
    let test = read(&folder.join("test.safetensors"))?;
    if train.dim != test.dim || train.clips < 2 {
        return Err(Error::Data {
            file: folder.into(),
            reason: format!(
                "{} training clips with features of {}, test features of {}",
                train.clips, train.dim, test.dim
            ),
        });
    }
    let split = (train.clips - train.clips.div_ceil(4)).max(1);
    let imitate = train.probs.is_some();
    Ok(Dataset {
        train: train.examples(0, split, imitate)?,
        valid: train.examples(split, train.clips, false)?,
        test: test.examples(0, test.clips, false)?,
        input: InputKind::Dense { dim: train.dim },
        outputs: 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use std::collections::HashMap;

    fn folder(label: u8) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in ["train", "test"] {
            let labels: Vec<u8> = vec![0, 1, 255, 1, label, 0];
            let tensors = HashMap::from([
                (
                    "features".to_owned(),
                    Tensor::zeros((2, 3, 4), candle_core::DType::F32, &Device::Cpu).unwrap(),
                ),
                (
                    "labels".to_owned(),
                    Tensor::from_vec(labels, (2, 3), &Device::Cpu).unwrap(),
                ),
            ]);
            io::save(&tensors, &dir.path().join(format!("{name}.safetensors"))).unwrap();
        }
        dir
    }

    #[test]
    fn labels_are_0_1_or_not_counted_and_anything_else_is_named() {
        let good = folder(255);
        let Examples::Sequences(test) = dataset(good.path()).unwrap().test else {
            unreachable!()
        };
        let Targets::Binary { targets, counted } = test.targets() else {
            unreachable!()
        };
        assert_eq!(targets, &[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]);
        assert_eq!(counted, &[true, true, false, true, false, true]);
        let bad = folder(2);
        let text = dataset(bad.path()).unwrap_err().to_string();
        assert!(
            text.contains("train.safetensors: labels: 2 in clip 1, step 1"),
            "{text}"
        );
    }
}
