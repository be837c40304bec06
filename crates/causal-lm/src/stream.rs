//! Running windows through a model one block at a time.
//!
//! The hidden states of all windows wait between two blocks while only one block's weights are in
//! memory. Peak memory is that, whatever the depth of the model.

use crate::attention::Mixer;
use crate::block::{Block, Mlp, RopeTables};
use crate::decoder::Decoder;
use crate::mixture::MixturePass;
use crate::ops;
use crate::tap::Tap;
use crate::vocabulary::Embedding;
use crate::windows::Windows;
use crate::{Error, Result};
use candle_core::Tensor;
use tensor_io::Progress;

/// Tokens that go through a block at once: enough for the GEMM's full rate, few enough that the
/// MLP's intermediate tensors stay small beside the hidden states of all windows.
pub const BATCH_TOKENS: usize = 2048;

/// Hidden states of a set of windows between two blocks.
#[derive(Clone, Debug)]
pub struct Hidden {
    /// Each `[windows, len, hidden]`.
    batches: Vec<Tensor>,
    rope: RopeTables,
    windows_per_batch: usize,
}

impl Hidden {
    /// The embeddings of `windows`.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] for a token without an embedding.
    pub fn embed(decoder: &Decoder<'_>, windows: &Windows) -> Result<Self> {
        Self::embed_with(decoder, &decoder.embedding()?, windows)
    }

    /// The same with the rows of another embedding.
    ///
    /// # Errors
    /// As [`Hidden::embed`].
    pub fn embed_with(
        decoder: &Decoder<'_>,
        embedding: &Embedding<'_>,
        windows: &Windows,
    ) -> Result<Self> {
        let windows_per_batch = (BATCH_TOKENS / windows.window_len()).max(1);
        let all: Vec<&[u32]> = windows.iter().collect();
        let batches = all
            .chunks(windows_per_batch)
            .map(|batch| embedding.rows(batch))
            .collect::<Result<_>>()?;
        decoder.release_embedding();
        let hidden = Self {
            batches,
            rope: decoder.rope(0, windows.window_len())?,
            windows_per_batch,
        };
        hidden.check_finite(|| "the embedding".into())?;
        Ok(hidden)
    }

    /// Sends every window through `block`.
    ///
    /// # Errors
    /// [`Error::NonFinite`] with the place where the block's output is NaN or infinite, and
    /// [`Error::Tap`] when the tap refuses an input.
    pub fn advance(&mut self, block: &Block, tap: &mut dyn Tap) -> Result<()> {
        match &block.experts {
            Some(experts) => self.advance_experts(block, &mut |id| experts.expert(id), tap),
            None => self.pass(block, tap),
        }
    }

    /// Sends every window through block `layer`, with at most one expert in memory.
    ///
    /// # Errors
    /// As [`Hidden::advance`], and what loading the block reports.
    pub fn advance_stored(
        &mut self,
        decoder: &Decoder<'_>,
        layer: usize,
        tap: &mut dyn Tap,
    ) -> Result<()> {
        let block = decoder.frame(layer)?;
        let moved = match &block.experts {
            None => {
                decoder.release(layer);
                self.pass(&block, tap)
            }
            Some(_) => {
                let mut expert = |id: usize| {
                    let expert = decoder.expert(layer, id)?;
                    decoder.release_expert(layer, id);
                    Ok(expert)
                };
                self.advance_experts(&block, &mut expert, tap)
            }
        };
        decoder.release(layer);
        moved
    }

    /// A block without experts.
    fn pass(&mut self, block: &Block, tap: &mut dyn Tap) -> Result<()> {
        for batch in &mut self.batches {
            *batch = block.forward(batch, &self.rope, &mut Mixer::Windows, tap)?;
        }
        self.check_finite(|| format!("layer {}", block.layer))
    }

    /// Sends every window through a block whose experts come from `expert`, which is asked for each that is needed once and
    /// in ascending order. A block without experts runs as it is.
    ///
    /// # Errors
    /// As [`Hidden::advance`], and what `expert` reports.
    pub fn advance_experts(
        &mut self,
        block: &Block,
        expert: &mut dyn FnMut(usize) -> Result<Mlp>,
        tap: &mut dyn Tap,
    ) -> Result<()> {
        let run = (&self.rope, &mut Mixer::Windows);
        match MixturePass::through(block, &self.batches, run, expert, tap)? {
            None => self.pass(block, tap),
            Some(batches) => {
                self.batches = batches;
                self.check_finite(|| format!("layer {}", block.layer))
            }
        }
    }

    /// The batches, each `[windows, len, hidden]`, windows in their order.
    pub fn batches(&self) -> &[Tensor] {
        &self.batches
    }

    fn check_finite(&self, stage: impl Fn() -> String) -> Result<()> {
        for (index, batch) in self.batches.iter().enumerate() {
            if let Some(element) = ops::first_non_finite(batch)? {
                let (_, len, hidden) = batch.dims3()?;
                let token = element / hidden;
                let window = index * self.windows_per_batch + token / len;
                return Err(Error::NonFinite {
                    stage: stage(),
                    window,
                    position: token % len,
                });
            }
        }
        Ok(())
    }
}

/// Runs all blocks over `windows`, loading one at a time; `progress` advances by one after each block (the caller, who
/// knows what else there is to do, begins the stage).
///
/// # Errors
/// What loading or running a block reports, and [`Error::Cancelled`].
pub fn run_blocks(
    decoder: &Decoder<'_>,
    windows: &Windows,
    tap: &mut dyn Tap,
    progress: &dyn Progress,
) -> Result<Hidden> {
    let mut hidden = Hidden::embed(decoder, windows)?;
    for layer in 0..decoder.config().layers() {
        hidden.advance_stored(decoder, layer, tap)?;
        progress.advance(1)?;
    }
    Ok(hidden)
}
