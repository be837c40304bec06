//! Gated DeltaNet: a recurrence in the place of attention (arXiv 2412.06464, in the form that Qwen3.5 has of it).
//!
//! Queries, keys and values of a token come from a projection, a causal convolution of each channel and SiLU; queries and keys
//! have length 1, queries are divided by √key_dim. Every value head keeps a matrix S, `[key_dim, value_dim]`. A token makes it
//! fade, S ← αS, writes under its key what S does not hold of its value yet, S ← S + k ⊗ β(v − Sᵀk), and reads o = Sᵀq.
//!
//! The recurrence runs token by token in f32: for a head it takes some eight operations for each number of S, a few per cent of
//! what the projections around it take. Columns of S do not depend on each other, so that a block of them stays in the first
//! cache for many tokens. Heads run in parallel; every number is computed by one thread in one order.

use crate::Result;
use crate::attention::Mixer;
use crate::block::Norm;
use crate::config::{Activation, DeltaNetConfig};
use crate::forest::{Forest, Tree};
use crate::linear::Linear;
use crate::ops::{activate, silu, with_f32};
use candle_core::{DType, Device, Tensor};
use pulp::Arch;
use rayon::prelude::*;
use std::ops::Range;

/// Tokens that are convolved at once: enough to divide the work among threads, few enough that what they put out stays small.
const CHUNK: usize = 256;
/// Added to the squared length of queries and keys.
const LENGTH_EPS: f32 = 1e-6;

/// A gated delta net.
#[derive(Clone, Debug)]
pub struct DeltaNet {
    /// Its heads.
    pub shape: DeltaNetConfig,
    /// Queries, keys and values before the convolution, `[channels, hidden]`.
    pub qkv: Linear,
    /// Gate of the output, `[values, hidden]`.
    pub z: Linear,
    /// How much of a value is written, before a sigmoid, `[value_heads, hidden]`.
    pub b: Linear,
    /// Time step of a head, before softplus, `[value_heads, hidden]`.
    pub a: Linear,
    /// `[hidden, values]`.
    pub out: Linear,
    /// Weights of the convolution, `[kernel, channels]`, those of the newest token last; f32 on the CPU like all that follows.
    pub conv: Tensor,
    /// Logarithm of the rate at which S fades, `[value_heads]`.
    pub log_decay: Tensor,
    /// What is added to the time step, `[value_heads]`.
    pub dt_bias: Tensor,
    /// Norm of a head's output, before the gate.
    pub norm: Norm,
}

impl DeltaNet {
    /// From the input `[batch * tokens, hidden]` to the input of `out`, `[batch * tokens, values]`.
    pub(crate) fn mix(
        &self,
        x: &Tensor,
        tokens: usize,
        layer: usize,
        mixer: &mut Mixer<'_>,
    ) -> Result<Tensor> {
        let shape = self.shape;
        let rows = x.dim(0)?;
        let [u, z, b, a] = Linear::forward_all([&self.qkv, &self.z, &self.b, &self.a], x)?;
        let rates = self.rates(&host(&b)?, &host(&a)?)?;
        let mut heads = vec![0f32; rows * shape.values()];
        with_f32(&host(&u)?, |u| -> Result<()> {
            with_f32(&self.conv, |conv| -> Result<()> {
                let recurrence = Recurrence {
                    shape,
                    conv,
                    u,
                    rates: &rates,
                };
                match mixer {
                    Mixer::Windows => {
                        let batch = rows.checked_div(tokens).unwrap_or(0);
                        let mut states = vec![0f32; batch * shape.state()];
                        recurrence.sequences(tokens, &mut states, &mut heads);
                    }
                    Mixer::Forest(forest) => recurrence.forest(forest, &mut heads),
                    Mixer::Cache(cache) => {
                        let states = cache.state(layer, shape.state())?;
                        recurrence.sequences(tokens, states, &mut heads);
                    }
                }
                Ok(())
            })?
        })??;
        let heads = Tensor::from_vec(
            heads,
            (rows * shape.value_heads, shape.value_dim),
            &Device::Cpu,
        )?;
        let normed = self.norm.forward(&heads)?.reshape((rows, shape.values()))?;
        let gated = activate(Activation::Silu, &host(&z)?, Some(&normed))?;
        Ok(gated.to_dtype(x.dtype())?.to_device(x.device())?)
    }

