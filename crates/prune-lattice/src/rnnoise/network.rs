//! The network inside a weight file: two convolutions over three frames, three GRUs, two read-outs.
//!
//! The library keeps gates as z, r, h and the diagonals of the recurrent matrices apart from their blocks; here they are r, z,
//! n with the diagonal in its place, as everywhere in this crate.

use super::{Array, INPUTS, INT, INT8, OUTPUTS, WeightFile, blocks};
use crate::{
    error::{Error, Result},
    mask::MaskSet,
    names::named,
    order::bits::BitMatrix,
    rnn::{CheckpointNames, Rnn},
};
use candle_core::{Device, Tensor};
use std::collections::HashMap;

/// Components of a frame's features.
pub const FEATURES: usize = 65;
/// Bands with a gain each.
pub const BANDS: usize = 32;
/// Neurons of every GRU, and outputs of the second convolution.
pub const HIDDEN: usize = 384;
pub(super) const LAYERS: usize = 3;
const FIRST: usize = 128;
const FRAMES: usize = 3;
pub(super) const GATES: usize = 3;
/// Position of each gate (r, z, n) in the library's order (z, r, h).
const POSITION: [usize; GATES] = [1, 0, 2];

named! {
    /// How a pruned network is stored.
    #[derive(Default)]
    pub enum Stored as "storage" {
        /// Floats, which the library takes, beside the weights of 8 bits that it asks for.
        #[default]
        Floats = "floats",
        /// Weights of 8 bits only: smaller and faster.
        Integers = "int8",
    }
}

/// How the weights of this network are best solved again under masks of blocks: a strong pull to the old ones, and biases as they
/// were.
#[cfg(feature = "train")]
pub fn refit_config() -> crate::repair::RefitConfig {
    crate::repair::RefitConfig::default().with(|c| {
        c.ridge = 1e-2;
        c.constant = false;
    })
}

/// The two orders of rows are exchanged by the same permutation of gates.
fn swap_gates<T: Copy>(rows: &[T]) -> Vec<T> {
    let gate = rows.len() / GATES;
    POSITION
        .iter()
        .flat_map(|p| rows[p * gate..(p + 1) * gate].iter().copied())
        .collect()
}

/// Input and recurrent side of a GRU.
const SIDES: [(&str, &str); 2] = [("input", "ih"), ("recurrent", "hh")];

impl WeightFile {
    /// A GRU's matrix `[3 * 384, 384]` in PyTorch's order, diagonal included.
    fn gru_matrix(&self, layer: usize, side: &str) -> Result<Vec<f32>> {
        let name = format!("gru{}_{side}_weights", layer + 1);
        let mut matrix = self.matrix(&name, GATES * HIDDEN, HIDDEN)?;
        if side == "recurrent" {
            let diagonal = self.floats(&format!("{name}_diag"), GATES * HIDDEN)?;
            for (row, d) in diagonal.iter().enumerate() {
                matrix[row * HIDDEN + row % HIDDEN] += d;
            }
        }
        Ok(swap_gates(&matrix))
    }

    /// The three GRUs as one stack that reads the output of the second convolution. Its read-out is the part of the read-outs
    /// that sees the last GRU: 32 gains and the voice probability, before the sigmoid.
    ///
    /// # Errors
    /// An array is missing or has another size.
    pub fn network(&self) -> Result<Rnn> {
        let mut tensors = HashMap::new();
        let mut put = |name: String, values: Vec<f32>, shape: &[usize]| -> Result<()> {
            tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
            Ok(())
        };
        for l in 0..LAYERS {
            for (side, short) in SIDES {
                let matrix = self.gru_matrix(l, side)?;
                let shape = [GATES * HIDDEN, HIDDEN];
                put(format!("gru.weight_{short}_l{l}"), matrix, &shape)?;
                let bias = self.floats(&format!("gru{}_{side}_bias", l + 1), GATES * HIDDEN)?;
                let bias = swap_gates(&bias);
                put(format!("gru.bias_{short}_l{l}"), bias, &[GATES * HIDDEN])?;
            }
        }
        let (weights, bias) = self.read_outs()?;
        let seen = (LAYERS + 1) * HIDDEN;
        let last = weights
            .chunks_exact(seen)
            .flat_map(|row| row[LAYERS * HIDDEN..].to_vec());
        put("out.weight".into(), last.collect(), &[BANDS + 1, HIDDEN])?;
        put("out.bias".into(), bias, &[BANDS + 1])?;
        Rnn::from_tensors(
            &tensors,
            &CheckpointNames::default().with(|n| n.dense_input = true),
        )
    }

