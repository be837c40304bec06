//! Statistics of a model's queries, for policies that use them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use causal_lm::{Model, TextTokenizer};
use eval_report::format;
use kv_lazy::policy::tri_attention::QueryStatistics;
use kv_lazy::trace::TraceMeta;
use tensor_io::ContentHash;

use super::policy::{self, Choice};
use super::rows::OWN_QUERIES;
use super::{Config, recording};
use crate::suites::perplexity::{ensure_unseen, file_name};

/// Tokens of the calibration text.
const TOKENS: usize = 1024;
/// Fewest of them that are enough for statistics.
const FEWEST: usize = 512;

/// Where statistics of a model's queries come from.
#[derive(Debug, Clone)]
pub enum Calibration {
    /// The beginning of a text, which the model reads.
    Text {
        /// The text.
        text: PathBuf,
        /// A file for the statistics.
        save: Option<PathBuf>,
    },
    /// A file of statistics.
    Statistics(PathBuf),
}

impl Calibration {
    /// The flag and its value.
    fn flag(&self) -> String {
        match self {
            Self::Text { text, .. } => format!("--calib {}", text.display()),
            Self::Statistics(file) => format!("--statistics {}", file.display()),
        }
    }

    /// The statistics of the queries of `model`, whose checkpoint is at `path`, and where they come from in words.
    fn of(&self, model: &Model<'_>, path: &Path) -> Result<(QueryStatistics, String)> {
        match self {
            Self::Text { text, save } => {
                let tokenizer = TextTokenizer::open(path)?;
                let (mut statistics, tokens) = measure(model, &tokenizer, text)?;
                if let Some(file) = save {
                    statistics.model_hash = Some(ContentHash::of_path(path)?.to_string());
                    statistics.write(file).context("--save-statistics")?;
                }
                let tokens = format::counted(tokens, "token");
                Ok((statistics, format!("{tokens} of {}", file_name(text))))
            }
            Self::Statistics(file) => Ok((read(file, path)?, file_name(file))),
        }
    }
}

/// Statistics in a file, which must be of the model at `path` where the file knows its model.
pub(crate) fn read(file: &Path, path: &Path) -> Result<QueryStatistics> {
    let statistics = QueryStatistics::read(file).context("--statistics")?;
    if let Some(of) = &statistics.model_hash {
        ensure!(
            *of == ContentHash::of_path(path)?.to_string(),
            "--statistics {}: of another model than {}",
            file.display(),
            path.display()
        );
    }
    Ok(statistics)
}

impl Config {
    /// The same with statistics of the queries of `model`, whose checkpoint is at `path`, where policies use them, and where these come from in words.
    pub(super) fn calibrated(&self, model: &Model<'_>, path: &Path) -> Result<(Self, String)> {
        let mut config = self.clone();
        let Some(calibration) = &self.calibration else {
            return Ok((config, OWN_QUERIES.into()));
        };
        self.check_calibration()?;
        let (statistics, from) = calibration.of(model, path)?;
        let policies = config.policies.into_iter();
        config.policies = policies
            .map(|choice| choice.calibrated(&statistics))
            .collect();
        Ok((config, from))
    }

    /// Refuses statistics that no policy would make use of, and those of a text that is evaluated on.
    pub(super) fn check_calibration(&self) -> Result<()> {
        if let Some(Calibration::Text { text, .. }) = &self.calibration {
            for evaluated in self.texts() {
                ensure_unseen(text, evaluated)?;
            }
        }
        if let Some(calibration) = &self.calibration
            && !self.policies.iter().any(Choice::takes_calibration)
        {
            let flag = calibration.flag();
            bail!("{flag}: none of the policies takes statistics of queries");
        }
        Ok(())
    }
}

/// Statistics of the model's queries on the beginning of a text, and of how many tokens.
fn measure(
    model: &Model<'_>,
    tokenizer: &TextTokenizer,
    text: &Path,
) -> Result<(QueryStatistics, usize)> {
    let mut tokens = tokenizer.encode_file(text).context("--calib")?;
    tokens.truncate(TOKENS);
    ensure!(
        tokens.len() >= FEWEST,
        "--calib {}: {}, where statistics of queries need {FEWEST}",
        text.display(),
        format::counted(tokens.len(), "token")
    );
    let reach = model.decoder().config().max_positions;
    let trace = |window: &[u32]| {
        let recorder = recording::record(model, model.full_cache(1)?, window)?;
        let meta = TraceMeta::new(file_name(text), window.len(), 1.0);
        let trace = recorder.into_trace(meta, window.to_vec());
        trace.with_context(|| format!("--calib {}", text.display()))
    };
    let traces: Vec<_> = (tokens.chunks(reach.max(1)).map(trace)).collect::<Result<_>>()?;
    let rotary = policy::rotary(model.decoder().config());
    let of = |layer: usize| rotary.get(layer).and_then(Option::as_ref);
    Ok((kv_lazy::calibrate::queries(&traces, of)?, tokens.len()))
}
