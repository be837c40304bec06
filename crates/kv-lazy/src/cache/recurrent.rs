//! Layers without keys and values that carry a state from token to token, such as linear attention.
//!
//! The set keeps what they carry with the caches of the other layers, so that snapshots, resets and batches have it too. It does
//! not know what it means: policies evict none of it.

use super::CacheSet;
use crate::error::{Error, Result};

impl CacheSet {
    /// What a layer without KV heads carries from token to token: `numbers` for each sequence, one sequence after the other. They
    /// are zeros in the first step, and what the model left in them in later ones; the model brings them forward by the tokens of
    /// the step, once.
    ///
    /// # Errors
    /// [`Error::State`] for a layer with KV heads and for another size than before; a layer that is not there; [`Error::Step`] for
    /// a state that is asked for twice in a step, outside one, or not in all of them.
    pub fn state(&mut self, layer: usize, numbers: usize) -> Result<&mut [f32]> {
        let layers = self.layers.len();
        let (batch, clock) = (self.batch, self.clock);
        let at = self.layers.get_mut(layer).ok_or(Error::Layer {
            layer,
            layers,
            without_heads: false,
        })?;
        let problem = |problem: String| Err(Error::State { layer, problem });
        if at.shape.kv_heads > 0 {
            return problem("it has keys and values, and no state beside them".into());
        }
        let Some(all) = batch.checked_mul(numbers) else {
            return problem(format!("{numbers} numbers for each of {batch} sequences"));
        };
        if at.state.is_empty() {
            let what = match clock {
                _ if clock.tokens == 0 => Some("its state is asked for before begin"),
                _ if clock.next > clock.tokens => Some("its state begins after the first step"),
                _ => None,
            };
            if let Some(what) = what {
                return Err(Error::Step { layer, what });
            }
            at.state = vec![0.0; all];
        } else if at.attended {
            return Err(Error::Step {
                layer,
                what: "its state is brought forward twice",
            });
        }
        if at.state.len() != all {
            return problem(format!(
                "its state has {} numbers for each sequence, not {numbers}",
                at.state.len() / batch.max(1)
            ));
        }
        at.attended = true;
        Ok(&mut at.state)
    }

    /// Bytes of the states of all layers without KV heads, which [`state_bytes`](Self::state_bytes) counts too.
    pub fn recurrent_bytes(&self) -> usize {
        let numbers = self.layers.iter().map(|layer| layer.state.len());
        numbers.sum::<usize>() * size_of::<f32>()
    }
}
