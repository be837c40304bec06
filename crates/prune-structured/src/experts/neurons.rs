//! Narrowing the experts that stay.
//!
//! Every expert is a gated MLP, and its neurons are scored like those of any other, on the tokens that go to it. A token
//! counts by the square of its gate, because that is what its error is multiplied by on the way to the layer's output.
//! Experts see few tokens, so that their statistics are drawn towards those of a pool: the same expert run on the tokens that
//! came closest to choosing it. All experts of a layer keep as many neurons, which fused tensors and every runtime need.

use super::ExpertRefits;
use super::collect::Collector;
use super::plan::{ExpertPlan, ascending_below, narrowed};
use super::select::advance_pruned;
use crate::compensation::{complement, refit};
use crate::score::{Magnitude, Score, WandaSp};
use crate::stats::{ColumnStats, GramCollector, Moments, Part};
use crate::tensor::values;
use crate::{DEFAULT_RIDGE, Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::block::Mlp;
use causal_lm::mixture::{ExpertInputs, ExpertToken};
use causal_lm::{Decoder, Hidden, NoTap, Progress, Windows};
use serde::{Deserialize, Serialize};

/// How neurons of experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NeuronOptions {
    /// Score of neurons.
    pub score: Score,
    /// Whether the columns of down that stay are fitted to the dense output, by least squares.
    pub refit: bool,
    /// Damping of that fit relative to the mean diagonal.
    pub ridge: f64,
    /// The number of neurons is a multiple of this.
    pub align: usize,
    /// Whether tokens count by the square of their gates.
    pub gate_weight: bool,
    /// Tokens of an expert's pool.
    pub pool_tokens: usize,
    /// Weight of the pool in tokens; `None` for the width of the expert in fits, and a quarter of it in scores.
    pub prior: Option<f64>,
    /// Whether a layer sees what the layers before it put out with the neurons that they keep, not with all.
    #[serde(default)]
    pub progressive: bool,
}

impl Default for NeuronOptions {
    fn default() -> Self {
        Self {
            score: WandaSp.into(),
            refit: true,
            ridge: DEFAULT_RIDGE,
            align: 32,
            gate_weight: true,
            pool_tokens: 1024,
            prior: None,
            progressive: false,
        }
    }
}

impl NeuronOptions {
    /// Whether anything is computed of what experts read: tokens, their gates and pools.
    pub fn reads_tokens(&self) -> bool {
        self.refit || !matches!(self.score, Score::Magnitude(_) | Score::Random(_))
    }

    /// Refuses parameters out of range.
    pub(crate) fn check(&self) -> Result<()> {
        match self.prior {
            Some(prior) if !(0.0..f64::INFINITY).contains(&prior) => Err(Error::Option {
                option: "prior",
                value: prior,
                expected: "a finite number of tokens, at least 0, is expected",
            }),
            _ => Ok(()),
        }
    }

    /// The multiple of the alignment that is nearest to a share of `width` neurons, at least one multiple.
    ///
    /// # Errors
    /// [`Error::Width`] for experts that are narrower than the alignment.
    pub fn width(&self, layer: usize, width: usize, share: f64) -> Result<usize> {
        let align = self.align.max(1);
        if align > width {
            return Err(Error::Width {
                option: "align_experts",
                value: align,
                layer,
                width,
            });
        }
        if share >= 1.0 {
            return Ok(width);
        }
        let steps = (width as f64 * share / align as f64).round() as usize;
        Ok((steps * align).clamp(align, width))
    }
}

