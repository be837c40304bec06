//! RNNoise, whose read-outs see all layers: judged by its own gains and voice probabilities.

use super::{
    ExperimentConfig, Row,
    judge::{Judge, Judged},
    network::{Session, Source, Visit},
    run::prune_one_network,
};
use crate::{
    calibration::{Calibration, RecordConfig, record},
    data::Dataset,
    error::{Error, Result},
    mask::MaskSet,
    repair::MergeConfig,
    rnn::{BlockRnn, Evaluation, TrainConfig},
    rnnoise::{Clips, Stored, WeightFile},
};
use std::path::Path;
use tensor_io::Progress;

/// Prunes the three GRUs of an RNNoise file by every method at every sparsity; `visit` sees each pruned network. The clips are
/// `train.safetensors` and `test.safetensors` of a folder, the last quarter of the training clips for validation. The loss of a row is
/// the mean squared difference of the gains to those in the clips; accuracy and area under the curve are those of the voice
/// probability. Merged networks take part with read-outs that predict the neurons of all layers.
///
/// # Errors
/// Clips that cannot be used; fine-tuning, which the read-outs do not take part in; those of [`run_model`](super::run_model).
pub fn run_rnnoise(
    name: &str,
    file: &WeightFile,
    folder: &Path,
    config: &ExperimentConfig,
    visit: &Visit<'_>,
    progress: &dyn Progress,
) -> Result<Vec<Row>> {
    let refuse = |setting, reason: &str| {
        Err(Error::Setting {
            setting,
            reason: reason.into(),
        })
    };
    if config.finetune_epochs > 0 {
        return refuse(
            "fine-tuning epochs",
            "RNNoise is not trained here, so that they must be 0",
        );
    }
    if config.merge.passes > 1 {
        return refuse("passes of merge", "RNNoise is merged in one pass");
    }
    let clips = Clips::load(&folder.join("train.safetensors"))?;
    let (train, valid) = clips.split();
    let test = Clips::load(&folder.join("test.safetensors"))?;
    let rnn = file.network()?;
    let examples = |clips: &Clips| clips.examples(file);
    let data = Dataset {
        train: examples(&train)?,
        valid: examples(&valid)?,
        test: examples(&test)?,
        input: rnn.config().input,
        outputs: rnn.config().outputs,
    };
    let judge = Noise {
        file,
        valid: &valid,
        test: &test,
        calibration: record(&rnn, &data.train, &RecordConfig::default(), progress)?,
        merge: &config.merge,
    };
    let wired = MaskSet::default();
    let readers = file.readers()?;
    let source = Source {
        name,
        rnn: &rnn,
        data: &data,
        judge: &judge,
        readers: &readers,
        wired: &wired,
        seed: None,
    };
    let session = Session {
        config,
        training: &TrainConfig::default(),
        visit,
        progress,
    };
    prune_one_network(source, &session)
}

struct Noise<'a> {
    file: &'a WeightFile,
    valid: &'a Clips,
    test: &'a Clips,
    calibration: Calibration,
    merge: &'a MergeConfig,
}

impl Noise<'_> {
    fn quality(&self, network: &Judged<'_>, clips: &Clips) -> Result<Evaluation> {
        match network.merged {
            None => clips.quality(self.file, network.rnn),
            Some(keep) => {
                let (file, rnn) =
                    self.file
                        .merged(keep, &self.calibration, self.merge, Stored::Floats)?;
                clips.quality(&file, &rnn)
            }
        }
    }
}

impl Judge for Noise<'_> {
    fn test(&self, network: &Judged<'_>) -> Result<Evaluation> {
        self.quality(network, self.test)
    }

    fn valid(&self, network: &Judged<'_>) -> Result<Evaluation> {
        self.quality(network, self.valid)
    }

    /// Kernels give the states of the top layer, the read-outs see all.
    fn test_blocks(&self, _: &BlockRnn) -> Result<Option<Evaluation>> {
        Ok(None)
    }
}