    /// What the read-outs of [`network`](Self::network) do not hold: for each GRU the weights, `[33, 384]`, with which the gains
    /// and the voice probability read it directly, none for the last one. As
    /// [`PruneContext::readers`](crate::prune::PruneContext::readers).
    ///
    /// # Errors
    /// An array is missing or has another size.
    pub fn readers(&self) -> Result<Vec<Vec<f32>>> {
        let (weights, _) = self.read_outs()?;
        let rows = || weights.chunks_exact((LAYERS + 1) * HIDDEN);
        let of = |l: usize| match l + 1 < LAYERS {
            true => rows()
                .flat_map(|row| &row[(l + 1) * HIDDEN..(l + 2) * HIDDEN])
                .copied()
                .collect(),
            false => Vec::new(),
        };
        Ok((0..LAYERS).map(of).collect())
    }

    /// Both read-outs, `[33, 4 * 384]` and `[33]`: gains, then the voice probability.
    pub(super) fn read_outs(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let seen = (LAYERS + 1) * HIDDEN;
        let (mut weights, mut bias) = (Vec::new(), Vec::new());
        for (name, outputs) in [("dense_out", BANDS), ("vad_dense", 1)] {
            let stored = self.floats(&format!("{name}_weights_float"), seen * outputs)?;
            for o in 0..outputs {
                weights.extend(stored[o..].iter().step_by(outputs));
            }
            bias.extend(self.floats(&format!("{name}_bias"), outputs)?);
        }
        Ok((weights, bias))
    }

    /// Stores a pruned network in place of the one in the file. Masks must consist of 8x4 blocks, diagonals of the recurrent
    /// gates aside. Arrays of matrices that did not change stay as they are.
    ///
    /// # Errors
    /// Another shape than the network of the file, or [`Error::PartialBlock`].
    pub fn set_network(&mut self, rnn: &Rnn, masks: &MaskSet, stored: Stored) -> Result<()> {
        let old = self.network()?;
        if old.config() != rnn.config() {
            return Err(Error::Shape {
                tensor: "network".into(),
                expected: format!("{:?}", old.config()),
                found: rnn.config().hidden.clone(),
            });
        }
        let mut changed = Vec::new();
        for l in 0..LAYERS {
            let (new, before) = (rnn.layer(l), old.layer(l));
            for (side, short) in SIDES {
                let (w, was) = match side {
                    "input" => (new.w_ih, before.w_ih),
                    _ => (new.w_hh, before.w_hh),
                };
                let mask = masks.get(&format!("gru.weight_{short}_l{l}"));
                if w == was && mask.is_none() && stored == Stored::Floats {
                    continue;
                }
                let all = BitMatrix::ones(GATES * HIDDEN, HIDDEN);
                let keep = mask.map_or(&all, |m| m.keep());
                self.set_gru_matrix(l, side, w, keep, stored)?;
                changed.push((l, side));
            }
            if new.bias != before.bias || new.candidate_bias != before.candidate_bias {
                // The recurrent bias of r and z stays; the input's takes the difference.
                let name = |side: &str| format!("gru{}_{side}_bias", l + 1);
                let mut recurrent = swap_gates(&self.floats(&name("recurrent"), GATES * HIDDEN)?);
                let joined = 2 * HIDDEN;
                let mut input = new.bias.to_vec();
                let pairs = input[..joined].iter_mut().zip(&recurrent[..joined]);
                pairs.for_each(|(i, r)| *i -= r);
                recurrent[joined..].copy_from_slice(new.candidate_bias.unwrap_or_default());
                self.set_floats(&name("input"), &swap_gates(&input));
                self.set_floats(&name("recurrent"), &swap_gates(&recurrent));
                changed.extend(SIDES.map(|(side, _)| (l, side)));
            }
        }
        // The offsets of integer products follow from codes and biases.
        changed
            .into_iter()
            .try_for_each(|(l, side)| self.set_offset(l, side))
    }