    /// α and β of every token and head, from `[rows, value_heads]` each.
    fn rates(&self, b: &Tensor, a: &Tensor) -> Result<Vec<[f32; 2]>> {
        let decay = self.log_decay.to_vec1::<f32>()?;
        let decay: Vec<f32> = decay.into_iter().map(|log| -log.exp()).collect();
        let dt_bias = self.dt_bias.to_vec1::<f32>()?;
        let (a, b) = (a.flatten_all()?, b.flatten_all()?);
        let (a, b) = (a.to_vec1::<f32>()?, b.to_vec1::<f32>()?);
        let of_heads = decay.iter().zip(&dt_bias).cycle();
        let rates = a.iter().zip(&b).zip(of_heads);
        let rate = |((a, b), (decay, dt_bias)): ((&f32, &f32), (&f32, &f32))| {
            let alpha = (decay * softplus(a + dt_bias)).exp();
            [alpha, 1.0 / (1.0 + (-b).exp())]
        };
        Ok(rates.map(rate).collect())
    }

    /// Bytes of what is no linear.
    pub(crate) fn small_bytes(&self) -> usize {
        let tensors = [&self.conv, &self.log_decay, &self.dt_bias];
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        tensors.into_iter().map(bytes).sum::<usize>() + self.norm.bytes()
    }
}

/// In f32 on the CPU.
fn host(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
}

/// ln(1 + eˣ), which is x where x is large.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// What the sequences of a step go through.
#[derive(Clone, Copy)]
struct Recurrence<'a> {
    shape: DeltaNetConfig,
    /// `[kernel, channels]`.
    conv: &'a [f32],
    /// Projections of all tokens, `[rows, channels]`.
    u: &'a [f32],
    /// α and β of all tokens, `[rows, value_heads]`.
    rates: &'a [[f32; 2]],
}

