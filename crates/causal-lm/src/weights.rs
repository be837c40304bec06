//! How the linears of a model are multiplied.

use std::collections::BTreeMap;
use std::fmt;

use packed::Kind;

use crate::block::{Block, Mlp};
use crate::linear::Linear;
use crate::names::LinearName;
use crate::vocabulary::Head;

/// Why a linear is multiplied as a tensor, not as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum DenseReason {
    /// Nobody asked for packed weights ([`Decoder::packed`](crate::Decoder::packed)).
    NotAsked,
    /// The device is no CPU, or the dtype is not f32.
    Device,
    /// It is stored in floats of 32 bits or more.
    Floats,
    /// It is stored without its zeros.
    Sparse,
    /// Its rows are stored in several types, or as other values than the model has.
    Mixed,
    /// Groups of so many inputs, for which there is no kernel.
    GroupWidth(usize),
    /// Groups of unequal widths, for which there is no kernel.
    GroupIndex,
    /// Scales of groups that are no f16 values.
    Scales,
    /// It was put in the place of a stored weight.
    Given,
}

impl fmt::Display for DenseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotAsked => "decoded as asked",
            Self::Device => "not f32 on a CPU",
            Self::Floats => "stored in 32-bit floats",
            Self::Sparse => "stored without zeros",
            Self::Mixed => "stored in several types or as other values",
            Self::GroupWidth(width) => return write!(f, "groups of {width} inputs"),
            Self::GroupIndex => "groups of unequal widths",
            Self::Scales => "scales that are no f16 values",
            Self::Given => "replaced",
        })
    }
}

/// How the linears of a model are multiplied: those of all blocks, experts included, and the head. Routers do not count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WeightSummary {
    /// Bytes of all weights in memory, norms and routers included. Rows of the embedding are read from the file as they are
    /// needed and do not count, unless the head is the embedding.
    pub bytes: usize,
    /// Linears that are multiplied as they are stored, by what they are stored as.
    pub packed: Vec<(Kind, usize)>,
    /// Linears that are multiplied as tensors.
    pub dense: BTreeMap<DenseReason, usize>,
    /// Packed linears with factors of low rank beside them.
    pub low_rank: usize,
}

impl fmt::Display for WeightSummary {
    /// Linears by how they are multiplied, such as `180 in Q4_K, 30 in 4-bit groups, 1 as a tensor (replaced)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = Vec::new();
        for (kind, count) in &self.packed {
            parts.push(match kind {
                Kind::Dense(ty) | Kind::Blocks(ty) => format!("{count} in {}", ty.name()),
                Kind::Groups { bits, .. } => format!("{count} in {}-bit groups", bits.get()),
                other => format!("{count} as {other:?}"),
            });
        }
        for (reason, count) in &self.dense {
            parts.push(match count {
                1 => format!("1 as a tensor ({reason})"),
                count => format!("{count} as tensors ({reason})"),
            });
        }
        if self.low_rank > 0 {
            parts.push(format!("{} with factors of low rank", self.low_rank));
        }
        f.write_str(&parts.join(", "))
    }
}

impl WeightSummary {
    /// All linears.
    pub fn linears(&self) -> usize {
        let packed = self.packed.iter().map(|(_, count)| count);
        packed.chain(self.dense.values()).sum()
    }

    /// Packed linears whose weights are integers: those that the choice between f32 and int8 arithmetic is about. 16-bit floats in
    /// place are multiplied with f32 activations in both.
    pub fn quantised(&self) -> usize {
        let quantised = self.packed.iter();
        let quantised = quantised.filter(|(kind, _)| !matches!(kind, Kind::Dense(_)));
        quantised.map(|(_, count)| count).sum()
    }

    fn add(&mut self, linear: &Linear) {
        if let Some(reason) = linear.dense_reason() {
            *self.dense.entry(reason).or_default() += 1;
        }
        if let Some(kind) = linear.kind() {
            match self.packed.iter_mut().find(|(other, _)| *other == kind) {
                Some((_, count)) => *count += 1,
                None => self.packed.push((kind, 1)),
            }
            self.low_rank += usize::from(linear.rank().is_some());
        }
    }

    fn add_linears(&mut self, mlp: &Mlp) {
        let linears = [mlp.gate.as_ref(), Some(&mlp.up), Some(&mlp.down)];
        linears
            .into_iter()
            .flatten()
            .for_each(|linear| self.add(linear));
    }

    /// A block, with those of its experts that are loaded.
    pub(crate) fn add_block(&mut self, block: &Block) {
        self.bytes += block.bytes();
        let shared = [
            LinearName::SharedGate,
            LinearName::SharedUp,
            LinearName::SharedDown,
        ];
        let names = LinearName::ALL.into_iter().chain(LinearName::DELTA_NET);
        let names = names.chain(shared);
        let linears = names.filter_map(|name| block.linear(name));
        linears.for_each(|linear| self.add(linear));
        let experts = block.experts.iter().flat_map(|moe| &moe.experts);
        experts.for_each(|mlp| self.add_linears(mlp));
    }

    /// An expert that was loaded by itself.
    pub(crate) fn add_expert(&mut self, mlp: &Mlp) {
        self.bytes += mlp.bytes();
        self.add_linears(mlp);
    }

    pub(crate) fn add_head(&mut self, head: &Head) {
        self.bytes += head.bytes();
        self.add(head.vocab());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use packed::{BlockType, GroupBits};

    #[test]
    fn every_way_and_every_reason_is_named_with_its_count() {
        let summary = WeightSummary {
            bytes: 0,
            packed: vec![
                (Kind::Blocks(BlockType::Q4_K), 180),
                (
                    Kind::Groups {
                        bits: GroupBits::new(4).unwrap(),
                        zeros: true,
                    },
                    30,
                ),
            ],
            dense: BTreeMap::from([(DenseReason::GroupWidth(16), 2), (DenseReason::Given, 1)]),
            low_rank: 7,
        };
        assert_eq!(
            summary.to_string(),
            "180 in Q4_K, 30 in 4-bit groups, 2 as tensors (groups of 16 inputs), 1 as a tensor (replaced), 7 with factors of low rank"
        );
        assert_eq!((summary.linears(), summary.quantised()), (213, 210));
    }
}
