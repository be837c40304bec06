//! Fewer neurons in a file of compiled sizes: kept neurons come first, blocks of the others are left out, and what the others
//! said goes into the weights that read them, the read-outs of all layers among them.

use super::{
    BANDS, HIDDEN, INPUTS, OUTPUTS, Stored, WeightFile,
    network::{GATES, LAYERS},
};
use crate::{
    calibration::Calibration,
    error::{Error, Result},
    mask::{Mask, MaskSet},
    order::bits::BitMatrix,
    repair::{MergeConfig, Prediction, merge, numbers, predict},
    rnn::{Rnn, Role},
};

/// A small network in the sizes of the file: its neurons first, the others zero. Also the masks of the blocks that hold weights.
fn padded(whole: &Rnn, small: &Rnn) -> (Rnn, MaskSet) {
    let (mut padded, mut masks) = (whole.clone(), MaskSet::default());
    for role in small.roles() {
        let values = small.get(role);
        // Rows of a gate, and columns, before and after.
        let (gates, kept_rows, cols, kept_cols) = match role {
            Role::InputWeight(l) => {
                let read = l
                    .checked_sub(1)
                    .map_or(HIDDEN, |b| small.config().hidden[b]);
                (GATES, small.config().hidden[l], HIDDEN, read)
            }
            Role::RecurrentWeight(l) => {
                let n = small.config().hidden[l];
                (GATES, n, HIDDEN, n)
            }
            Role::Bias(l) => (GATES, small.config().hidden[l], 1, 1),
            Role::CandidateBias(l) => (1, small.config().hidden[l], 1, 1),
            // The read-outs are stored apart.
            _ => continue,
        };
        let mut out = vec![0.0; gates * HIDDEN * cols];
        for g in 0..gates {
            for i in 0..kept_rows {
                let from = &values[(g * kept_rows + i) * kept_cols..][..kept_cols];
                out[(g * HIDDEN + i) * cols..][..kept_cols].copy_from_slice(from);
            }
        }
        padded.set(role, out);
        if matches!(role, Role::InputWeight(_) | Role::RecurrentWeight(_)) {
            let rows = kept_rows.next_multiple_of(OUTPUTS);
            let cols = kept_cols.next_multiple_of(INPUTS);
            let keep =
                BitMatrix::from_fn(GATES * HIDDEN, HIDDEN, |i, j| i % HIDDEN < rows && j < cols);
            if let Some(name) = whole.name_of(role) {
                masks.insert(name, Mask::of_matrix(keep));
            }
        }
    }
    (padded, masks)
}

impl WeightFile {
    /// The file with only the neurons of its GRUs that are kept, three lists of flags; the states of the others are predicted from
    /// them ([`merge`](crate::repair::merge())). `calibration` is one of [`network`](Self::network). Returns the file and its network.
    ///
    /// # Errors
    /// Flags or a calibration that do not fit, or a file whose read-outs are not stored as floats alone.
    pub fn merged(
        &self,
        keep: &[Vec<bool>],
        calibration: &Calibration,
        config: &MergeConfig,
        stored: Stored,
    ) -> Result<(Self, Rnn)> {
        let whole = self.network()?;
        let small = merge(&whole, keep, calibration, config)?;
        let (padded, masks) = padded(&whole, &small);
        let mut file = self.clone();
        file.set_network(&padded, &masks, stored)?;
        let predictions = keep
            .iter()
            .zip(&calibration.layers)
            .map(|(keep, layer)| predict(&layer.after, keep, config))
            .collect::<Result<Vec<_>>>()?;
        let (weights, bias) = self.read_outs()?;
        let kept: Vec<Vec<usize>> = keep.iter().map(|flags| numbers(flags)).collect();
        let (weights, bias) = read_outs(&weights, &bias, &kept, &predictions);
        file.set_read_outs(&weights, &bias)?;
        let rnn = file.network()?;
        Ok((file, rnn))
    }

    fn set_read_outs(&mut self, weights: &[f32], bias: &[f32]) -> Result<()> {
        let seen = (LAYERS + 1) * HIDDEN;
        let mut first = 0;
        for (name, outputs) in [("dense_out", BANDS), ("vad_dense", 1)] {
            if self
                .arrays
                .iter()
                .any(|a| a.name == format!("{name}_weights_int8"))
            {
                return Err(Error::Setting {
                    setting: "weight file",
                    reason: format!("`{name}` is also stored in 8 bits, which is not written"),
                });
            }
            let rows = &weights[first * seen..(first + outputs) * seen];
            let transposed: Vec<f32> = (0..seen * outputs)
                .map(|e| rows[e % outputs * seen + e / outputs])
                .collect();
            self.set_floats(&format!("{name}_weights_float"), &transposed);
            self.set_floats(&format!("{name}_bias"), &bias[first..first + outputs]);
            first += outputs;
        }
        Ok(())
    }
}

