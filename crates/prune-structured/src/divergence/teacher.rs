//! What the dense model predicts on the windows of a search: its top-k logits, computed once.
//!
//! Kept on disk as probabilities over the k tokens, in one file for each batch of windows, so that
//! memory does not grow with the number of windows: `(4 k + 4 k + 8)` bytes for each position, of
//! which the last of a window is left out.

use crate::stored::{self, Tensors};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::{BATCH_TOKENS, Decoder, Hidden, NoTap, Progress, Windows, run_blocks};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tensor_io::{ContentHash, Hasher};

/// Bytes of hidden states held while the dense model runs.
const HIDDEN_BYTES: usize = 512 << 20;
/// Logits held at once.
const LOGITS: usize = 8 << 20;
/// Tensors of a file.
const NAMES: [&str; 3] = ["ids", "probabilities", "negentropy"];

/// Top-k predictions of the dense model.
#[derive(Clone, Debug)]
pub struct Teacher {
    dir: PathBuf,
    top_k: usize,
    per_file: usize,
    /// Predicted positions of a window.
    rows: usize,
}

/// Predictions of some windows, one row for each position but the last of a window.
pub(crate) struct Predictions {
    top_k: usize,
    /// Tokens, `[rows, k]`.
    ids: Vec<u32>,
    /// Their probabilities, renormalised, `[rows, k]`.
    probabilities: Vec<f32>,
    /// Σ p ln p of each row.
    negentropy: Vec<f64>,
}

/// What decides the predictions: files of anything else are not read.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Identity {
    weights: ContentHash,
    windows: ContentHash,
    top_k: usize,
    dtype: String,
}

