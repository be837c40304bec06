//! H̃ of the inputs of an expert's linears.

use super::sums::{Sums, mixed};
use crate::Result;
use candle_core::Tensor;
use causal_lm::LinearName;
use causal_lm::block::Mlp;
use causal_lm::mixture::ExpertInputs;
use faer::{Mat, MatRef};

/// How the tokens of an expert and of its pool count.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GramOptions {
    /// Whether tokens count by the square of their gates.
    pub gate_weight: bool,
    /// Tokens of the pool of an expert's down projection.
    pub pool_tokens: usize,
    /// Weight of the pool, in tokens; `None` for a quarter of the width of the input.
    pub prior: Option<f64>,
}

impl Default for GramOptions {
    fn default() -> Self {
        Self {
            gate_weight: true,
            pool_tokens: 1024,
            prior: None,
        }
    }
}

/// Second moments of all tokens of a layer: the pool of what gate and up read.
#[derive(Clone, Debug)]
pub struct LayerPool(Sums);

impl LayerPool {
    /// Of what the experts of a layer read.
    ///
    /// # Errors
    /// What candle reports.
    pub fn of(inputs: &ExpertInputs) -> Result<Self> {
        Sums::of(&inputs.inputs, None).map(Self)
    }
}

/// Second moments per unit of weight of what an expert's linears read, drawn towards those of its pools.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExpertGrams {
    /// Of gate and up, `[hidden, hidden]`.
    pub hidden: Mat<f64>,
    /// Of down, `[neurons, neurons]`.
    pub neurons: Mat<f64>,
    /// Σ of the weights of its tokens: second moments of its own tokens times this are their sum.
    pub weight: f64,
    /// Tokens that chose it.
    pub tokens: usize,
    /// Tokens of equal gates that say as much.
    pub effective: f64,
    /// Share of the pool in `neurons`.
    pub pool: f64,
}

impl ExpertGrams {
    /// Of an expert of the layer that read `inputs`.
    ///
    /// # Errors
    /// What running the expert reports.
    pub fn of(
        mlp: &Mlp,
        (inputs, expert): (&ExpertInputs, usize),
        pool: &LayerPool,
        options: &GramOptions,
    ) -> Result<Self> {
        let (own, others) = inputs.tokens(expert, options.pool_tokens);
        let root = |gate: f32| if options.gate_weight { gate } else { 1.0 };
        let roots: Vec<f32> = own.iter().map(|token| root(token.gate)).collect();
        let prior = |width: usize| options.prior.unwrap_or(width as f64 / 4.0);
        let x = inputs.rows(&own)?;
        let tokens = own.len();
        let sums = Sums::of(&x, Some(&roots))?;
        let (weight, effective) = (sums.weight, sums.effective);
        let (hidden, _) = mixed(sums, &pool.0, prior(mlp.up.inputs()));
        let neurons = |x: &[Tensor]| x.iter().map(|x| mlp.neurons(x)).collect();
        let [own, others]: [causal_lm::Result<Vec<_>>; 2] =
            [neurons(&x), neurons(&inputs.rows(&others)?)];
        let (own, others) = (Sums::of(&own?, Some(&roots))?, Sums::of(&others?, None)?);
        let (neurons, share) = mixed(own, &others, prior(mlp.down.inputs()));
        Ok(Self {
            hidden,
            neurons,
            weight,
            tokens,
            effective,
            pool: share,
        })
    }

    /// Of what a linear reads.
    pub fn gram(&self, linear: LinearName) -> MatRef<'_, f64> {
        match linear.is_output() {
            true => self.neurons.as_ref(),
            false => self.hidden.as_ref(),
        }
    }
}