/// Narrows the experts of a plan to `widths`, one for each layer and `None` where they stay as they are; statistics are
/// those of the tokens that the plan sends to each. A step of `progress` is a layer. Down projections that are fitted anew
/// go to `refits`.
///
/// # Errors
/// [`Error::PlanMismatch`], [`Error::Width`] for a width that an expert does not have, [`Error::Option`], [`Error::Missing`] for scores that
/// need other statistics, [`Error::Cancelled`], and what running the model reports.
pub fn narrow(
    decoder: &Decoder<'_>,
    windows: &Windows,
    (plan, widths): (&ExpertPlan, &[Option<usize>]),
    (options, refits): (&NeuronOptions, &ExpertRefits),
    progress: &dyn Progress,
) -> Result<ExpertPlan> {
    plan.check(decoder)?;
    options.check()?;
    let mut narrowed = plan.clone();
    let mut hidden = Hidden::embed(decoder, windows)?;
    progress.begin("narrowing experts", plan.layers.len() as u64);
    for (layer, experts) in plan.layers.iter().enumerate() {
        let (Some(experts), Some(mixture)) = (experts, decoder.config().mixtures[layer]) else {
            hidden.advance_stored(decoder, layer, &mut NoTap)?;
            progress.advance(1)?;
            continue;
        };
        let mut collector = Collector::default();
        let before = options.progressive.then(|| hidden.clone());
        let pruned = (experts, Some(refits), plan.chosen);
        advance_pruned(&mut hidden, (decoder, layer), pruned, &mut collector)?;
        let width = widths.get(layer).copied().flatten();
        if let Some(width) = width.filter(|&width| width != mixture.width) {
            if width == 0 || width > mixture.width {
                return Err(Error::Width {
                    option: "width",
                    value: width,
                    layer,
                    width: mixture.width,
                });
            }
            let seen = ExpertInputs {
                inputs: collector.inputs,
                routings: collector.routings,
            };
            let mut made = Vec::new();
            let mut neurons = Vec::new();
            for at in 0..experts.kept.len() {
                progress.advance(0)?;
                let mlp = experts.whole(decoder, layer, at)?;
                let ranked = ExpertNeurons::of(&mlp, &seen, (layer, at), options)?;
                made.extend(ranked.down(width)?.map(|down| (at, down)));
                neurons.push(ranked.kept(width));
            }
            refits.save(layer, &made)?;
            if let Some(experts) = &mut narrowed.layers[layer] {
                experts.neurons = neurons;
                if let Some(before) = before {
                    hidden = before;
                    let pruned = (&*experts, Some(refits), plan.chosen);
                    advance_pruned(&mut hidden, (decoder, layer), pruned, &mut NoTap)?;
                }
            }
        }
        progress.advance(1)?;
    }
    narrowed.check(decoder)?;
    Ok(narrowed)
}

/// The neurons of an expert by how much they matter, and what its down projection is fitted to when some of them go.
#[derive(Clone, Debug)]
pub struct ExpertNeurons {
    layer: usize,
    /// Neurons, the most important first.
    order: Vec<usize>,
    /// Down projection, `[hidden, neurons]` f32.
    down: Tensor,
    /// H̃ of its input; `None` where nothing is fitted.
    gram: Option<Tensor>,
    ridge: f64,
}

impl ExpertNeurons {
    /// Ranks the neurons of an expert of a layer by what it reads. `mlp` has all of them.
    ///
    /// # Errors
    /// [`Error::Missing`] for scores that need other statistics, and what running the expert reports.
    pub fn of(
        mlp: &Mlp,
        inputs: &ExpertInputs,
        (layer, expert): (usize, usize),
        options: &NeuronOptions,
    ) -> Result<Self> {
        let dense = mlp.down.inputs();
        let (own, pool) = inputs.tokens(expert, options.pool_tokens);
        let weight = |gate: f32| match options.gate_weight {
            true => gate,
            false => 1.0,
        };
        let roots: Vec<f32> = own.iter().map(|token| weight(token.gate)).collect();
        let own = Sums::of(&neurons_of(mlp, inputs, &own)?, &roots, options.refit)?;
        let ones = vec![1.0; pool.len()];
        let pool = Sums::of(&neurons_of(mlp, inputs, &pool)?, &ones, options.refit)?;
        let down = mlp
            .down
            .weight()?
            .to_dtype(DType::F32)?
            .to_device(&Device::Cpu)?;
        let prior = |share: f64| options.prior.unwrap_or(share * dense as f64);
        let score: Score = match own.tokens {
            0 => Magnitude.into(),
            _ => options.score,
        };
        let stats = own.statistics(&pool, prior(0.25), &down)?;
        let scores = score.columns(layer, Part::Mlp, &stats)?;
        let mut order: Vec<usize> = (0..dense).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let gram = match options.refit && own.tokens > 0 {
            true => Some(own.shrunk_gram(&pool, prior(1.0))?),
            false => None,
        };
        Ok(Self {
            layer,
            order,
            down,
            gram,
            ridge: options.ridge,
        })
    }