/// Read-outs `[33, 4 * 384]` and `[33]` over the kept neurons, which come first in each layer.
fn read_outs(
    weights: &[f32],
    bias: &[f32],
    kept: &[Vec<usize>],
    predictions: &[Prediction],
) -> (Vec<f32>, Vec<f32>) {
    let seen = (LAYERS + 1) * HIDDEN;
    let mut out = vec![0.0; weights.len()];
    let mut constants = bias.to_vec();
    for (o, row) in weights.chunks_exact(seen).enumerate() {
        let to = &mut out[o * seen..(o + 1) * seen];
        to[..HIDDEN].copy_from_slice(&row[..HIDDEN]);
        for (l, prediction) in predictions.iter().enumerate() {
            let w = &row[(l + 1) * HIDDEN..(l + 2) * HIDDEN];
            let sum = |of: &dyn Fn(usize) -> f64| -> f32 {
                let products = w.iter().enumerate().map(|(i, &w)| f64::from(w) * of(i));
                products.sum::<f64>() as f32
            };
            for k in 0..kept[l].len() {
                to[(l + 1) * HIDDEN + k] = sum(&|i| prediction.matrix[(i, k)]);
            }
            constants[o] += sum(&|i| prediction.offset[i]);
        }
    }
    (out, constants)
}

#[cfg(test)]
mod tests {
    use super::super::network::tests::file;
    use super::*;
    use crate::{
        NoProgress,
        calibration::{RecordConfig, record},
        data::{Examples, Inputs, Sequences, Targets},
        rnnoise::FEATURES,
    };

    #[test]
    fn a_merged_file_is_smaller_and_computes_nearly_the_same_with_fewer_neurons() {
        let mut original = file();
        let mut copied = original.network().unwrap();
        for l in 0..LAYERS {
            for role in [
                Role::InputWeight(l),
                Role::RecurrentWeight(l),
                Role::Bias(l),
                Role::CandidateBias(l),
            ] {
                let mut w = copied.get(role).to_vec();
                let gates = if role == Role::CandidateBias(l) {
                    1
                } else {
                    GATES
                };
                let cols = w.len() / (gates * HIDDEN);
                if role == Role::RecurrentWeight(l) {
                    // Small, so that states forget and rounding does not grow.
                    w.iter_mut().for_each(|w| *w *= 0.1);
                }
                // Neurons 100 and up are copies of the first ones in all that they read.
                for row in 0..gates * HIDDEN {
                    let from = (row / HIDDEN * HIDDEN + row % HIDDEN % 100) * cols;
                    w.copy_within(from..from + cols, row * cols);
                }
                copied.set(role, w);
            }
        }
        original
            .set_network(&copied, &MaskSet::default(), Stored::Floats)
            .unwrap();
        let rnn = original.network().unwrap();
        let frames = 300;
        let features: Vec<f32> = (0..frames * FEATURES)
            .map(|k| (k as f32 * 0.37).sin() * (1.0 + (k / FEATURES) as f32 * 0.01))
            .collect();
        let inputs = Inputs::Vectors {
            dim: HIDDEN,
            values: original.convolutions(&features).unwrap(),
        };
        let targets = Targets::Classes(vec![0]);
        let examples = Examples::Sequences(Sequences::new(inputs, &[frames], targets).unwrap());
        let calibration = record(&rnn, &examples, &RecordConfig::default(), &NoProgress).unwrap();
        // One of each hundred, out of order, so that the neurons are renumbered.
        let stays = |l: usize, i: usize| i / 100 == if i % 100 < 50 { 1 } else { l };
        let keep: Vec<Vec<bool>> = (0..LAYERS)
            .map(|l| (0..HIDDEN).map(|i| stays(l, i)).collect())
            .collect();
        let config = MergeConfig::default().with(|c| c.ridge = 1e-12);
        let (merged, padded) = original
            .merged(&keep, &calibration, &config, Stored::Floats)
            .unwrap();
        // The hundred that stay come first; the others read and say nothing.
        for l in 0..LAYERS {
            let layer = padded.layer(l);
            for (row, w) in layer.w_hh.chunks_exact(HIDDEN).enumerate() {
                let stays = row % HIDDEN < 100;
                assert!(w[100..].iter().all(|w| *w == 0.0));
                assert_eq!(w.iter().any(|w| *w != 0.0), stays, "{l} {row}");
            }
        }
        let (was, now) = (
            original.to_bytes().unwrap().len(),
            merged.to_bytes().unwrap().len(),
        );
        assert!(now < was / 2, "{now} of {was}");
        let (gains, voice) = original.run(&rnn, &features).unwrap();
        let (small_gains, small_voice) = merged.run(&padded, &features).unwrap();
        let farthest = |(g, v): (&[f32], &[f32])| {
            let pairs = gains.iter().chain(&voice).zip(g.iter().chain(v));
            pairs.fold(0f32, |m, (a, b)| m.max((a - b).abs()))
        };
        let far = farthest((&small_gains, &small_voice));
        assert!(far < 2e-3, "{far}");
        // With the old read-outs the neurons that are gone are missed.
        let (g, v) = original.run(&padded, &features).unwrap();
        assert!(farthest((&g, &v)) > 0.05);
        assert!(
            original
                .merged(&keep[..2], &calibration, &config, Stored::Floats)
                .is_err()
        );
    }
}