impl Teacher {
    /// Runs the dense model over `windows` and keeps its `top_k` logits in files in `dir`, which must exist. Files that
    /// are there are used when they are of the same weights, windows and k, and replaced otherwise. `weights` is the
    /// hash of the decoder's checkpoint; a step of `progress` is a block on a group of windows.
    ///
    /// # Errors
    /// What running the model and writing files report, [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn new(
        decoder: &Decoder<'_>,
        windows: &Windows,
        top_k: usize,
        (dir, weights): (impl Into<PathBuf>, ContentHash),
        progress: &dyn Progress,
    ) -> Result<Self> {
        let len = windows.window_len();
        let teacher = Self {
            dir: dir.into(),
            top_k: top_k.min(decoder.config().vocab),
            per_file: (BATCH_TOKENS / len).max(1),
            rows: len - 1,
        };
        teacher.forget_others(&Identity {
            weights,
            windows: hash_of(windows),
            top_k: teacher.top_k,
            dtype: decoder.dtype().as_str().into(),
        })?;
        let window_bytes = len * decoder.config().hidden * decoder.dtype().size_in_bytes();
        let files_at_once = (HIDDEN_BYTES / window_bytes / teacher.per_file).max(1);
        let groups: Vec<Windows> = windows.groups(files_at_once * teacher.per_file).collect();
        let layers = decoder.config().layers() as u64;
        progress.begin(
            "predictions of the dense model",
            groups.len() as u64 * layers,
        );
        let mut file = 0;
        for group in groups {
            let files = group.count().div_ceil(teacher.per_file);
            if (file..file + files).all(|file| teacher.path(file).exists()) {
                file += files;
                progress.advance(layers)?;
                continue;
            }
            let hidden: Hidden = run_blocks(decoder, &group, &mut NoTap, progress)?;
            let head = decoder.head()?;
            // The batches of hidden states are the files.
            for batch in hidden.batches() {
                teacher.save(file, &head, batch)?;
                file += 1;
            }
        }
        Ok(teacher)
    }

    /// Removes predictions of another model, other windows or another k, and notes whose the next ones are.
    fn forget_others(&self, identity: &Identity) -> Result<()> {
        let note = self.dir.join("teacher.json");
        if stored::read_json(&note)?.as_ref() == Some(identity) {
            return Ok(());
        }
        for file in (0..).map(|file| self.path(file)) {
            match std::fs::remove_file(&file) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
                Err(error) => return Err(stored::damaged(&file, error)),
            }
        }
        stored::write_json(&note, identity)
    }

    fn path(&self, file: usize) -> PathBuf {
        self.dir.join(format!("teacher-{file}.safetensors"))
    }

    fn save(&self, file: usize, head: &causal_lm::Head, batch: &Tensor) -> Result<()> {
        let (mut ids, mut probabilities, mut negentropy) = (vec![], vec![], vec![]);
        logits(head, batch, &mut |logits| {
            let vocab = head.vocab_size();
            let rows: Vec<_> = logits
                .par_chunks(vocab)
                .map(|row| top(row, self.top_k))
                .collect();
            for (row_ids, row, entropy) in rows {
                ids.extend(row_ids);
                probabilities.extend(row);
                negentropy.push(entropy);
            }
        })?;
        let rows = negentropy.len();
        let ids = Tensor::from_vec(ids, (rows, self.top_k), &Device::Cpu)?;
        let probabilities = Tensor::from_vec(probabilities, (rows, self.top_k), &Device::Cpu)?;
        let negentropy = Tensor::from_vec(negentropy, rows, &Device::Cpu)?;
        let tensors = NAMES.map(String::from).into_iter();
        let tensors: Vec<_> = tensors.zip([ids, probabilities, negentropy]).collect();
        stored::write_tensors(&self.path(file), &tensors)
    }

    /// How far another model's predictions on the given windows are from these: the mean KL divergence in nats over the
    /// positions of each window. `windows` are those that this teacher has seen; a step of `progress` is a block.
    ///
    /// # Errors
    /// [`causal_lm::Error::NonFinite`] where logits are not finite, what running the model reports,
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn divergence(
        &self,
        decoder: &Decoder<'_>,
        windows: &Windows,
        places: &[usize],
        progress: &dyn Progress,
    ) -> Result<Vec<f64>> {
        let picked = windows.pick(places);
        let hidden = run_blocks(decoder, &picked, &mut NoTap, progress)?;
        let head = decoder.head()?;
        let mut found = Vec::with_capacity(places.len());
        for batch in hidden.batches() {
            let places = &places[found.len()..found.len() + batch.dim(0)?];
            let predictions = self.predictions(places)?;
            found.extend(predictions.by_window(&head, batch, places)?);
        }
        Ok(found)
    }

    /// Predictions of the given windows, in their order.
    pub(crate) fn predictions(&self, windows: &[usize]) -> Result<Predictions> {
        let mut open: Option<(usize, Vec<Tensor>)> = None;
        let mut found = Predictions {
            top_k: self.top_k,
            ids: vec![],
            probabilities: vec![],
            negentropy: vec![],
        };
        for &window in windows {
            let (file, place) = (window / self.per_file, window % self.per_file);
            if open.as_ref().is_none_or(|(number, _)| *number != file) {
                let stored = Tensors::open(&self.path(file))?;
                let read = |name| stored.load(name);
                let tensors = NAMES.into_iter().map(read).collect::<Result<_>>()?;
                open = Some((file, tensors));
            }
            let rows = |i: usize| -> Result<Tensor> {
                let (_, tensors) = open.as_ref().expect("just opened");
                Ok(tensors[i]
                    .narrow(0, place * self.rows, self.rows)?
                    .flatten_all()?)
            };
            found.ids.extend(rows(0)?.to_vec1::<u32>()?);
            found.probabilities.extend(rows(1)?.to_vec1::<f32>()?);
            found.negentropy.extend(rows(2)?.to_vec1::<f64>()?);
        }
        Ok(found)
    }
}

impl Predictions {
    /// Mean KL divergence over the positions of each of `windows`, whose hidden states behind the last block are `batch`.
    pub(crate) fn by_window(
        &self,
        head: &causal_lm::Head,
        batch: &Tensor,
        windows: &[usize],
    ) -> Result<Vec<f64>> {
        let mut rows = Vec::new();
        logits(head, batch, &mut |logits| {
            rows.extend(self.divergences(rows.len(), logits, head.vocab_size()));
        })?;
        let len = batch.dim(1)? - 1;
        if let Some(row) = rows.iter().position(|kl| !kl.is_finite()) {
            return Err(Error::Model(causal_lm::Error::NonFinite {
                stage: "the logits of a compressed model".into(),
                window: windows[row / len],
                position: row % len,
            }));
        }
        let mean = |rows: &[f64]| rows.iter().sum::<f64>() / len as f64;
        Ok(rows.chunks_exact(len).map(mean).collect())
    }

