//! Hidden states between two blocks, which several variants of a block read.

use crate::Result;
use candle_core::Tensor;
use causal_lm::block::RopeTables;
use causal_lm::mixture::MixturePass;
use causal_lm::{Block, Decoder, Hidden, Mixer, NoTap, Tap, Windows};
use rayon::prelude::*;

/// Hidden states of windows, which may also be mixed. A clone shares its tensors.
#[derive(Clone)]
pub(crate) struct Activations {
    pub(crate) batches: Vec<Tensor>,
    pub(crate) rope: RopeTables,
}

impl Activations {
    pub(crate) fn embed(decoder: &Decoder<'_>, windows: &Windows) -> Result<Self> {
        Self::embed_with(decoder, None, windows)
    }

    /// The same with another embedding, `[vocab, hidden]`.
    pub(crate) fn embed_with(
        decoder: &Decoder<'_>,
        table: Option<Tensor>,
        windows: &Windows,
    ) -> Result<Self> {
        let mut embedding = decoder.embedding()?;
        if let Some(table) = table {
            embedding = embedding.with_table(table)?;
        }
        let hidden = Hidden::embed_with(decoder, &embedding, windows)?;
        Ok(Self {
            batches: hidden.batches().to_vec(),
            rope: decoder.rope(0, windows.window_len())?,
        })
    }

    /// What `block` makes of them.
    pub(crate) fn through(&self, block: &Block) -> Result<Vec<Tensor>> {
        let forward = |batch: &Tensor| self.forward(block, batch, &mut NoTap);
        self.batches.par_iter().map(forward).collect()
    }

    /// What they are behind attention and router of a block with experts; `None` for another block.
    pub(crate) fn routed<'b>(&self, block: &'b Block) -> Result<Option<MixturePass<'b>>> {
        let run = (&self.rope, &mut Mixer::Windows);
        Ok(MixturePass::begin(block, &self.batches, run, &mut NoTap)?)
    }

    /// What `block` makes of them, one batch after the other, with a tap on the block's linears.
    pub(crate) fn observed(&self, block: &Block, tap: &mut dyn Tap) -> Result<Vec<Tensor>> {
        let forward = |batch: &Tensor| self.forward(block, batch, tap);
        self.batches.iter().map(forward).collect()
    }

    fn forward(&self, block: &Block, batch: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        Ok(block.forward(batch, &self.rope, &mut Mixer::Windows, tap)?)
    }
}
