//! Log-likelihoods of continuations: how probable a model finds what follows a context.
//!
//! Multiple-choice evaluations compare these. A continuation's log-likelihood is the sum of ln p(token | everything before
//! it) over its tokens. The context of several continuations runs through the model once ([`Forest`]), items are packed
//! without padding, and one block's weights are in memory at a time.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::Tensor;
use causal_lm::block::RopeTables;
use causal_lm::{
    BATCH_TOKENS, Decoder, Forest, Head, Mixer, NoTap, TextTokenizer, Tree, cross_entropy,
    first_non_finite,
};
use tensor_io::Progress;

use crate::memory::{HIDDEN_BYTES, LOGITS};
use crate::{Error, Result};

/// A context and its possible continuations, as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuations {
    /// At least one token.
    pub context: Vec<u32>,
    /// At least one token each.
    pub continuations: Vec<Vec<u32>>,
}

impl Continuations {
    /// Tokenises as the lm-evaluation-harness does: spaces at the end of the context go to the continuations, context and
    /// continuation are tokenised as one text, and what exceeds the number of the context's own tokens is the
    /// continuation. `bos` goes in front of the context.
    ///
    /// # Errors
    /// A text that the tokenizer refuses.
    pub fn encode(
        tokenizer: &TextTokenizer,
        bos: Option<u32>,
        context: &str,
        continuations: &[impl AsRef<str>],
    ) -> Result<Self> {
        let trimmed = context.trim_end();
        let spaces = &context[trimmed.len()..];
        let own = tokenizer.encode(trimmed)?;
        let continuations = continuations
            .iter()
            .map(|continuation| {
                let whole = format!("{trimmed}{spaces}{}", continuation.as_ref());
                let tokens = tokenizer.encode(&whole)?;
                Ok(tokens.get(own.len()..).unwrap_or_default().to_vec())
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            context: bos.into_iter().chain(own).collect(),
            continuations,
        })
    }
}

/// How likely a model finds continuations.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Likelihoods {
    /// ln P(continuation | context) in nats, for each continuation of each item.
    pub log_likelihoods: Vec<Vec<f64>>,
    /// Continuations whose context lost tokens on the left for the sake of the model's positions.
    pub truncated: usize,
    /// Positions that went through the model.
    pub tokens: usize,
    /// Wall time, loading of blocks included.
    pub seconds: f64,
}