    fn set_gru_matrix(
        &mut self,
        layer: usize,
        side: &str,
        w: &[f32],
        keep: &BitMatrix,
        stored: Stored,
    ) -> Result<()> {
        let name = format!("gru{}_{side}_weights", layer + 1);
        let recurrent = side == "recurrent";
        let rows: Vec<usize> = (0..GATES * HIDDEN).collect();
        let rows = swap_gates(&rows);
        let mut matrix = vec![0.0; w.len()];
        let mut diagonal = vec![0.0; GATES * HIDDEN];
        for (to, &from) in rows.iter().enumerate() {
            let row = &mut matrix[to * HIDDEN..(to + 1) * HIDDEN];
            row.copy_from_slice(&w[from * HIDDEN..(from + 1) * HIDDEN]);
            if recurrent {
                diagonal[to] = std::mem::take(&mut row[to % HIDDEN]);
            }
        }
        // The diagonal stands apart and keeps no block.
        let alone = |row: usize, j: usize| recurrent && row % HIDDEN == j;
        let stay = BitMatrix::from_fn(GATES * HIDDEN, HIDDEN, |row, j| {
            keep.get(rows[row], j) && !alone(row, j)
        });
        whole_blocks(&name, &stay, alone)?;
        // The library takes an array without elements for one that is missing: a matrix without blocks has one of zeros.
        let stay = match stay.count() {
            0 => {
                matrix.fill(0.0);
                BitMatrix::from_fn(GATES * HIDDEN, HIDDEN, |row, j| row < OUTPUTS && j < INPUTS)
            }
            _ => stay,
        };
        if recurrent {
            self.set_floats(&format!("{name}_diag"), &diagonal);
        }
        match stored {
            Stored::Floats => self.set_matrix(&name, &matrix, &stay)?,
            Stored::Integers => self.arrays.retain(|a| a.name != format!("{name}_float")),
        }
        let mut codes = Vec::with_capacity(matrix.len());
        let mut scales = Vec::with_capacity(rows.len());
        for row in matrix.chunks_exact(HIDDEN) {
            let scale = row_scale(row);
            let code = |w: &f32| (w / scale).round().clamp(-127.0, 127.0) as i8;
            codes.extend(row.iter().map(code));
            scales.push(scale / 127.0);
        }
        // Inside a block of integers the inputs of an output follow each other.
        let (index, blocks) = blocks(&name, &stay, &codes, |k| (k / INPUTS, k % INPUTS))?;
        self.set_index(&name, &index);
        self.set(Array {
            name: format!("{name}_int8"),
            kind: INT8,
            data: blocks.iter().map(|c| *c as u8).collect(),
        });
        let short = name.trim_end_matches("_weights");
        self.set_floats(&format!("{short}_scale"), &scales);
        Ok(())
    }

    /// The bias less what inputs shifted by 127 add to a product of integers. A file without the 8-bit form of the matrix has no
    /// such products.
    fn set_offset(&mut self, layer: usize, side: &str) -> Result<()> {
        let name = format!("gru{}_{side}", layer + 1);
        let codes = format!("{name}_weights_int8");
        if self.arrays.iter().all(|a| a.name != codes) {
            return Ok(());
        }
        let scales = self.floats(&format!("{name}_scale"), GATES * HIDDEN)?;
        let mut offset = self.floats(&format!("{name}_bias"), GATES * HIDDEN)?;
        let codes = self.data(&codes, INT8)?;
        let index = self.data(&format!("{name}_weights_idx"), INT)?;
        let index = super::words(index, i32::from_le_bytes);
        let mut blocks = codes.chunks_exact(OUTPUTS * INPUTS);
        let mut at = 0;
        for group in 0..GATES * HIDDEN / OUTPUTS {
            let count = usize::try_from(index.get(at).copied().unwrap_or(0)).unwrap_or(0);
            for block in blocks.by_ref().take(count) {
                for (o, codes) in block.chunks_exact(INPUTS).enumerate() {
                    let sum: i32 = codes.iter().map(|&c| i32::from(c as i8)).sum();
                    let row = group * OUTPUTS + o;
                    offset[row] -= sum as f32 * (127.0 * scales[row]);
                }
            }
            at += 1 + count;
        }
        self.set_floats(&format!("{name}_subias"), &offset);
        Ok(())
    }

