//! What a plan saves, counted from the tensors that writing it would produce.

use crate::Result;
use crate::output::Form;
use crate::output::layout::outputs;
use crate::plan::Plan;
use causal_lm::Decoder;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// What the linears of one block cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockCost {
    /// Parameters, biases included.
    pub parameters: u64,
    /// Bytes as stored.
    pub bytes: u64,
    /// Floating-point operations of the products for one token, two for each weight. Attention's
    /// products of queries with keys, which depend on the context, are left out.
    pub flops_per_token: u64,
}

/// Cost of a model before and after.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Each block of the dense model.
    pub before: Vec<BlockCost>,
    /// Each block of the pruned model.
    pub after: Vec<BlockCost>,
    /// Embedding, head, norms and whatever is beside the decoder.
    pub rest: BlockCost,
    /// What is left out of the rest: norms of heads of a layer without attention, and tensors of other modalities where
    /// widths differ by layer.
    #[serde(default)]
    pub left_out: BlockCost,
}

impl Cost {
    /// Counts `plan` for `decoder`.
    ///
    /// # Errors
    /// When the plan is not one for this model.
    pub fn of(decoder: &Decoder<'_>, plan: &Plan) -> Result<Self> {
        plan.check(decoder)?;
        let mut cost = Self {
            before: vec![BlockCost::default(); plan.layers.len()],
            after: vec![BlockCost::default(); plan.layers.len()],
            ..Self::default()
        };
        let (checkpoint, names) = (decoder.checkpoint(), decoder.config().names);
        for name in checkpoint.names() {
            let info = checkpoint.info(name)?;
            let entry = match names.parse_module(name) {
                Some((layer, ..)) => &mut cost.before[layer],
                None => &mut cost.rest,
            };
            entry.add(info.elements(), info.bytes, info.shape.len());
            if name == names.embedding() && !decoder.config().tied {
                // Rows are looked up, not multiplied.
                entry.flops_per_token -= 2 * info.elements() as u64;
            }
        }
        let outputs = outputs(decoder, plan, Form::Sliced)?;
        let written: HashSet<&str> = outputs.iter().map(|o| o.from.as_str()).collect();
        let other = |name: &&str| names.parse_module(name).is_none() && !written.contains(name);
        for name in checkpoint.names().filter(other) {
            let info = checkpoint.info(name)?;
            cost.left_out
                .add(info.elements(), info.bytes, info.shape.len());
        }
        for output in &outputs {
            let Some((layer, ..)) = names.parse_module(&output.from) else {
                continue;
            };
            let elements = output.spec.shape.iter().product();
            let bytes = elements * output.spec.dtype.bitsize() / 8;
            cost.after[layer].add(elements, bytes, output.spec.shape.len());
        }
        Ok(cost)
    }

    /// The whole dense model.
    pub fn total_before(&self) -> BlockCost {
        self.before.iter().chain([&self.rest]).sum()
    }

    /// The whole pruned model.
    pub fn total_after(&self) -> BlockCost {
        let total: BlockCost = self.after.iter().chain([&self.rest]).sum();
        BlockCost {
            parameters: total.parameters - self.left_out.parameters,
            bytes: total.bytes - self.left_out.bytes,
            flops_per_token: total.flops_per_token - self.left_out.flops_per_token,
        }
    }
}

impl BlockCost {
    fn add(&mut self, elements: usize, bytes: usize, dimensions: usize) {
        self.parameters += elements as u64;
        self.bytes += bytes as u64;
        self.flops_per_token += if dimensions == 2 {
            2 * elements as u64
        } else {
            0
        };
    }
}

impl<'a> std::iter::Sum<&'a BlockCost> for BlockCost {
    fn sum<I: Iterator<Item = &'a BlockCost>>(blocks: I) -> Self {
        blocks.fold(Self::default(), |sum, block| Self {
            parameters: sum.parameters + block.parameters,
            bytes: sum.bytes + block.bytes,
            flops_per_token: sum.flops_per_token + block.flops_per_token,
        })
    }
}
