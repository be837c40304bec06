//! One MLP made narrower by alternating between its weights and its activations.
//!
//! With x the MLP's input, y the dense output, s and z the outputs of gate and up, p the input of
//! down and φ = SiLU, the penalty
//! `β‖y − W_d p‖² + γ‖p − φ(s)∘z‖² + α‖s − W_g x‖² + α‖z − W_u x‖²` with α = β = γ is lowered in one
//! block of variables after another, as in SparseLLM (arXiv 2402.17946). There it serves sparse
//! matrices; here gate, up and down share one set of neurons.

use crate::compensation::solve;
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use causal_lm::Linear;
use causal_lm::block::Mlp;
use causal_lm::config::Activation;

/// The published scheme's weight α = β = γ of the three penalties, in its step size of s.
const PENALTY: f64 = 5.0;
/// Step size of s.
const RATE: f64 = 0.01;
/// Gradient steps on s in each round.
const STEPS: usize = 2;
/// Gate and up are refitted only with this many tokens for each of their columns; with fewer the
/// refit would learn the calibration text.
const TOKENS_PER_COLUMN: usize = 4;

/// The three projections of an MLP with a gate and SiLU.
#[derive(Clone)]
struct Gated {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Gated {
    fn of(mlp: &Mlp) -> Result<Self> {
        match (&mlp.gate, mlp.activation) {
            (Some(gate), Activation::Silu) => Ok(Self {
                gate: gate.clone(),
                up: mlp.up.clone(),
                down: mlp.down.clone(),
            }),
            _ => Err(Error::PlanMismatch(
                "the alternating refinement needs MLPs with a gate and SiLU".into(),
            )),
        }
    }