    /// Output of the second convolution, `[frames, 384]`, for features `[frames, 65]` of one clip.
    ///
    /// # Errors
    /// A length that is no multiple of 65, or arrays that are missing.
    pub fn convolutions(&self, features: &[f32]) -> Result<Vec<f32>> {
        if !features.len().is_multiple_of(FEATURES) {
            return Err(Error::Shape {
                tensor: "features".into(),
                expected: format!("[frames, {FEATURES}]"),
                found: vec![features.len()],
            });
        }
        let first = self.convolution("conv1", features, FEATURES, FIRST)?;
        self.convolution("conv2", &first, FIRST, HIDDEN)
    }

    /// tanh of a causal convolution over three frames.
    fn convolution(
        &self,
        name: &str,
        x: &[f32],
        inputs: usize,
        outputs: usize,
    ) -> Result<Vec<f32>> {
        let weights = self.floats(&format!("{name}_weights_float"), FRAMES * inputs * outputs)?;
        let bias = self.floats(&format!("{name}_bias"), outputs)?;
        let mut y = Vec::with_capacity(x.len() / inputs * outputs);
        for t in 0..x.len() / inputs {
            let mut sums = bias.clone();
            for back in (0..FRAMES.min(t + 1)).rev() {
                let frame = &x[(t - back) * inputs..(t - back + 1) * inputs];
                let kernel = &weights[(FRAMES - 1 - back) * inputs * outputs..];
                for (v, row) in frame.iter().zip(kernel.chunks_exact(outputs)) {
                    sums.iter_mut().zip(row).for_each(|(s, w)| *s += v * w);
                }
            }
            y.extend(sums.into_iter().map(f32::tanh));
        }
        Ok(y)
    }

    /// Gains `[frames, 32]` and voice probabilities `[frames]` of one clip, by this crate's own forward pass of a network that
    /// was taken from the file (and perhaps pruned).
    ///
    /// # Errors
    /// Features or a network that do not fit.
    #[cfg(feature = "train")]
    pub fn run(&self, rnn: &Rnn, features: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
        use crate::rnn::{Input, State, Tape};
        let x = self.convolutions(features)?;
        let frames = x.len() / HIDDEN;
        let (mut tape, mut state) = (Tape::new(), State::zeros(rnn, 1));
        tape.forward(rnn, Input::Vectors(&x), frames, &mut state)?;
        if rnn.config().hidden != [HIDDEN; LAYERS] {
            return Err(Error::Shape {
                tensor: "network".into(),
                expected: format!("{LAYERS} layers of {HIDDEN}"),
                found: rnn.config().hidden.clone(),
            });
        }
        let (weights, bias) = self.read_outs()?;
        let (mut gains, mut voice) = (Vec::new(), Vec::new());
        for t in 0..frames {
            let row = t * HIDDEN..(t + 1) * HIDDEN;
            let mut seen = x[row.clone()].to_vec();
            for l in 0..LAYERS {
                seen.extend_from_slice(&tape.states(l)[HIDDEN..][row.clone()]);
            }
            for (o, (w, b)) in weights.chunks_exact(seen.len()).zip(&bias).enumerate() {
                let z = b + w.iter().zip(&seen).map(|(w, s)| w * s).sum::<f32>();
                let p = 1.0 / (1.0 + (-z).exp());
                if o < BANDS {
                    gains.push(p)
                } else {
                    voice.push(p)
                }
            }
        }
        Ok((gains, voice))
    }
}

/// The step of a row's codes: pairs of neighbours must not overflow the library's sums of 16 bits.
fn row_scale(row: &[f32]) -> f32 {
    let single = row.iter().fold(0f32, |m, w| m.max(w.abs())) / 127.0;
    let pair = row
        .chunks_exact(2)
        .fold(0f32, |m, p| m.max((p[0] + p[1]).abs()))
        / 129.0;
    single.max(pair).max(f32::MIN_POSITIVE)
}

/// Checks that every block is kept whole or not at all; `alone` tells which entries do not belong to a block.
fn whole_blocks(name: &str, keep: &BitMatrix, alone: impl Fn(usize, usize) -> bool) -> Result<()> {
    for group in (0..keep.rows()).step_by(OUTPUTS) {
        for column in (0..keep.cols()).step_by(INPUTS) {
            let entries = (group..group + OUTPUTS)
                .flat_map(|i| (column..column + INPUTS).map(move |j| (i, j)))
                .filter(|&(i, j)| !alone(i, j));
            let (mut kept, mut of) = (0, 0);
            for (i, j) in entries {
                of += 1;
                kept += usize::from(keep.get(i, j));
            }
            if kept != 0 && kept != of {
                return Err(Error::PartialBlock {
                    tensor: name.into(),
                    block: (OUTPUTS, INPUTS),
                    at: (group, column),
                    kept,
                    of,
                });
            }
        }
    }
    Ok(())
}