impl Recurrence<'_> {
    /// Sequences of equal length one after the other, each with its state.
    fn sequences(&self, tokens: usize, states: &mut [f32], out: &mut [f32]) {
        out.par_chunks_mut((tokens * self.shape.values()).max(1))
            .zip(states.par_chunks_mut(self.shape.state()))
            .enumerate()
            .for_each(|(at, (out, state))| {
                self.sequence(at * tokens..(at + 1) * tokens, state, out);
            });
    }

    /// Trees one after the other: every branch goes on from the state at the end of its trunk.
    fn forest(&self, forest: &Forest, out: &mut [f32]) {
        let width = self.shape.values();
        let (mut rest, mut next) = (out, 0);
        let mut trees: Vec<(usize, &Tree, &mut [f32])> = Vec::new();
        for tree in &forest.trees {
            let (out, after) = rest.split_at_mut(tree.tokens() * width);
            trees.push((next, tree, out));
            (rest, next) = (after, next + tree.tokens());
        }
        trees.into_par_iter().for_each(|(start, tree, out)| {
            let mut trunk = vec![0f32; self.shape.state()];
            let (out, mut rest) = out.split_at_mut(tree.trunk * width);
            let mut next = start + tree.trunk;
            self.sequence(start..next, &mut trunk, out);
            for &tokens in &tree.branches {
                let (out, after) = rest.split_at_mut(tokens * width);
                self.sequence(next..next + tokens, &mut trunk.clone(), out);
                (rest, next) = (after, next + tokens);
            }
        });
    }

    /// The tokens `rows` of one sequence after those that left `state`; `out` is `[tokens, values]`.
    fn sequence(&self, rows: Range<usize>, state: &mut [f32], out: &mut [f32]) {
        let DeltaNetConfig {
            value_heads,
            value_dim,
            key_dim,
            ..
        } = self.shape;
        let (channels, width) = (self.shape.channels(), self.shape.values());
        let (matrices, before) = state.split_at_mut(key_dim * width);
        let out = out.chunks_mut((CHUNK * width).max(1));
        for (first, out) in rows.clone().step_by(CHUNK).zip(out) {
            let tokens = first..rows.end.min(first + CHUNK);
            let qkv = self.convolved(&rows, tokens.clone(), before);
            let rates = &self.rates[tokens.start * value_heads..tokens.end * value_heads];
            let of_head = |(head, s): (usize, &mut [f32])| self.head(head, &qkv, rates, s);
            let heads = matrices.par_chunks_mut(key_dim * value_dim).enumerate();
            let heads: Vec<Vec<f32>> = heads.map(of_head).collect();
            out.par_chunks_mut(width).enumerate().for_each(|(t, row)| {
                let of_heads = row.chunks_exact_mut(value_dim).zip(&heads);
                of_heads.for_each(|(row, o)| row.copy_from_slice(&o[t * value_dim..][..value_dim]));
            });
        }
        // What the convolution sees next: the newest rows of those before and these.
        let held = before.len() / channels;
        let (new, old) = (rows.len().min(held), held.saturating_sub(rows.len()));
        before.copy_within((held - old) * channels.., 0);
        let newest = &self.u[(rows.end - new) * channels..rows.end * channels];
        before[old * channels..].copy_from_slice(newest);
    }

    /// Queries, keys and values of `tokens`, `[tokens, channels]`, which are some of the `rows` of a sequence with the rows
    /// `before` it.
    fn convolved(&self, rows: &Range<usize>, tokens: Range<usize>, before: &[f32]) -> Vec<f32> {
        let channels = self.shape.channels();
        let held = before.len() / channels;
        let mut sums = vec![0f32; tokens.len() * channels];
        sums.par_chunks_mut(channels)
            .enumerate()
            .for_each(|(t, sum)| {
                let at = tokens.start - rows.start + t;
                for (tap, weights) in self.conv.chunks_exact(channels).enumerate() {
                    let x = match (at + tap).checked_sub(held) {
                        Some(at) => &self.u[(rows.start + at) * channels..][..channels],
                        None => &before[(at + tap) * channels..][..channels],
                    };
                    let terms = weights.iter().zip(x);
                    sum.iter_mut()
                        .zip(terms)
                        .for_each(|(y, (w, x))| *y += w * x);
                }
            });
        let mut qkv = vec![0f32; sums.len()];
        silu(&sums, &mut qkv);
        let (keys, dim) = (self.shape.keys(), self.shape.key_dim);
        let scale = 1.0 / (dim as f32).sqrt();
        qkv.par_chunks_mut(channels).for_each(|row| {
            let (q, rest) = row.split_at_mut(keys);
            q.chunks_exact_mut(dim).for_each(|q| stretch(q, scale));
            let k = rest[..keys].chunks_exact_mut(dim);
            k.for_each(|k| stretch(k, 1.0));
        });
        qkv
    }

    /// Outputs of a value head, `[tokens, value_dim]`, and its matrix after them.
    fn head(&self, head: usize, qkv: &[f32], rates: &[[f32; 2]], s: &mut [f32]) -> Vec<f32> {
        let DeltaNetConfig {
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            ..
        } = self.shape;
        let channels = self.shape.channels();
        let key = head / (value_heads / key_heads) * key_dim;
        let tokens = || {
            let rates = rates[head..].iter().step_by(value_heads);
            let rows = qkv.chunks_exact(channels).zip(rates);
            rows.map(move |(row, &[alpha, beta])| Token {
                q: &row[key..][..key_dim],
                k: &row[key_heads * key_dim + key..][..key_dim],
                v: &row[2 * key_heads * key_dim + head * value_dim..][..value_dim],
                alpha,
                beta,
            })
        };
        let mut out = vec![0f32; qkv.len() / channels * value_dim];
        let mut rest = s;
        for columns in blocks(value_dim) {
            let (s, after) = rest.split_at_mut(columns.len() * key_dim);
            rest = after;
            let out = &mut out[..];
            Arch::new().dispatch(|| match columns.len() {
                WIDE => run::<WIDE>(tokens(), columns.start, s, (out, value_dim)),
                NARROW => run::<NARROW>(tokens(), columns.start, s, (out, value_dim)),
                _ => run::<1>(tokens(), columns.start, s, (out, value_dim)),
            });
        }
        out
    }
}

