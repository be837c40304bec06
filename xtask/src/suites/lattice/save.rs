//! Pruned networks as files.

use anyhow::{Context, Result, bail};
use prune_lattice::experiment::{ExperimentConfig, PrunedNetwork, Repair, Row, Stage};
use prune_lattice::prune::Method;
use prune_lattice::repair::MergeConfig;
use prune_lattice::rnnoise::Stored;
use tensor_io::atomic::{Overwrite, PendingFolder};

use super::checkpoint::{Opened, Origin, SaveConfig};

/// Writes a file for every pruned network: of the kind that the network came from where its format can hold it, as safetensors
/// otherwise. An ONNX file holds networks of unchanged shape and read-out; RNNoise's weight file holds masks of 8x4 blocks, and
/// merged neurons.
pub(super) struct Saver<'a> {
    folder: PendingFolder,
    opened: &'a Opened,
    stored: Stored,
    merge: &'a MergeConfig,
}

impl<'a> Saver<'a> {
    pub(super) fn new(
        config: &SaveConfig,
        opened: &'a Opened,
        experiment: &'a ExperimentConfig,
    ) -> Result<Self> {
        if let Origin::Onnx { file, node } = &opened.origin {
            let refits = experiment.repairs.contains(&Repair::Refit) && experiment.refit.constant;
            if refits && !file.node(Some(node))?.has_bias() {
                bail!(
                    "--save: node {node} has no B, so that no constant can be written; give --no-constant"
                );
            }
        }
        let folder = PendingFolder::create(&config.folder, Overwrite::Never)
            .with_context(|| format!("--save {}", config.folder.display()))?;
        Ok(Self {
            folder,
            opened,
            stored: config.stored,
            merge: &experiment.merge,
        })
    }

    /// Writes one network.
    pub(super) fn save(&self, network: &PrunedNetwork<'_>) -> prune_lattice::Result<()> {
        let row = network.row;
        if row.method == Method::Dense {
            return Ok(());
        }
        let path = |kind: &str| self.folder.path().join(format!("{}.{kind}", name(row)));
        let same_shape = network.rnn.config().hidden == row.hidden;
        match &self.opened.origin {
            Origin::Onnx { file, node } if same_shape && row.stage == Stage::OneShot => {
                file.write(file.node(Some(node))?, network.rnn, 0, &path("onnx"))
            }
            Origin::Noise(noise) => match (network.keep, same_shape) {
                (Some(keep), false) => {
                    let (merged, _) =
                        noise.merged(keep, network.calibration, self.merge, self.stored)?;
                    merged.write(&path("bin"))
                }
                _ => {
                    let mut file = noise.clone();
                    match file.set_network(network.rnn, network.masks, self.stored) {
                        Ok(()) => file.write(&path("bin")),
                        Err(prune_lattice::Error::PartialBlock { .. }) => {
                            network.rnn.save(&path("safetensors"))
                        }
                        Err(error) => Err(error),
                    }
                }
            },
            _ => network.rnn.save(&path("safetensors")),
        }
    }

    /// Gives the folder its name.
    pub(super) fn finish(self) -> Result<()> {
        self.folder.persist()?;
        Ok(())
    }
}

/// A name that tells the networks of a run apart.
fn name(row: &Row) -> String {
    let mut parts = vec![row.method.to_string()];
    if row.repair != Repair::None {
        parts.push(row.repair.to_string());
    }
    if row.method != Method::ZeroWhh {
        parts.push(row.sparsity.to_string());
    }
    if row.method.is_random() {
        parts.push(format!("seed{}", row.seed));
    }
    match row.stage {
        Stage::OneShot => {}
        Stage::FineTuned => parts.push("fine-tuned".into()),
        Stage::Gradual => parts.push("gradual".into()),
        Stage::FromScratch => parts.push("from-scratch".into()),
    }
    parts.join("-")
}