#[cfg(all(test, feature = "train"))]
pub(super) mod tests {
    use super::*;
    use crate::{
        prune::{Method, PruneConfig, Scope, prune},
        rnn::Role,
        seed,
    };
    use rand::Rng;

    /// A file of the library's sizes with random weights.
    pub(in crate::rnnoise) fn file() -> WeightFile {
        let mut rng = seed::rng(1, "rnnoise");
        let mut random = |count: usize| -> Vec<f32> {
            (0..count).map(|_| rng.random_range(-0.3..0.3)).collect()
        };
        let mut file = WeightFile::default();
        let rows = GATES * HIDDEN;
        for l in 1..=LAYERS {
            for (side, _) in SIDES {
                let name = format!("gru{l}_{side}");
                let mut matrix = random(rows * HIDDEN);
                if side == "recurrent" {
                    // The diagonal stands apart.
                    (0..rows).for_each(|row| matrix[row * HIDDEN + row % HIDDEN] = 0.0);
                    file.set_floats(&format!("{name}_weights_diag"), &random(rows));
                }
                let all = BitMatrix::ones(rows, HIDDEN);
                file.set_matrix(&format!("{name}_weights"), &matrix, &all)
                    .unwrap();
                file.set_floats(&format!("{name}_bias"), &random(rows));
            }
        }
        for (name, outputs) in [("dense_out", BANDS), ("vad_dense", 1)] {
            let seen = (LAYERS + 1) * HIDDEN;
            file.set_floats(&format!("{name}_weights_float"), &random(seen * outputs));
            file.set_floats(&format!("{name}_bias"), &random(outputs));
        }
        for (name, i, o) in [("conv1", FEATURES, FIRST), ("conv2", FIRST, HIDDEN)] {
            file.set_floats(&format!("{name}_weights_float"), &random(FRAMES * i * o));
            file.set_floats(&format!("{name}_bias"), &random(o));
        }
        file
    }