/// A token as one head sees it.
struct Token<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    alpha: f32,
    beta: f32,
}

/// Columns of S that go through the tokens together: as many as sums of them fit vector registers.
const WIDE: usize = 32;
/// The same where fewer are left.
const NARROW: usize = 4;

/// The columns of a matrix, cut into blocks of [`WIDE`], [`NARROW`] and 1; each is stored by itself, row by row.
fn blocks(columns: usize) -> impl Iterator<Item = Range<usize>> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let width = match columns - next {
            0 => return None,
            left if left >= WIDE => WIDE,
            left if left >= NARROW => NARROW,
            _ => 1,
        };
        next += width;
        Some(next - width..next)
    })
}

/// The columns from `first` on of one head, `[key_dim, W]`.
#[inline(always)]
fn run<'a, const W: usize>(
    tokens: impl Iterator<Item = Token<'a>>,
    first: usize,
    s: &mut [f32],
    (out, stride): (&mut [f32], usize),
) {
    let (s, _) = s.as_chunks_mut::<W>();
    for (token, out) in tokens.zip(out.chunks_exact_mut(stride)) {
        let mut known = [0f32; W];
        for (row, &k) in s.iter_mut().zip(token.k) {
            for (known, s) in known.iter_mut().zip(row) {
                *s *= token.alpha;
                *known += *s * k;
            }
        }
        let mut new = [0f32; W];
        for ((new, v), known) in new.iter_mut().zip(&token.v[first..]).zip(known) {
            *new = token.beta * (v - known);
        }
        let mut read = [0f32; W];
        for ((row, &k), &q) in s.iter_mut().zip(token.k).zip(token.q) {
            for ((read, s), new) in read.iter_mut().zip(row).zip(new) {
                *s += k * new;
                *read += *s * q;
            }
        }
        out[first..first + W].copy_from_slice(&read);
    }
}

/// Gives a vector the length `length`.
fn stretch(x: &mut [f32], length: f32) {
    let mut sums = [0f32; 8];
    let (eights, rest) = x.as_chunks::<8>();
    for eight in eights {
        sums.iter_mut()
            .zip(eight)
            .for_each(|(sum, x)| *sum += x * x);
    }
    let sum = sums.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    let factor = length / (sum + LENGTH_EPS).sqrt();
    x.iter_mut().for_each(|x| *x *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_columns_once() {
        for columns in [1, 3, 4, 12, 32, 45, 128] {
            let blocks: Vec<Range<usize>> = blocks(columns).collect();
            assert!(blocks.iter().all(|block| [1, 4, 32].contains(&block.len())));
            let covered: Vec<usize> = blocks.into_iter().flatten().collect();
            assert_eq!(covered, (0..columns).collect::<Vec<_>>());
        }
    }

    #[test]
    fn vectors_get_the_length_they_are_given() {
        let mut x: Vec<f32> = (0..19).map(|i| (i as f32 * 0.7).sin()).collect();
        stretch(&mut x, 0.25);
        let length = x.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length - 0.25).abs() < 1e-6, "{length}");
    }
}
