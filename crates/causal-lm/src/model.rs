//! A whole decoder in memory, for generation.

use crate::attention::Mixer;
use crate::block::Block;
use crate::decoder::Decoder;
use crate::tap::NoTap;
use crate::vocabulary::{Embedding, Head};
use crate::weights::WeightSummary;
use crate::{Error, Result};
use candle_core::Tensor;
use kv_lazy::{CacheSet, LayerShape};

/// The embedding, all blocks and the head of a decoder.
#[derive(Debug)]
pub struct Model<'a> {
    decoder: &'a Decoder<'a>,
    embedding: Embedding<'a>,
    blocks: Vec<Block>,
    head: Head,
    longest: usize,
}

impl<'a> Model<'a> {
    /// Loads every block.
    ///
    /// # Errors
    /// What reading the tensors reports.
    pub fn load(decoder: &'a Decoder<'a>) -> Result<Self> {
        let load = |layer| {
            let block = decoder.block(layer);
            decoder.release(layer);
            block
        };
        let blocks = (0..decoder.config().layers())
            .map(load)
            .collect::<Result<_>>()?;
        Ok(Self {
            decoder,
            embedding: decoder.embedding()?,
            blocks,
            head: decoder.head()?,
            longest: 0,
        })
    }

    /// The decoder it was loaded from.
    pub fn decoder(&self) -> &Decoder<'a> {
        self.decoder
    }

    /// The same for sequences of up to `positions` tokens in all. Some architectures rotate by other frequencies when a
    /// sequence is longer than their first training context, and cannot change their mind on the way: keys that were
    /// rotated before would be wrong. Without this the choice is made step by step, by the tokens so far.
    pub fn for_positions(self, positions: usize) -> Self {
        Self {
            longest: positions,
            ..self
        }
    }

    /// How its linears are multiplied, and the bytes of all weights in memory.
    pub fn weights(&self) -> WeightSummary {
        let mut weights = WeightSummary::default();
        for block in &self.blocks {
            weights.add_block(block);
        }
        weights.add_head(&self.head);
        weights
    }

    /// Bytes of the weights in memory. Rows of the embedding are read from the file as they are needed and do not count,
    /// unless the head is the embedding.
    pub fn weight_bytes(&self) -> usize {
        self.weights().bytes
    }

    /// What a cache has to hold for each layer, for [`CacheSet::full`] and its like.
    pub fn cache_shapes(&self) -> Vec<LayerShape> {
        let config = self.decoder.config();
        config
            .widths
            .iter()
            .zip(&config.attention)
            .map(|(widths, attention)| LayerShape {
                query_heads: widths.heads,
                kv_heads: widths.kv_heads,
                head_dim: attention.head_dim,
                sliding_window: attention.sliding_window,
            })
            .collect()
    }

    /// A cache that keeps everything, for `batch` sequences.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn full_cache(&self, batch: usize) -> Result<CacheSet> {
        let (dtype, device) = (self.decoder.dtype(), self.decoder.device());
        Ok(CacheSet::full(&self.cache_shapes(), batch, dtype, device)?)
    }

    /// Appends equally many `tokens` to each sequence of `cache` and returns the logits of the
    /// last of them, `[batch, vocab]`.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`], and what running a block reports.
    pub fn forward(&self, tokens: &[&[u32]], cache: &mut CacheSet) -> Result<Tensor> {
        let hidden = self.hidden(tokens, cache)?;
        let (batch, count, width) = hidden.dims3()?;
        self.head
            .forward(&hidden.narrow(1, count - 1, 1)?.reshape((batch, width))?)
    }

    /// As [`Model::forward`], with the logits of all positions, `[batch, tokens, vocab]`.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn forward_all(&self, tokens: &[&[u32]], cache: &mut CacheSet) -> Result<Tensor> {
        let hidden = self.hidden(tokens, cache)?;
        let (batch, count, width) = hidden.dims3()?;
        let logits = self
            .head
            .forward(&hidden.reshape((batch * count, width))?)?;
        Ok(logits.reshape((batch, count, self.head.vocab_size()))?)
    }

    fn hidden(&self, tokens: &[&[u32]], cache: &mut CacheSet) -> Result<Tensor> {
        let count = tokens.first().map_or(0, |sequence| sequence.len());
        if count == 0 || tokens.iter().any(|sequence| sequence.len() != count) {
            return Err(Error::Windows(
                "every sequence of a step needs equally many tokens, at least one".into(),
            ));
        }
        let mut x = self.embedding.rows(tokens)?;
        let step = cache.begin(count)?;
        let total = self.longest.max(step.position + count);
        let rope = self.decoder.rope_within(step.position, count, total)?;
        for block in &self.blocks {
            x = block.forward(&x, &rope, &mut Mixer::Cache(cache), &mut NoTap)?;
        }
        cache.end()?;
        Ok(x)
    }
}
