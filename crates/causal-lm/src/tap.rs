//! Taps: where statistics of a model's activations are collected.
//!
//! A block hands the input of each of its linears to a [`Tap`] while it runs. Linears that read
//! the same tensor (q/k/v, and gate/up) share one call.

use crate::mixture::Routing;
use candle_core::Tensor;

/// Which input is being handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// Input of q_proj, k_proj and v_proj, or of a delta net's in_proj_qkv, in_proj_z, in_proj_b and in_proj_a, `[rows, hidden]`.
    Qkv,
    /// Input of o_proj: the heads' outputs side by side, `[rows, heads * head_dim]`; or of a delta net's out_proj.
    O,
    /// Input of gate_proj and up_proj, `[rows, hidden]`.
    GateUp,
    /// Input of down_proj: the neurons' activations, `[rows, neurons]`.
    Down,
}

/// What a tap may fail with.
pub type TapResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// A collector of linear inputs.
pub trait Tap {
    /// Is called once for each site of a block and batch of windows, in the order of the data.
    ///
    /// `x` is `[rows, width]`, one row per token, windows one after the other.
    ///
    /// # Errors
    /// Whatever the collector cannot accept; the run stops and reports it with the layer.
    fn observe(&mut self, layer: usize, site: Site, x: &Tensor) -> TapResult;

    /// Is called once for each block with experts, before they run, with all tokens that run together.
    ///
    /// # Errors
    /// As above.
    fn routed(&mut self, _layer: usize, _routed: &Routed<'_>) -> TapResult {
        Ok(())
    }

    /// Is called once for each expert that some of these tokens chose, in ascending order, and then for each batch with
    /// the expert that every token passes through.
    ///
    /// # Errors
    /// As above.
    fn expert(&mut self, _layer: usize, _pass: &ExpertPass) -> TapResult {
        Ok(())
    }
}

/// What the experts of a block read, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// Input of router and experts, `[tokens, hidden]` for each batch.
    pub inputs: &'a [Tensor],
    /// The experts of the tokens of each batch.
    pub routings: &'a [Routing],
}

/// Tokens on their way through an expert.
#[derive(Clone, Debug)]
pub struct ExpertPass {
    /// Which expert; `None` for the one that every token passes through.
    pub expert: Option<usize>,
    /// The tokens, counted over all batches, ascending.
    pub tokens: Vec<u32>,
    /// What multiplies the output of each.
    pub gates: Vec<f32>,
    /// Input of gate and up, `[tokens, hidden]`.
    pub input: Tensor,
    /// Input of down, `[tokens, neurons]`.
    pub neurons: Tensor,
    /// The output, before gates, `[tokens, hidden]`.
    pub output: Tensor,
}

/// A tap that observes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTap;

impl Tap for NoTap {
    fn observe(&mut self, _layer: usize, _site: Site, _x: &Tensor) -> TapResult {
        Ok(())
    }
}