    /// The `width` neurons that matter most, ascending; all where there are fewer.
    pub fn kept(&self, width: usize) -> Vec<usize> {
        let mut kept = self.order[..width.min(self.order.len())].to_vec();
        kept.sort_unstable();
        debug_assert!(ascending_below(&kept, self.order.len()));
        kept
    }

    /// The down projection fitted to these neurons, `[hidden, width]` f32; `None` where its columns stay as they are, for an
    /// expert that no token chose and without refits.
    ///
    /// # Errors
    /// When the fit has no solution.
    pub fn down(&self, width: usize) -> Result<Option<Tensor>> {
        let Some(gram) = &self.gram else {
            return Ok(None);
        };
        let kept = self.kept(width);
        let removed = complement(&kept, self.order.len());
        refit(&self.down, gram, &kept, &removed, self.ridge, self.layer).map(Some)
    }

    /// The expert with the `width` neurons that matter most, its down projection fitted where that can be.
    ///
    /// # Errors
    /// When the fit has no solution, or `mlp` is not the expert that was ranked.
    pub fn narrowed(&self, mlp: &Mlp, width: usize) -> Result<Mlp> {
        let mut narrow = narrowed(mlp, &self.kept(width))?;
        if let Some(down) = self.down(width)? {
            narrow
                .down
                .set_weight(down.to_dtype(mlp.down.weight()?.dtype())?);
        }
        Ok(narrow)
    }
}