    /// KL(teacher ‖ student) of every row in nats, both renormalised over the teacher's tokens.
    /// `logits` are the student's of rows `start ..`, `[rows, vocab]`.
    pub(crate) fn divergences(&self, start: usize, logits: &[f32], vocab: usize) -> Vec<f64> {
        let k = self.top_k;
        let row = |(i, logits): (usize, &[f32])| {
            let at = (start + i) * k;
            let (ids, p) = (&self.ids[at..at + k], &self.probabilities[at..at + k]);
            let max = ids
                .iter()
                .fold(f32::NEG_INFINITY, |max, &id| max.max(logits[id as usize]));
            // Partial sums of 64 in f32, then f64.
            let (mut partition, mut agreement) = (0f64, 0f64);
            for (ids, p) in ids.chunks(64).zip(p.chunks(64)) {
                let (mut sum, mut along) = (0f32, 0f32);
                for (&id, p) in ids.iter().zip(p) {
                    let z = logits[id as usize] - max;
                    sum += z.exp();
                    along += p * z;
                }
                partition += f64::from(sum);
                agreement += f64::from(along);
            }
            self.negentropy[start + i] + partition.ln() - agreement
        };
        logits.chunks_exact(vocab).enumerate().map(row).collect()
    }
}

/// Hash of the tokens of windows and of their length.
pub(crate) fn hash_of(windows: &Windows) -> ContentHash {
    let mut hasher = Hasher::new();
    windows.iter().for_each(|window| {
        hasher.tokens(window);
    });
    hasher.finish()
}

/// Calls `f` with the logits of all positions but each window's last, in pieces, `[rows, vocab]`.
pub(crate) fn logits(
    head: &causal_lm::Head,
    batch: &Tensor,
    f: &mut dyn FnMut(&[f32]),
) -> Result<()> {
    let (count, len, width) = batch.dims3()?;
    let rows = batch
        .narrow(1, 0, len - 1)?
        .reshape((count * (len - 1), width))?;
    let all = rows.dim(0)?;
    let step = (LOGITS / head.vocab_size()).max(1);
    for start in (0..all).step_by(step) {
        let piece = head.forward(&rows.narrow(0, start, step.min(all - start))?)?;
        let piece = piece.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        f(&piece.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(())
}

/// The k largest logits: tokens ascending, softmax over them, Σ p ln p. Equal logits go by token.
fn top(logits: &[f32], k: usize) -> (Vec<u32>, Vec<f32>, f64) {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, |&a, &b| {
            let logit = |id: u32| logits[id as usize];
            logit(b).total_cmp(&logit(a)).then(a.cmp(&b))
        });
        ids.truncate(k);
        ids.sort_unstable();
    }
    let kept = || ids.iter().map(|&id| f64::from(logits[id as usize]));
    let max = kept().fold(f64::NEG_INFINITY, f64::max);
    let partition: f64 = kept().map(|z| (z - max).exp()).sum();
    let log = |z: f64| z - max - partition.ln();
    let negentropy = kept().map(|z| log(z).exp() * log(z)).sum();
    let probabilities = kept().map(|z| log(z).exp() as f32).collect();
    (ids, probabilities, negentropy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn predictions(logits: &[f32], k: usize) -> Predictions {
        let (ids, probabilities, entropy) = top(logits, k);
        Predictions {
            top_k: k,
            ids,
            probabilities,
            negentropy: vec![entropy],
        }
    }

    /// Textbook definition over the tokens of `ids`.
    fn naive(teacher: &[f32], student: &[f32], ids: &[usize]) -> f64 {
        let log_softmax = |logits: &[f32]| -> Vec<f64> {
            let of = |id: usize| f64::from(logits[id]);
            let partition = ids.iter().map(|&id| of(id).exp()).sum::<f64>().ln();
            ids.iter().map(|&id| of(id) - partition).collect()
        };
        let (p, q) = (log_softmax(teacher), log_softmax(student));
        p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
    }

    proptest! {
        #[test]
        fn the_divergence_is_kl_over_the_top_k_and_full_kl_for_the_whole_vocabulary(
            pairs in prop::collection::vec((-8f32..8.0, -8f32..8.0), 150),
            k in 1usize..150,
        ) {
            let (teacher, student): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let mut ids: Vec<usize> = (0..150).collect();
            let full = predictions(&teacher, 150).divergences(0, &student, 150)[0];
            prop_assert!((full - naive(&teacher, &student, &ids)).abs() < 1e-5);
            ids.sort_by(|&a, &b| teacher[b].total_cmp(&teacher[a]));
            let of_top = predictions(&teacher, k).divergences(0, &student, 150)[0];
            prop_assert!((of_top - naive(&teacher, &student, &ids[..k])).abs() < 1e-5);
            let own = predictions(&teacher, k).divergences(0, &teacher, 150)[0];
            prop_assert!(own.abs() < 1e-6, "{own}");
        }
    }
}
