//! The future of a trace, for the oracle.

use crate::policy::oracle::Future;
use crate::trace::LayerTrace;
use std::sync::Arc;

/// Full-cache attention of the recorded queries still to come.
#[derive(Debug)]
pub struct FutureAttention {
    layer: Arc<LayerTrace>,
    scale: f64,
}

impl FutureAttention {
    /// That of one layer of a trace whose logits are q·k times `scale`.
    pub fn new(layer: Arc<LayerTrace>, scale: f64) -> Self {
        Self { layer, scale }
    }
}

impl Future for FutureAttention {
    fn mass(&self, head: usize, from: u32, horizon: usize, ids: &[u32], out: &mut [f32]) {
        let group = self.layer.group();
        let end = (from as usize)
            .saturating_add(horizon)
            .min(self.layer.tokens);
        for t in from as usize..end {
            for query_head in head * group..(head + 1) * group {
                // Traces are checked to be finite on entry; an overflow in the product would stop the replay itself.
                let Ok((weights, _)) = self.layer.attention(query_head, t, self.scale) else {
                    continue;
                };
                for (sum, &id) in out.iter_mut().zip(ids) {
                    *sum += weights[id as usize];
                }
            }
        }
    }
}
