//! Measured divergences, kept on disk: a run that was killed measures nothing twice.

use crate::error::Result;
use crate::menu::{Choices, Menu};
use causal_lm::{Decoder, Windows};
use prune_structured::Progress;
use prune_structured::divergence::{Fitness, Place, Sharing, Teacher};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use tensor_io::Hasher;
use tensor_io::atomic::{read_sealed_json, write_sealed_json};

/// Candidates between two writes of the file.
const BATCH: usize = 64;

/// A divergence from the dense model in nats per token, with its standard error by windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// Mean over all positions.
    pub mean: f64,
    /// Standard error of the mean, from the means of windows.
    pub error: f64,
    /// Windows.
    pub windows: usize,
}

impl Divergence {
    /// From the means of windows.
    pub fn of(windows: &[f64]) -> Self {
        let count = windows.len() as f64;
        let mean = windows.iter().sum::<f64>() / count.max(1.0);
        let square: f64 = windows.iter().map(|kl| (kl - mean).powi(2)).sum();
        let error = match windows.len() {
            0 | 1 => 0.0,
            _ => (square / (count - 1.0) / count).sqrt(),
        };
        Self {
            mean,
            error,
            windows: windows.len(),
        }
    }
}

/// Measures candidates.
pub(crate) struct Measurer<'a> {
    decoder: &'a Decoder<'a>,
    windows: Windows,
    pub(crate) teacher: Teacher,
    memory: usize,
    path: PathBuf,
    /// Means of windows by candidate and number of windows.
    known: BTreeMap<String, Vec<f64>>,
    /// Passes of the whole model so far, in this run; a candidate counts with the blocks behind its first change.
    pub(crate) passes: f64,
}

impl<'a> Measurer<'a> {
    pub(crate) fn new(
        decoder: &'a Decoder<'a>,
        windows: Windows,
        teacher: Teacher,
        memory: usize,
        path: PathBuf,
    ) -> Result<Self> {
        Ok(Self {
            decoder,
            windows,
            teacher,
            memory,
            known: read_sealed_json(&path)?.unwrap_or_default(),
            path,
            passes: 0.0,
        })
    }

    /// Windows of about this many tokens, the first ones.
    pub(crate) fn windows_for(&self, tokens: usize) -> usize {
        tokens
            .div_ceil(self.windows.window_len())
            .clamp(1, self.windows.count())
    }

    /// Divergences of candidates, each a choice for every menu, on the first `count` windows. They are variants of `base`,
    /// which decides only what they count as passes. Each candidate is a step of `progress`.
    pub(crate) fn of(
        &mut self,
        (choices, menus): (&Choices<'_>, &[Menu]),
        (candidates, base): (&[Vec<usize>], &[usize]),
        count: usize,
        progress: &dyn Progress,
    ) -> Result<Vec<Divergence>> {
        let windows: Vec<usize> = (0..count).collect();
        let keys: Vec<String> = candidates.iter().map(|c| key(menus, c, count)).collect();
        let mut missing: Vec<usize> = (0..keys.len())
            .filter(|&i| !self.known.contains_key(&keys[i]))
            .collect();
        missing.sort_by(|&a, &b| candidates[a].cmp(&candidates[b]));
        missing.dedup_by_key(|i| candidates[*i].clone());
        progress.advance((candidates.len() - missing.len()) as u64)?;
        for batch in missing.chunks(BATCH) {
            let of_batch: Vec<Vec<usize>> = batch.iter().map(|&i| candidates[i].clone()).collect();
            let fitness = Fitness {
                decoder: self.decoder,
                windows: &self.windows,
                teacher: &self.teacher,
                sites: choices,
                memory: self.memory,
                sharing: Sharing::Prefixes,
            };
            let found = fitness.by_window(&of_batch, &windows, progress, 0)?;
            for (&i, kl) in batch.iter().zip(found) {
                self.passes += passes(self.decoder, menus, &candidates[i], base);
                self.known.insert(keys[i].clone(), kl);
            }
            write_sealed_json(&self.path, &self.known)?;
            progress.advance(batch.len() as u64)?;
        }
        let of = |key: &String| Divergence::of(self.known.get(key).map_or(&[], Vec::as_slice));
        Ok(keys.iter().map(of).collect())
    }
}

/// Share of a pass that a candidate takes where the blocks before its first difference from `base` are shared.
pub(crate) fn passes(
    decoder: &Decoder<'_>,
    menus: &[Menu],
    candidate: &[usize],
    base: &[usize],
) -> f64 {
    let layers = decoder.config().layers();
    let first = (0..menus.len()).find(|&i| candidate[i] != base[i]);
    let before = match first.map(|i| menus[i].site.place()) {
        Some(Place::Embedding) | None => 0,
        Some(Place::Block(layer)) => layer,
        Some(Place::Head) => layers,
    };
    (layers - before) as f64 / layers.max(1) as f64
}

/// What a candidate is, for the file of results.
fn key(menus: &[Menu], candidate: &[usize], windows: usize) -> String {
    let mut hasher = Hasher::new();
    hasher.part(&windows.to_le_bytes());
    for (menu, &choice) in menus.iter().zip(candidate) {
        if choice != menu.dense {
            let treatment = menu.items[choice].treatment.to_string();
            hasher
                .part(menu.site.to_string().as_bytes())
                .part(treatment.as_bytes());
        }
    }
    hasher.finish().to_string()
}
