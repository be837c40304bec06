//! Statistics of a model's queries, for policies that use them.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use causal_lm::{Model, TextTokenizer};
use eval_report::format;
use kv_lazy::policy::tri_attention::QueryStatistics;
use kv_lazy::trace::TraceMeta;

use super::policy::{self, Choice};
use super::{Config, recording};
use crate::suites::perplexity::file_name;

/// Tokens of the calibration text.
const TOKENS: usize = 1024;
/// Fewest of them that are enough for statistics.
const FEWEST: usize = 512;

/// Where statistics come from that no text was given for.
pub(super) const OWN_QUERIES: &str = "the sequence's own";

impl Config {
    /// The same with statistics of the queries of `model`, whose checkpoint is at `path`, where policies use them, and where these come from in words.
    pub(super) fn calibrated(&self, model: &Model<'_>, path: &Path) -> Result<(Self, String)> {
        let mut config = self.clone();
        let Some(text) = &self.calibration else {
            return Ok((config, OWN_QUERIES.into()));
        };
        self.check_calibration()?;
        let tokenizer = TextTokenizer::open(path)?;
        let (statistics, tokens) = measure(model, &tokenizer, text)?;
        let policies = config.policies.into_iter();
        config.policies = policies
            .map(|choice| choice.calibrated(&statistics))
            .collect();
        let from = format!(
            "{} of {}",
            format::counted(tokens, "token"),
            file_name(text)
        );
        Ok((config, from))
    }

    /// Refuses a text that no policy would make use of.
    pub(super) fn check_calibration(&self) -> Result<()> {
        if let Some(text) = &self.calibration
            && !self.policies.iter().any(Choice::takes_calibration)
        {
            bail!(
                "--calib {}: none of the policies takes statistics of queries",
                text.display()
            );
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
