//! Tiny decoders whose weights come from a formula, and the logits that transformers gives them.

use candle_core::{DType, Device, Tensor};
use causal_lm::names::ExpertLayout;
pub(crate) use causal_lm::testing::golden_weights as entries;
use causal_lm::{Decoder, ModelConfig, NoProgress, NoTap, Windows, cross_entropy, run_blocks};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tensor_io::{Checkpoint, CheckpointWriter, Config, TensorSpec, WriteOptions};

/// A file of `tests/golden`.
pub(crate) struct Golden(pub(crate) Value);

impl Golden {
    pub(crate) fn all() -> Vec<(String, Self)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        files.retain(|path| path.extension().is_some_and(|e| e == "json"));
        files.sort();
        let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_string();
        files
            .iter()
            .map(|path| {
                (
                    name(path),
                    Self(serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()),
                )
            })
            .collect()
    }

    pub(crate) fn config(&self) -> Config {
        Config::new(self.0["config"].as_object().unwrap().clone())
    }

    pub(crate) fn tokens(&self) -> Vec<u32> {
        self.0["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t.as_u64().unwrap() as u32)
            .collect()
    }

    pub(crate) fn logits(&self) -> Vec<Vec<f32>> {
        self.0["logits"]
            .as_array()
            .unwrap()
            .iter()
            .map(floats)
            .collect()
    }

    pub(crate) fn mean_nll(&self) -> f64 {
        self.0["mean_nll"].as_f64().unwrap()
    }

    /// Tensors beside the decoder, and their shapes.
    fn foreign(&self) -> Vec<(String, Vec<usize>)> {
        let tensors = self.0["foreign"].as_object().into_iter().flatten();
        let shape = |dims: &Value| serde_json::from_value(dims.clone()).unwrap();
        tensors
            .map(|(name, dims)| (name.clone(), shape(dims)))
            .collect()
    }

    /// Writes the model as a checkpoint folder.
    pub(crate) fn write(&self, dir: &Path) {
        let mut config = ModelConfig::new(&self.config()).unwrap();
        if self.0["layout"] == "fused" {
            config.names = config.names.with_layout(ExpertLayout::Fused).unwrap();
        }
        let mut tensors = config.tensors();
        tensors.extend(self.foreign());
        let spec =
            |(name, shape): &(String, Vec<usize>)| TensorSpec::new(name, DType::F32, shape.clone());
        let specs = tensors.iter().map(spec).collect();
        let options = WriteOptions::default();
        let mut writer = CheckpointWriter::create(dir, &self.config(), specs, &options).unwrap();
        for (name, shape) in &tensors {
            let values = entries(name, shape);
            let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap();
            writer.write_tensor(name, &tensor).unwrap();
        }
        writer.finish().unwrap();
    }
}

/// Calls `test` with each golden model opened from a folder.
pub(crate) fn for_each(test: impl Fn(&str, &Golden, &Decoder<'_>)) {
    for (name, golden) in Golden::all() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("model");
        golden.write(&dir);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
        test(&name, &golden, &decoder);
    }
}

/// Mean cross-entropy of all tokens of the windows but the first of each.
pub(crate) fn mean_nll(decoder: &Decoder<'_>, windows: &Windows) -> f64 {
    let hidden = run_blocks(decoder, windows, &mut NoTap, &NoProgress).unwrap();
    let head = decoder.head().unwrap();
    let rows = hidden.batches().iter().flat_map(|batch| {
        let count = batch.dim(0).unwrap();
        (0..count).map(|i| batch.get(i).unwrap())
    });
    let losses = rows.zip(windows.iter()).flat_map(|(rows, window)| {
        let rows = rows.narrow(0, 0, window.len() - 1).unwrap();
        cross_entropy(&head.forward(&rows).unwrap(), &window[1..]).unwrap()
    });
    losses.sum::<f64>() / windows.targets() as f64
}

fn floats(list: &Value) -> Vec<f32> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}