/// What the down projection reads of these tokens, `[tokens, neurons]` f32 on the CPU, batch by batch.
fn neurons_of(mlp: &Mlp, inputs: &ExpertInputs, tokens: &[ExpertToken]) -> Result<Vec<Tensor>> {
    let of_batch = |x: Tensor| -> Result<Tensor> {
        let neurons = mlp.neurons(&x)?;
        Ok(neurons.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
    };
    inputs.rows(tokens)?.into_iter().map(of_batch).collect()
}

/// Sums over tokens; ω is the square of a token's root.
#[derive(Clone, Debug)]
pub(crate) struct Sums {
    tokens: usize,
    /// Σ ω.
    weight: f64,
    /// (Σ ω)² / Σ ω²: so many tokens of equal weight say as much.
    effective: f64,
    /// Σ ω a / Σ ω of each neuron.
    mean: Vec<f64>,
    /// Σ ω a² / Σ ω of each neuron.
    square: Vec<f64>,
    /// Σ ω a aᵀ / Σ ω.
    gram: Option<Tensor>,
}

impl Sums {
    /// Of rows of neurons, batch by batch, with the roots of all rows one after the other.
    pub(crate) fn of(batches: &[Tensor], roots: &[f32], gram: bool) -> Result<Self> {
        let width = batches.first().map_or(Ok(0), |batch| batch.dim(1))?;
        let (mut weight, mut squares) = (0.0, 0.0);
        let (mut mean, mut square) = (vec![0.0; width], vec![0.0; width]);
        let mut collector = match gram && width > 0 {
            true => Some(GramCollector::new(width, &Device::Cpu)?),
            false => None,
        };
        let mut first = 0;
        for batch in batches {
            let roots = &roots[first..first + batch.dim(0)?];
            first += roots.len();
            for (row, &root) in values(batch)?.chunks(width).zip(roots) {
                let omega = f64::from(root) * f64::from(root);
                weight += omega;
                squares += omega * omega;
                for ((mean, square), &a) in mean.iter_mut().zip(&mut square).zip(row) {
                    let a = f64::from(a);
                    *mean += omega * a;
                    *square += omega * a * a;
                }
            }
            if let Some(collector) = &mut collector {
                let roots = Tensor::new(roots, &Device::Cpu)?.unsqueeze(1)?;
                collector.update(&batch.broadcast_mul(&roots)?)?;
            }
        }
        let unit = if weight > 0.0 { 1.0 / weight } else { 0.0 };
        mean.iter_mut().chain(&mut square).for_each(|x| *x *= unit);
        let gram = collector.map(GramCollector::finish).transpose()?;
        Ok(Self {
            tokens: roots.len(),
            weight,
            effective: if squares > 0.0 {
                weight * weight / squares
            } else {
                0.0
            },
            mean,
            square,
            gram: gram.map(|gram| gram * unit).transpose()?,
        })
    }

    /// Share of these sums beside a pool that counts as `prior` tokens.
    fn share(&self, pool: &Self, prior: f64) -> f64 {
        match (self.weight > 0.0, pool.weight > 0.0) {
            (true, true) => self.effective / (self.effective + prior),
            (own, _) => f64::from(u8::from(own)),
        }
    }

    /// The statistics of columns that scores read, drawn towards those of a pool.
    pub(crate) fn statistics(&self, pool: &Self, prior: f64, down: &Tensor) -> Result<ColumnStats> {
        let share = self.share(pool, prior);
        let mixed = |own: &[f64], pool: &[f64], width: usize| -> Vec<f64> {
            let at = |of: &[f64], i: usize| of.get(i).copied().unwrap_or(0.0);
            let mix = |i| share * at(own, i) + (1.0 - share) * at(pool, i);
            (0..width).map(mix).collect()
        };
        let (outputs, width) = down.dims2()?;
        let mean = mixed(&self.mean, &pool.mean, width);
        let square = mixed(&self.square, &pool.square, width);
        let count = self.tokens.max(1) as u64;
        let variance = mean
            .iter()
            .zip(&square)
            .map(|(mean, square)| square - mean * mean);
        let centred = variance.map(|v| v.max(0.0) * count as f64).collect();
        let mut stats = ColumnStats {
            moments: Moments {
                count,
                mean,
                centred,
            },
            samples: 1,
            fluctuation: None,
            weight_square: vec![0.0; width],
            weight_abs: vec![0.0; width],
            plain_square: None,
            output_square: None,
            outputs,
        };
        for row in values(down)?.chunks(width) {
            for (column, &w) in row.iter().enumerate() {
                let w = f64::from(w);
                stats.weight_square[column] += w * w;
                stats.weight_abs[column] += w.abs();
            }
        }
        Ok(stats)
    }

    /// Second moments per unit of weight, drawn towards those of a pool.
    pub(crate) fn shrunk_gram(&self, pool: &Self, prior: f64) -> Result<Tensor> {
        let share = self.share(pool, prior);
        Ok(match (&self.gram, &pool.gram) {
            (Some(own), Some(pool)) => ((own * share)? + (pool * (1.0 - share))?)?,
            (Some(gram), None) | (None, Some(gram)) => gram.clone(),
            (None, None) => Tensor::zeros((0, 0), DType::F32, &Device::Cpu)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::Wifv;

    const GATES: [f32; 6] = [0.9, 0.2, 0.5, 0.7, 0.3, 0.6];

    /// Six tokens of four neurons, and a down projection of three outputs.
    fn problem() -> (Tensor, Tensor) {
        let a = |t: usize, c: usize| (((4 * t + 3 * c + (t * c * c) % 5) % 11) as f32 - 5.0) / 4.0;
        let w = |o: usize, c: usize| (((3 * o + 2 * c) % 7) as f32 - 3.0) / 2.0;
        let tensor = |rows: usize, value: &dyn Fn(usize, usize) -> f32| {
            let values: Vec<f32> = (0..rows * 4).map(|i| value(i / 4, i % 4)).collect();
            Tensor::from_vec(values, (rows, 4), &Device::Cpu).unwrap()
        };
        (tensor(6, &a), tensor(3, &w))
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            let gap = (found - expected).abs();
            assert!(
                gap < 3e-6 * expected.abs().max(1.0),
                "{found} is not {expected}"
            );
        }
    }

    #[test]
    fn tokens_count_by_the_square_of_their_gates() {
        let (a, down) = problem();
        let own = Sums::of(&[a], &GATES, true).unwrap();
        close(&[own.effective], &[3.790164]);
        let none = Sums::of(&[], &[], true).unwrap();
        let stats = own.statistics(&none, 1.0, &down).unwrap();
        let wifv = Score::from(Wifv).columns(0, Part::Mlp, &stats).unwrap();
        close(&wifv, &[3.975589, 0.7162190, 0.6467615, 2.370228]);
        let wanda = Score::from(WandaSp).columns(0, Part::Mlp, &stats).unwrap();
        // Of six tokens of weight one, where the weights sum to 2.04.
        let scale = (6.0f64 / own.weight).sqrt();
        let expected = [4.508742, 2.421421, 1.647726, 3.851380];
        close(&wanda, &expected.map(|x| x * scale));
        let gram = (own.gram.unwrap() * own.weight).unwrap();
        let row: Vec<f64> = values(&gram).unwrap()[..4]
            .iter()
            .map(|&x| x.into())
            .collect();
        close(&row, &[2.25875, -0.246875, -0.78125, -0.1575]);
    }

    #[test]
    fn the_refit_is_that_found_by_hand() {
        let (a, down) = problem();
        let gram = Sums::of(&[a], &GATES, true).unwrap().gram.unwrap();
        let refitted = refit(&down, &gram, &[0, 1, 3], &[2], 0.0, 0).unwrap();
        let found: Vec<f64> = values(&refitted)
            .unwrap()
            .iter()
            .map(|&x| x.into())
            .collect();
        let expected = [
            [-1.682549, -0.5202077, 1.393845],
            [0.5476478, 1.060623, -0.1815351],
            [1.5, -1.0, 1.0],
        ];
        close(&found, expected.as_flattened());
    }

    #[test]
    fn few_tokens_are_drawn_to_the_pool() {
        let (a, _) = problem();
        let own = Sums::of(&[a], &GATES, true).unwrap();
        let eye = Tensor::eye(4, DType::F32, &Device::Cpu).unwrap();
        let pool = Sums {
            gram: Some(eye),
            ..own.clone()
        };
        let row = |prior: f64| -> Vec<f64> {
            let gram = own.shrunk_gram(&pool, prior).unwrap();
            values(&gram).unwrap()[..4]
                .iter()
                .map(|&x| x.into())
                .collect()
        };
        close(&row(2.0), &[1.070192, -0.0792162, -0.2506842, -0.0505379]);
        let unit = own.weight;
        close(
            &row(0.0),
            &[2.25875, -0.246875, -0.78125, -0.1575].map(|x| x / unit),
        );
        close(&row(1e12), &[1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn tokens_of_equal_gates_count_in_full() {
        let (a, _) = problem();
        let equal = Sums::of(std::slice::from_ref(&a), &[0.5; 6], false).unwrap();
        close(&[equal.effective], &[6.0]);
        let one = Sums::of(&[a], &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0], false).unwrap();
        close(&[one.effective], &[1.0]);
    }

    #[test]
    fn widths_are_multiples_of_the_alignment() {
        let options = NeuronOptions::default();
        assert_eq!(options.width(0, 128, 0.5).unwrap(), 64);
        assert_eq!(options.width(0, 128, 0.01).unwrap(), 32);
        assert_eq!(options.width(0, 100, 1.0).unwrap(), 100);
        assert!(matches!(
            options.width(0, 16, 0.5),
            Err(Error::Width { .. })
        ));
    }
}