impl Likelihoods {
    /// Scores every continuation of `items`. A sequence takes at most `max_positions` positions; its last token is only
    /// predicted and takes none. A context that is too long loses tokens at its beginning. A step of `progress` is one
    /// block, or the head, over one group of batches.
    ///
    /// # Errors
    /// [`Error::Continuation`] for an empty context or continuation, and for a continuation that leaves no position
    /// for its context; what loading or running the model reports, where the window is the item.
    pub fn measure(
        decoder: &Decoder<'_>,
        items: &[Continuations],
        max_positions: usize,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let start = Instant::now();
        let mut batches: Vec<Batch> = Vec::new();
        let mut truncated = 0;
        for (index, item) in items.iter().enumerate() {
            for group in Group::of(index, item, max_positions, decoder.config().short_context())? {
                if group.context.len() < item.context.len() {
                    truncated += group.members.len();
                }
                let fits =
                    |batch: &&mut Batch| batch.tokens.len() + group.tree().tokens() <= BATCH_TOKENS;
                match batches.last_mut().filter(fits) {
                    Some(batch) => batch.push(group),
                    None => {
                        let mut batch = Batch::default();
                        batch.push(group);
                        batches.push(batch);
                    }
                }
            }
        }
        let mut log_likelihoods: Vec<Vec<f64>> = items
            .iter()
            .map(|item| vec![0.0; item.continuations.len()])
            .collect();
        let bytes_per_token = decoder.config().hidden * decoder.dtype().size_in_bytes();
        let per_group = (HIDDEN_BYTES / bytes_per_token / BATCH_TOKENS).max(1);
        let steps = decoder.config().layers() + 1;
        let total = batches.len().div_ceil(per_group) * steps;
        progress.begin("likelihoods", total as u64);
        let head = decoder.head()?;
        for group in batches.chunks(per_group) {
            let hidden = run(decoder, group, progress)?;
            for (batch, hidden) in group.iter().zip(&hidden) {
                for (target, nll) in batch.targets.iter().zip(batch.score(&head, hidden)?) {
                    if !nll.is_finite() {
                        let row = target.row as usize;
                        return Err(batch.non_finite("the logits", row));
                    }
                    log_likelihoods[target.item][target.continuation] -= nll;
                }
            }
            progress.advance(1)?;
        }
        Ok(Self {
            log_likelihoods,
            truncated,
            tokens: batches.iter().map(|batch| batch.tokens.len()).sum(),
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// Positions per second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// Index and tokens of a continuation.
type Member<'a> = (usize, &'a [u32]);

/// The continuations of one item that keep equally much of its context and are rotated alike, and so can share it.
struct Group<'a> {
    item: usize,
    context: &'a [u32],
    members: Vec<Member<'a>>,
}

impl<'a> Group<'a> {
    fn of(
        item: usize,
        of: &'a Continuations,
        max_positions: usize,
        short: Option<usize>,
    ) -> Result<Vec<Self>> {
        let mut by_start: BTreeMap<(usize, bool), Vec<Member<'a>>> = BTreeMap::new();
        for (continuation, tokens) in of.continuations.iter().enumerate() {
            let refuse = |reason: String| Error::Continuation {
                item,
                continuation,
                reason,
            };
            if of.context.is_empty() || tokens.is_empty() {
                return Err(refuse(
                    "context and continuation need at least one token each".into(),
                ));
            }
            if tokens.len() > max_positions {
                return Err(refuse(format!(
                    "{} tokens do not fit into {max_positions} positions",
                    tokens.len()
                )));
            }
            let start = (of.context.len() + tokens.len()).saturating_sub(max_positions + 1);
            // Sequences that are rotated by other frequencies cannot share a context either.
            let positions = of.context.len() - start + tokens.len() - 1;
            let long = short.is_some_and(|short| positions > short);
            by_start
                .entry((start, long))
                .or_default()
                .push((continuation, tokens));
        }
        let group = |((start, _), members)| Self {
            item,
            context: &of.context[start..],
            members,
        };
        Ok(by_start.into_iter().map(group).collect())
    }

    /// The last token of a continuation is predicted and never read: a continuation of one token has no branch.
    fn tree(&self) -> Tree {
        let lengths = self.members.iter().map(|(_, tokens)| tokens.len() - 1);
        Tree {
            trunk: self.context.len(),
            branches: lengths.filter(|&len| len > 0).collect(),
        }
    }
}

/// A token that is predicted.
struct Target {
    /// Row of the batch whose logits predict it.
    row: u32,
    token: u32,
    item: usize,
    continuation: usize,
}

/// Trees that run through a block together.
#[derive(Default)]
struct Batch {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    /// Item of each tree.
    items: Vec<usize>,
    forest: Forest,
    targets: Vec<Target>,
}

impl Batch {
    fn push(&mut self, group: Group<'_>) {
        let tree = group.tree();
        self.positions.extend(tree.positions().map(|p| p as u32));
        self.tokens.extend(group.context);
        let last_of_context = self.tokens.len() - 1;
        for (continuation, tokens) in group.members {
            let branch = self.tokens.len();
            self.tokens.extend(&tokens[..tokens.len() - 1]);
            let rows = std::iter::once(last_of_context).chain(branch..);
            let target = |(row, &token): (usize, &u32)| Target {
                row: row as u32,
                token,
                item: group.item,
                continuation,
            };
            self.targets.extend(rows.zip(tokens).map(target));
        }
        self.items.push(group.item);
        self.forest.trees.push(tree);
    }

    /// Rotations of all tokens: of each tree by the length of its longest sequence.
    fn rope(&self, decoder: &Decoder<'_>) -> Result<RopeTables> {
        let of_tree = |tree: &Tree| -> Result<RopeTables> {
            let longest = tree.trunk + tree.branches.iter().max().copied().unwrap_or(0);
            let positions: Vec<u32> = tree.positions().map(|p| p as u32).collect();
            Ok(decoder.rope(0, longest)?.at(&positions)?)
        };
        let trees = self.forest.trees.iter().map(of_tree);
        Ok(RopeTables::cat(&trees.collect::<Result<Vec<_>>>()?)?)
    }

    /// Cross-entropy of each target.
    fn score(&self, head: &Head, hidden: &Tensor) -> Result<Vec<f64>> {
        let hidden = hidden.squeeze(0)?;
        let mut nll = Vec::with_capacity(self.targets.len());
        for targets in self.targets.chunks((LOGITS / head.vocab_size()).max(1)) {
            let rows: Vec<u32> = targets.iter().map(|target| target.row).collect();
            let tokens: Vec<u32> = targets.iter().map(|target| target.token).collect();
            let rows = hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?;
            nll.extend(cross_entropy(&head.forward(&rows)?, &tokens)?);
        }
        Ok(nll)
    }

    fn check_finite(&self, hidden: &Tensor, stage: impl Fn() -> String) -> Result<()> {
        match first_non_finite(hidden)? {
            Some(element) => Err(self.non_finite(&stage(), element / hidden.dim(2)?)),
            None => Ok(()),
        }
    }

    fn non_finite(&self, stage: &str, row: usize) -> Error {
        let of_row = self.forest.trees.iter().zip(&self.items);
        let of_row = of_row.flat_map(|(tree, item)| std::iter::repeat_n(item, tree.tokens()));
        let error = causal_lm::Error::NonFinite {
            stage: stage.into(),
            window: of_row.copied().nth(row).unwrap_or_default(),
            position: self.positions.get(row).map_or(0, |&p| p as usize),
        };
        error.into()
    }
}

/// Runs all blocks over `batches`, loading one at a time; each result is `[1, tokens, hidden]`.
fn run(decoder: &Decoder<'_>, batches: &[Batch], progress: &dyn Progress) -> Result<Vec<Tensor>> {
    let ropes: Vec<RopeTables> = batches
        .iter()
        .map(|batch| batch.rope(decoder))
        .collect::<Result<_>>()?;
    let embedding = decoder.embedding()?;
    let mut hidden: Vec<Tensor> = batches
        .iter()
        .map(|batch| embedding.rows(&[&batch.tokens]))
        .collect::<causal_lm::Result<_>>()?;
    decoder.release_embedding();
    for layer in 0..decoder.config().layers() {
        let block = decoder.block(layer)?;
        decoder.release(layer);
        for ((batch, rope), x) in batches.iter().zip(&ropes).zip(&mut hidden) {
            *x = block.forward(x, rope, &mut Mixer::Forest(&batch.forest), &mut NoTap)?;
            batch.check_finite(x, || format!("layer {layer}"))?;
        }
        progress.advance(1)?;
    }
    Ok(hidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item() -> Continuations {
        Continuations {
            context: vec![1, 2, 3],
            continuations: vec![vec![4], vec![5, 6], vec![7, 8, 9]],
        }
    }

    #[test]
    fn a_batch_holds_the_context_once_and_predicts_every_token_of_each_continuation() {
        let mut batch = Batch::default();
        for item in [item(), item()] {
            for group in Group::of(0, &item, 10, None).unwrap() {
                batch.push(group);
            }
        }
        assert_eq!(batch.tokens, [1, 2, 3, 5, 7, 8].repeat(2));
        assert_eq!(batch.positions, [0, 1, 2, 3, 3, 4].repeat(2));
        let targets: Vec<(u32, u32)> = batch.targets.iter().map(|t| (t.row, t.token)).collect();
        let first = [(2, 4), (2, 5), (3, 6), (2, 7), (4, 8), (5, 9)];
        let second = first.map(|(row, token)| (row + 6, token));
        assert_eq!(targets, [first, second].concat());
    }

    #[test]
    fn a_sequence_too_long_loses_the_beginning_of_its_context() {
        let item = item();
        let contexts = |max| -> Vec<(&[u32], usize)> {
            Group::of(0, &item, max, None)
                .unwrap()
                .iter()
                .map(|group| (group.context, group.members.len()))
                .collect()
        };
        assert_eq!(contexts(5), [(&[1, 2, 3][..], 3)]);
        assert_eq!(contexts(4), [(&[1, 2, 3][..], 2), (&[2, 3], 1)]);
        assert_eq!(contexts(3), [(&[1, 2, 3][..], 1), (&[2, 3], 1), (&[3], 1)]);
        let error = Group::of(7, &item, 2, None).err().unwrap();
        assert!(matches!(
            error,
            Error::Continuation {
                item: 7,
                continuation: 2,
                ..
            }
        ));
    }
}