    #[test]
    fn biases_alone_can_change_in_a_file_of_floats() {
        let original = file();
        let mut rnn = original.network().unwrap();
        let shifted = |role: Role, rnn: &Rnn| -> Vec<f32> {
            rnn.get(role).iter().map(|b| b + 0.25).collect()
        };
        for l in [0, 2] {
            for role in [Role::Bias(l), Role::CandidateBias(l)] {
                let bias = shifted(role, &rnn);
                rnn.set(role, bias);
            }
        }
        let mut stored = original.clone();
        stored
            .set_network(&rnn, &MaskSet::default(), Stored::Floats)
            .unwrap();
        let names = |file: &WeightFile| -> Vec<String> {
            file.arrays.iter().map(|a| a.name.clone()).collect()
        };
        assert_eq!(names(&stored), names(&original));
        let again = stored.network().unwrap();
        for (a, b) in again.params().iter().zip(rnn.params().iter()) {
            let far = a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs());
            assert!(far.fold(0.0, f32::max) < 1e-6, "{}", a.name);
        }
    }

    #[test]
    fn a_matrix_without_blocks_has_one_of_zeros_because_the_library_refuses_empty_arrays() {
        let original = file();
        let mut rnn = original.network().unwrap();
        let config = PruneConfig::new(Method::ZeroWhh, 0.0);
        let (masks, _) = prune(&rnn, &config).unwrap();
        masks.apply(rnn.params_mut()).unwrap();
        for stored in [Stored::Floats, Stored::Integers] {
            let mut file = original.clone();
            file.set_network(&rnn, &masks, stored).unwrap();
            for array in &file.arrays {
                assert!(!array.data.is_empty(), "{}", array.name);
            }
            let codes = file.get("gru2_recurrent_weights_int8").unwrap();
            assert_eq!(codes.data, vec![0; OUTPUTS * INPUTS]);
            let again = file.network().unwrap();
            for l in 0..LAYERS {
                let weights = again.get(Role::RecurrentWeight(l));
                assert!(weights.iter().all(|w| *w == 0.0));
            }
        }
    }

    #[test]
    fn a_pruned_network_is_read_back_as_it_was_stored_and_an_unchanged_one_changes_no_byte() {
        let original = file();
        let rnn = original.network().unwrap();
        let mut same = original.clone();
        same.set_network(&rnn, &MaskSet::default(), Stored::Floats)
            .unwrap();
        assert_eq!(same, original);

        let config = PruneConfig::new(Method::Block8x4, 0.6).with(|c| {
            c.scope = Scope::Both;
            c.keep_diagonal = true;
        });
        let (masks, _) = prune(&rnn, &config).unwrap();
        let mut pruned = rnn.clone();
        masks.apply(pruned.params_mut()).unwrap();
        let mut stored = original.clone();
        stored.set_network(&pruned, &masks, Stored::Floats).unwrap();
        assert_eq!(stored.network().unwrap(), pruned);
        // Fewer blocks; as many codes as floats, because the library asks for both.
        let name = "gru2_recurrent_weights";
        let len = |array: &str| stored.get(&format!("{name}_{array}")).unwrap().data.len();
        assert_eq!(len("float"), 4 * len("int8"));
        assert!(len("int8") < GATES * HIDDEN * HIDDEN / 2);
        // The product of shifted integers, as the library computes it, is the product of the floats up to the rounding.
        let codes = &stored.get(&format!("{name}_int8")).unwrap().data;
        let scales = stored
            .floats("gru2_recurrent_scale", GATES * HIDDEN)
            .unwrap();
        let offset = stored
            .floats("gru2_recurrent_subias", GATES * HIDDEN)
            .unwrap();
        let bias = stored
            .floats("gru2_recurrent_bias", GATES * HIDDEN)
            .unwrap();
        let floats = stored.matrix(name, GATES * HIDDEN, HIDDEN).unwrap();
        let index = super::super::words(
            &stored.get(&format!("{name}_idx")).unwrap().data,
            i32::from_le_bytes,
        );
        let x: Vec<f32> = (0..HIDDEN).map(|j| (j as f32 * 0.7).sin()).collect();
        let columns = &index[1..1 + index[0] as usize];
        for o in 0..OUTPUTS {
            let mut sum = 0i32;
            for (block, &c) in codes.chunks_exact(OUTPUTS * INPUTS).zip(columns) {
                for i in 0..INPUTS {
                    let shifted = 127 + (127.0 * x[c as usize + i]).round() as i32;
                    sum += i32::from(block[o * INPUTS + i] as i8) * shifted;
                }
            }
            let integers = offset[o] + scales[o] * sum as f32;
            let row = &floats[o * HIDDEN..(o + 1) * HIDDEN];
            let exact = bias[o] + row.iter().zip(&x).map(|(w, x)| w * x).sum::<f32>();
            assert!((integers - exact).abs() < 0.05, "{integers} {exact}");
        }

        let mut integers = original.clone();
        integers
            .set_network(&pruned, &masks, Stored::Integers)
            .unwrap();
        assert!(integers.get(&format!("{name}_float")).is_err());
        // Without floats the codes are read, right to half a step of each row.
        let read = integers.network().unwrap();
        for (a, b) in read.params().iter().zip(pruned.params().iter()) {
            let far = a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs());
            let half = if a.name.contains(".weight_") {
                0.6 / 127.0
            } else {
                1e-6
            };
            assert!(far.fold(0.0, f32::max) <= half * 0.51 + 1e-6, "{}", a.name);
        }
        assert!(integers.to_bytes().unwrap().len() < stored.to_bytes().unwrap().len());
        let (scattered, _) = prune(&rnn, &PruneConfig::new(Method::Random, 0.5)).unwrap();
        assert!(matches!(
            original
                .clone()
                .set_network(&rnn, &scattered, Stored::Floats),
            Err(Error::PartialBlock { .. })
        ));
        assert!(matches!(
            original.convolutions(&[0.0; 7]),
            Err(Error::Shape { .. })
        ));
        let (gains, voice) = original.run(&rnn, &[0.1; 3 * FEATURES]).unwrap();
        assert_eq!((gains.len(), voice.len()), (3 * BANDS, 3));
    }
}