    fn into_mlp(self) -> Mlp {
        Mlp {
            gate: Some(self.gate),
            up: self.up,
            down: self.down,
            activation: Activation::Silu,
        }
    }
}

/// A batch of rows.
struct Rows {
    /// `[rows, hidden]`.
    x: Tensor,
    /// `[rows, hidden]`.
    y: Tensor,
    /// `[rows, neurons]`, as are z and p.
    s: Tensor,
    z: Tensor,
    p: Tensor,
}

/// Keeps `keep` neurons of `mlp`, whose inputs are `inputs` (each `[rows, hidden]`), and refits
/// what is left. Returns their ids and the narrower MLP.
///
/// The width falls in `rounds` equal steps. Each drops the neurons with the least
/// `‖p_j‖ · Σ_o |W_d[o,j]|`, refits down and, but for the last, moves p, z and s, and refits gate
/// and up to them. The last refits down to the activations that the narrower MLP really has.
pub(super) fn alternate(
    mlp: &Mlp,
    inputs: Vec<Tensor>,
    keep: usize,
    (rounds, ridge): (usize, f64),
    layer: usize,
) -> Result<(Vec<usize>, Mlp)> {
    let dense = mlp.down.inputs();
    let tokens: usize = inputs.iter().map(|x| x.dims()[0]).sum();
    let mut mlp = Gated::of(mlp)?;
    let mut rows = inputs
        .into_iter()
        .map(|x| {
            let (s, z) = (mlp.gate.forward(&x)?, mlp.up.forward(&x)?);
            let p = (s.silu()? * &z)?;
            let y = mlp.down.forward(&p)?;
            Ok(Rows { x, y, s, z, p })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut ids: Vec<usize> = (0..dense).collect();
    for round in 1..=rounds {
        let width = dense - (dense - keep) * round / rounds;
        let down = mlp.down.weight()?;
        let kept = strongest(&rows, &down, width)?;
        let index = Tensor::from_iter(kept.iter().map(|&j| j as u32), down.device())?;
        ids = kept.iter().map(|&j| ids[j]).collect();
        mlp = narrowed(&mlp, &index)?;
        for rows in &mut rows {
            for activations in [&mut rows.s, &mut rows.z, &mut rows.p] {
                *activations = activations.index_select(&index, 1)?;
            }
        }
        if round == rounds {
            break;
        }
        refit(
            &mut mlp.down,
            rows.iter().map(|r| (&r.p, &r.y)),
            ridge,
            layer,
        )?;
        let toward_p = inverse_normal(&mlp.down.weight()?, layer)?;
        for rows in &mut rows {
            rows.move_activations(&mlp, &toward_p)?;
        }
        if tokens >= TOKENS_PER_COLUMN * rows[0].x.dims()[1] {
            refit(&mut mlp.up, rows.iter().map(|r| (&r.x, &r.z)), ridge, layer)?;
            refit(
                &mut mlp.gate,
                rows.iter().map(|r| (&r.x, &r.s)),
                ridge,
                layer,
            )?;
        }
    }
    for rows in &mut rows {
        rows.p = (mlp.gate.forward(&rows.x)?.silu()? * mlp.up.forward(&rows.x)?)?;
    }
    refit(
        &mut mlp.down,
        rows.iter().map(|r| (&r.p, &r.y)),
        ridge,
        layer,
    )?;
    Ok((ids, mlp.into_mlp()))
}

impl Rows {
    /// One pass over p, z and s; `toward_p` is `(W_dᵀ W_d + 1)⁻¹`.
    fn move_activations(&mut self, mlp: &Gated, toward_p: &Tensor) -> Result<()> {
        let (gate, up) = (mlp.gate.forward(&self.x)?, mlp.up.forward(&self.x)?);
        let act = self.s.silu()?;
        let y = match mlp.down.bias() {
            Some(bias) => self.y.broadcast_sub(bias)?,
            None => self.y.clone(),
        };
        self.p = (y.matmul(&mlp.down.weight()?)? + (&act * &self.z)?)?.matmul(toward_p)?;
        self.z = ((up + (&act * &self.p)?)? / (act.sqr()? + 1.0)?)?;
        for _ in 0..STEPS {
            let sigmoid = (self.s.neg()?.exp()? + 1.0)?.recip()?;
            let act = (&self.s * &sigmoid)?;
            // φ'(s) = σ(s) (1 + s (1 − σ(s))).
            let slope = (&sigmoid * (((&self.s - &act)? + 1.0)?))?;
            let miss = (&self.p - (&act * &self.z)?)?;
            let gradient = ((&self.s - &gate)? - ((miss * &self.z)? * slope)?)?;
            self.s = (&self.s - (gradient * (2.0 * PENALTY * RATE))?)?;
        }
        Ok(())
    }
}

/// Ascending ids of the `width` neurons with the most `‖p_j‖ · Σ_o |W_d[o,j]|`.
fn strongest(rows: &[Rows], down: &Tensor, width: usize) -> Result<Vec<usize>> {
    let mut squares = vec![0f64; down.dims()[1]];
    for rows in rows {
        for (sum, square) in squares.iter_mut().zip(to_vec(&rows.p.sqr()?.sum(0)?)?) {
            *sum += f64::from(square);
        }
    }
    let weights = to_vec(&down.abs()?.sum(0)?)?;
    let scores: Vec<f64> = squares
        .iter()
        .zip(weights)
        .map(|(square, weight)| square.sqrt() * f64::from(weight))
        .collect();
    let mut ids: Vec<usize> = (0..scores.len()).collect();
    ids.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    ids.truncate(width);
    ids.sort_unstable();
    Ok(ids)
}

fn to_vec(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_device(&Device::Cpu)?.to_vec1::<f32>()?)
}

/// Rows of gate and up and columns of down.
fn narrowed(mlp: &Gated, index: &Tensor) -> Result<Gated> {
    let down = mlp.down.weight()?.index_select(index, 1)?;
    Ok(Gated {
        gate: mlp.gate.select(index)?,
        up: mlp.up.select(index)?,
        down: Linear::new(down, mlp.down.bias().cloned()),
    })
}

/// Moves the weight (`[out, in]`) of a linear to the least squares of outputs on inputs, the damping
/// holding on to what it was. `pairs` are an input `[rows, in]` and what the whole linear, with its
/// bias, should give for it, `[rows, out]`.
pub(super) fn refit<'a>(
    linear: &mut Linear,
    pairs: impl Iterator<Item = (&'a Tensor, &'a Tensor)>,
    ridge: f64,
    layer: usize,
) -> Result<()> {
    let weight = linear.weight()?;
    let (outputs, width) = weight.dims2()?;
    let mut gram = Tensor::zeros((width, width), DType::F32, weight.device())?;
    let mut cross = Tensor::zeros((width, outputs), DType::F32, weight.device())?;
    for (input, target) in pairs {
        let miss = (target - linear.forward(input)?)?;
        let transposed = input.t()?;
        gram = (gram + transposed.matmul(input)?)?;
        cross = (cross + transposed.matmul(&miss)?)?;
    }
    let diagonal = (&gram * Tensor::eye(width, DType::F32, weight.device())?)?;
    let mean = f64::from(diagonal.sum_all()?.to_scalar::<f32>()?) / width as f64;
    let delta = solve(&gram, ridge * mean, &cross, layer)?.to_device(weight.device())?;
    linear.set_weight((weight + delta.t()?)?);
    Ok(())
}

/// `(Wᵀ W + 1)⁻¹`.
fn inverse_normal(weight: &Tensor, layer: usize) -> Result<Tensor> {
    let width = weight.dim(D::Minus1)?;
    let normal = weight.t()?.matmul(weight)?;
    let eye = Tensor::eye(width, DType::F32, &Device::Cpu)?;
    Ok(solve(&normal, 1.0, &eye, layer)?.to_device(weight.device())?)
}
