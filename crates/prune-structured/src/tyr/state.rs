//! What a search keeps on disk so that it can go on after an interruption.
//!
//! ```text
//! DIR/run.json      what is searched: model, texts, options; another run is refused
//! DIR/state.json    iteration, generation and the best candidate so far
//! DIR/log.jsonl     one line for each generation
//! DIR/iteration-N/  the supernet in use
//! ```
//!
//! All but the log are replaced whole; lines of the log beyond the state are dropped on resuming.

use super::data::Data;
use super::evolve::Levels;
use super::options::Options;
use crate::Result;
use crate::divergence::{Sharing, hash_of};
use crate::evolution::Best;
use crate::ranking::Shape;
use crate::stored::{self, damaged as file_error};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};
use tensor_io::{ContentHash, atomic};

/// What decides the result of a search.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Identity {
    weights: ContentHash,
    calibration: ContentHash,
    search: ContentHash,
    options: Options,
    shape: Shape,
    ridge: f64,
    start: Vec<usize>,
}

impl Identity {
    /// `weights` is the hash of the checkpoint that is searched.
    pub(crate) fn of(
        weights: ContentHash,
        data: &Data<'_>,
        options: &Options,
        shape: &Shape,
        ridge: f64,
        start: &[usize],
    ) -> Self {
        Self {
            weights,
            calibration: hash_of(data.calibration),
            search: hash_of(data.search),
            options: Options {
                memory: 0,
                sharing: Sharing::Prefixes,
                ..options.clone()
            },
            shape: shape.clone(),
            ridge,
            start: start.to_vec(),
        }
    }
}

/// How far a search is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) iteration: usize,
    /// Generations done in this iteration.
    pub(crate) generation: usize,
    /// Steps kept at level 0, of each sublayer.
    pub(crate) centres: Vec<usize>,
    /// Levels of the best so far.
    pub(crate) parent: Levels,
    /// Its divergence, in the generation that found or confirmed it.
    pub(crate) kl: Option<f64>,
}

/// A generation in the log.
#[derive(Serialize, Deserialize)]
struct Line {
    iteration: usize,
    generation: usize,
    levels: Levels,
    kl: f64,
    parent_kl: f64,
}

/// The folder of a search.
pub(crate) struct Folder {
    dir: PathBuf,
}

impl Folder {
    /// Opens or makes `dir` and returns the state that it was left in, if any.
    pub(crate) fn open(dir: &Path, identity: &Identity) -> Result<(Self, Option<State>)> {
        std::fs::create_dir_all(dir).map_err(|e| file_error(dir, e))?;
        let folder = Self { dir: dir.into() };
        let path = dir.join("run.json");
        match stored::read_json::<Identity>(&path)? {
            None => stored::write_json(&path, identity)?,
            Some(before) if before == *identity => {}
            Some(_) => {
                return Err(file_error(
                    &path,
                    "this folder holds a search of another model, text, ratio or with other options",
                ));
            }
        }
        let path = folder.state();
        let state: Option<State> = stored::read_json(&path)?;
        folder.trim_log(state.as_ref())?;
        Ok((folder, state))
    }

    fn state(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("log.jsonl")
    }

    /// Where the supernet of an iteration is.
    pub(crate) fn iteration(&self, iteration: usize) -> PathBuf {
        self.dir.join(format!("iteration-{iteration}"))
    }

    pub(crate) fn save(&self, state: &State) -> Result<()> {
        stored::write_json(&self.state(), state)
    }

    /// Adds the generation that `state` is about to count.
    pub(crate) fn record(&self, state: &State, best: &Best<Levels>) -> Result<()> {
        let line = Line {
            iteration: state.iteration,
            generation: state.generation,
            levels: best.candidate.clone(),
            kl: best.fitness,
            parent_kl: best.parent,
        };
        let append = || -> std::io::Result<()> {
            let mut text = serde_json::to_string(&line)?;
            text.push('\n');
            let mut options = std::fs::OpenOptions::new();
            options.create(true).append(true);
            options.open(self.log())?.write_all(text.as_bytes())
        };
        append().map_err(|e| file_error(&self.log(), e))
    }

    /// Drops what the log has beyond the state: a generation or a torn line that never counted.
    fn trim_log(&self, state: Option<&State>) -> Result<()> {
        let path = self.log();
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            text => text.map_err(|e| file_error(&path, e))?,
        };
        let counted = |line: &&str| -> bool {
            let place = |l: Line| (l.iteration, l.generation);
            let reached = state.map_or((0, 0), |s| (s.iteration, s.generation));
            serde_json::from_str(line).is_ok_and(|line| place(line) < reached)
        };
        let kept: String = text
            .lines()
            .filter(counted)
            .flat_map(|line| [line, "\n"])
            .collect();
        if kept == text {
            return Ok(());
        }
        Ok(atomic::write(&path, kept.as_bytes())?)
    }

    /// Removes supernets of iterations before this one.
    pub(crate) fn remove_before(&self, iteration: usize) -> Result<()> {
        for old in (0..iteration)
            .map(|i| self.iteration(i))
            .filter(|p| p.exists())
        {
            std::fs::remove_dir_all(&old).map_err(|e| file_error(&old, e))?;
        }
        Ok(())
    }
}
