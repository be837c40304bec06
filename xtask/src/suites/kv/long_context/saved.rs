//! The tokens of contexts and questions in files, so that other programs can be run on the same.

use std::path::Path;

use anyhow::{Context, Result};
use lm_eval::long_context::Example;
use serde::Serialize;
use tensor_io::atomic;

use super::Asked;

/// A line of a file.
#[derive(Serialize)]
struct Line<'a> {
    seed: u64,
    index: u64,
    #[serde(flatten)]
    example: &'a Example,
}

/// Writes `KIND-LENGTH.jsonl` for each kind and length: a context with its questions on each line.
pub(super) fn write(dir: &Path, asked: &[Asked]) -> Result<()> {
    let failed = || format!("--save {}", dir.display());
    std::fs::create_dir_all(dir).with_context(failed)?;
    for asked in asked {
        let mut lines = Vec::new();
        for one in &asked.examples {
            let line = Line {
                seed: one.seed,
                index: one.index,
                example: &one.example,
            };
            serde_json::to_writer(&mut lines, &line)?;
            lines.push(b'\n');
        }
        let name = format!("{}-{}.jsonl", asked.kind.name(), asked.length);
        atomic::write(dir.join(name), &lines).with_context(failed)?;
    }
    Ok(())
}
