//! What the dense model predicts on the windows of a search: its top-k logits, computed once.
//!
//! Kept on disk as probabilities over the k tokens, in one file for each batch of windows, so that
//! memory does not grow with the number of windows: `(4 k + 4 k + 16)` bytes for each position, of
//! which the last of a window is left out.

use crate::stored::{self, Tensors};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::{BATCH_TOKENS, Decoder, Hidden, NoTap, Progress, Windows, run_blocks, sum_exp};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tensor_io::{ContentHash, Hasher};

/// Bytes of hidden states held while the dense model runs.
const HIDDEN_BYTES: usize = 512 << 20;
/// Logits held at once.
const LOGITS: usize = 8 << 20;
/// Tensors of a file.
const NAMES: [&str; 4] = ["ids", "probabilities", "negentropy", "rest"];
/// The least that the student's sum over the tokens of the rest counts as, where it underflows.
const LEAST_REST: f64 = f32::MIN_POSITIVE as f64;

/// Which predictions of the dense model are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopK {
    /// The most likely tokens, so many.
    pub k: usize,
    /// Whether all other tokens together count as one more; otherwise both sides are renormalised over the k tokens, as
    /// Týr does.
    pub rest: bool,
}

impl TopK {
    /// The k most likely tokens, renormalised.
    pub fn renormalised(k: usize) -> Self {
        Self { k, rest: false }
    }

    /// The k most likely tokens and one bucket for the rest. Never more than the divergence over the whole vocabulary.
    pub fn with_rest(k: usize) -> Self {
        Self { k, rest: true }
    }
}

/// Top-k predictions of the dense model.
#[derive(Clone, Debug)]
pub struct Teacher {
    dir: PathBuf,
    top_k: TopK,
    per_file: usize,
    /// Predicted positions of a window.
    rows: usize,
}

/// Predictions of some windows, one row for each position but the last of a window.
pub(crate) struct Predictions {
    top_k: usize,
    /// Tokens, `[rows, k]`.
    ids: Vec<u32>,
    /// Their probabilities, `[rows, k]`.
    probabilities: Vec<f32>,
    /// Σ p ln p of each row, that of the rest among them.
    negentropy: Vec<f64>,
    /// Probability of all other tokens; 0 where it is left out.
    rest: Vec<f64>,
}

