//! Taps: where statistics of a model's activations are collected.
//!
//! A block hands the input of each of its linears to a [`Tap`] while it runs. Linears that read
//! the same tensor (q/k/v, and gate/up) share one call.

use candle_core::Tensor;

/// Which input is being handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// Input of q_proj, k_proj and v_proj, `[rows, hidden]`.
    Qkv,
    /// Input of o_proj: the heads' outputs side by side, `[rows, heads * head_dim]`.
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
}

/// Looks at nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTap;

impl Tap for NoTap {
    fn observe(&mut self, _layer: usize, _site: Site, _x: &Tensor) -> TapResult {
        Ok(())
    }
}