/// What decides the predictions: files of anything else are not read.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Identity {
    weights: ContentHash,
    windows: ContentHash,
    top_k: TopK,
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
        top_k: TopK,
        (dir, weights): (impl Into<PathBuf>, ContentHash),
        progress: &dyn Progress,
    ) -> Result<Self> {
        let len = windows.window_len();
        let teacher = Self {
            dir: dir.into(),
            top_k: TopK {
                k: top_k.k.min(decoder.config().vocab),
                ..top_k
            },
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
        let note = self.dir.join("predictions.json");
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
        let (mut ids, mut probabilities) = (vec![], vec![]);
        let (mut negentropy, mut rest) = (vec![], vec![]);
        logits(head, batch, &mut |logits| {
            let vocab = head.vocab_size();
            let rows: Vec<_> = logits
                .par_chunks(vocab)
                .map(|row| top(row, self.top_k))
                .collect();
            for row in rows {
                ids.extend(row.ids);
                probabilities.extend(row.probabilities);
                negentropy.push(row.negentropy);
                rest.push(row.rest);
            }
        })?;
        let (rows, k) = (negentropy.len(), self.top_k.k);
        let ids = Tensor::from_vec(ids, (rows, k), &Device::Cpu)?;
        let probabilities = Tensor::from_vec(probabilities, (rows, k), &Device::Cpu)?;
        let negentropy = Tensor::from_vec(negentropy, rows, &Device::Cpu)?;
        let rest = Tensor::from_vec(rest, rows, &Device::Cpu)?;
        let tensors = NAMES.map(String::from).into_iter();
        let tensors: Vec<_> = tensors
            .zip([ids, probabilities, negentropy, rest])
            .collect();
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
            top_k: self.top_k.k,
            ids: vec![],
            probabilities: vec![],
            negentropy: vec![],
            rest: vec![],
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
            found.rest.extend(rows(3)?.to_vec1::<f64>()?);
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

    /// KL(teacher ‖ student) of every row in nats, over the teacher's tokens and the rest where it counts.
    /// `logits` are the student's of rows `start ..`, `[rows, vocab]`.
    pub(crate) fn divergences(&self, start: usize, logits: &[f32], vocab: usize) -> Vec<f64> {
        let k = self.top_k;
        let row = |(i, logits): (usize, &[f32])| {
            let at = (start + i) * k;
            let (ids, p) = (&self.ids[at..at + k], &self.probabilities[at..at + k]);
            let rest = self.rest[start + i];
            let largest = |max: f32, z: f32| max.max(z);
            let max = match rest > 0.0 {
                true => logits.iter().copied().fold(f32::NEG_INFINITY, largest),
                false => {
                    let kept = ids.iter().map(|&id| logits[id as usize]);
                    kept.fold(f32::NEG_INFINITY, largest)
                }
            };
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
            if rest > 0.0 {
                let mut others = logits.to_vec();
                for &id in ids {
                    others[id as usize] = f32::NEG_INFINITY;
                }
                // Not by a difference of sums, which would lose a small rest; a NaN stays.
                let sum = sum_exp(&others, max);
                let sum = if sum < LEAST_REST { LEAST_REST } else { sum };
                partition += sum;
                agreement += rest * sum.ln();
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

/// What is kept of a row of logits.
struct Top {
    /// The tokens with the largest logits, ascending; equal logits go by token.
    ids: Vec<u32>,
    probabilities: Vec<f32>,
    /// Σ p ln p.
    negentropy: f64,
    /// Probability of all other tokens; 0 where the others are renormalised.
    rest: f64,
}

/// The largest logits, with their softmax.
fn top(logits: &[f32], TopK { k, rest }: TopK) -> Top {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let mut others = Vec::new();
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, |&a, &b| {
            let logit = |id: u32| logits[id as usize];
            logit(b).total_cmp(&logit(a)).then(a.cmp(&b))
        });
        others = ids.split_off(k);
        ids.sort_unstable();
    }
    let logit = |&id: &u32| f64::from(logits[id as usize]);
    let max = ids.iter().map(logit).fold(f64::NEG_INFINITY, f64::max);
    let sum = |ids: &[u32]| -> f64 { ids.iter().map(|id| (logit(id) - max).exp()).sum() };
    let of_rest = if rest { sum(&others) } else { 0.0 };
    let partition = sum(&ids) + of_rest;
    let log = |id: &u32| logit(id) - max - partition.ln();
    let kept: f64 = ids.iter().map(|id| log(id).exp() * log(id)).sum();
    let rest = of_rest / partition;
    let bucket = if rest > 0.0 { rest * rest.ln() } else { 0.0 };
    Top {
        probabilities: ids.iter().map(|id| log(id).exp() as f32).collect(),
        negentropy: kept + bucket,
        rest,
        ids,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn predictions(logits: &[f32], top_k: TopK) -> Predictions {
        let row = top(logits, top_k);
        Predictions {
            top_k: top_k.k,
            ids: row.ids,
            probabilities: row.probabilities,
            negentropy: vec![row.negentropy],
            rest: vec![row.rest],
        }
    }

    fn log_softmax(logits: &[f32], ids: &[usize]) -> Vec<f64> {
        let of = |id: usize| f64::from(logits[id]);
        let partition = ids.iter().map(|&id| of(id).exp()).sum::<f64>().ln();
        ids.iter().map(|&id| of(id) - partition).collect()
    }

    /// Textbook definition over the tokens of `ids`.
    fn naive(teacher: &[f32], student: &[f32], ids: &[usize]) -> f64 {
        let (p, q) = (log_softmax(teacher, ids), log_softmax(student, ids));
        p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
    }

    /// The same over the first `k` of `ids` and all others together.
    fn naive_with_rest(teacher: &[f32], student: &[f32], ids: &[usize], k: usize) -> f64 {
        let (p, q) = (log_softmax(teacher, ids), log_softmax(student, ids));
        let bucket = |logs: &[f64]| logs[k..].iter().map(|log| log.exp()).sum::<f64>();
        let kept: f64 = (0..k).map(|i| p[i].exp() * (p[i] - q[i])).sum();
        match bucket(&p) > 0.0 {
            true => kept + bucket(&p) * (bucket(&p) / bucket(&q)).ln(),
            false => kept,
        }
    }

    proptest! {
        #[test]
        fn the_divergence_is_kl_over_the_top_k_and_full_kl_for_the_whole_vocabulary(
            pairs in prop::collection::vec((-8f32..8.0, -8f32..8.0), 150),
            k in 1usize..150,
        ) {
            let (teacher, student): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let mut ids: Vec<usize> = (0..150).collect();
            let of = |top_k, student: &[f32]| predictions(&teacher, top_k).divergences(0, student, 150)[0];
            let full = of(TopK::renormalised(150), &student);
            prop_assert!((full - naive(&teacher, &student, &ids)).abs() < 1e-5);
            prop_assert!((full - of(TopK::with_rest(150), &student)).abs() < 1e-6);
            ids.sort_by(|&a, &b| teacher[b].total_cmp(&teacher[a]));
            let of_top = of(TopK::renormalised(k), &student);
            prop_assert!((of_top - naive(&teacher, &student, &ids[..k])).abs() < 1e-5);
            let with_rest = of(TopK::with_rest(k), &student);
            let expected = naive_with_rest(&teacher, &student, &ids, k);
            prop_assert!((with_rest - expected).abs() < 1e-5, "{with_rest} {expected}");
            // Tokens that are counted together can only hide differences.
            prop_assert!(with_rest <= full + 1e-5, "{with_rest} {full}");
            for top_k in [TopK::renormalised(k), TopK::with_rest(k)] {
                let own = of(top_k, &teacher);
                prop_assert!(own.abs() < 1e-6, "{own}");
            }
        }
    }

    #[test]
    fn a_student_that_forgets_all_other_tokens_is_far_away_and_not_infinitely_so() {
        let teacher = [1.0f32, 0.5, 0.0, -0.5];
        let student = [1.0f32, 0.5, -300.0, -300.0];
        let of = |top_k| predictions(&teacher, top_k).divergences(0, &student, 4)[0];
        assert!(of(TopK::renormalised(2)).abs() < 1e-6);
        let found = of(TopK::with_rest(2));
        assert!(found > 10.0 && found.is_finite(), "{found}");
    }
}
