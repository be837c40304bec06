//! The same bytes spent on the weights instead of on factors: what a repair has to be compared with.

use super::grid::{Bits, Group};
use super::prune::{Cut, Pattern, Prune};
use super::{BlockQuantise, BlockTypes, Compressor, Mix, Place, Quantise, Storage};
use packed::BlockType;

/// A linear of a model, as far as its size is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// m.
    pub outputs: usize,
    /// n.
    pub inputs: usize,
    /// Which linear it is.
    pub place: Place,
}

/// The linears of a model, as far as their sizes are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shapes {
    /// All of them.
    pub linears: Vec<LinearShape>,
    /// Bytes of a stored float.
    pub float_bytes: usize,
}

/// Groups that runtimes know, widest first.
const GROUPS: [usize; 6] = [512, 256, 128, 64, 32, 16];

/// How near to the target, in parts of it, several are equally near.
const NEAR: u64 = 50;

impl Compressor {
    /// Bytes that all linears will take, by [`Storage::predicted`]; `None` where it does not fit a shape.
    pub fn predicted_bytes(&self, shapes: &Shapes) -> Option<u64> {
        let linear = |linear: &LinearShape| {
            let shape = (linear.outputs, linear.inputs);
            let storage = Storage::predicted(&self.at(linear.place), shape, shapes.float_bytes)?;
            Some(storage.bytes() as u64)
        };
        shapes.linears.iter().map(linear).sum()
    }

    /// A compressor of the same kind that spends about `target` bytes, more than this one: more bits or smaller groups
    /// where it quantises in groups, larger block types where in blocks, fewer pruned weights, without a pattern, where
    /// it prunes. Of those within 2 % of the target the one that prunes least, else the nearest. With its bytes; `None`
    /// where nothing is finer.
    pub fn finer(&self, target: u64, shapes: &Shapes) -> Option<(Self, u64)> {
        let own = self.predicted_bytes(shapes)?;
        let quantisers: Vec<Option<Quantise>> = match self.quantise {
            None => vec![None],
            Some(quantise) => quantisations(quantise).into_iter().map(Some).collect(),
        };
        // A tenth of a percent is finer than any difference that is measured.
        let fewer = self.prune.into_iter().flat_map(|prune| {
            (1..1000).map(move |permille| Prune {
                pattern: Pattern::Unstructured {
                    percent: f64::from(permille) / 10.0,
                    cut: Cut::Count,
                },
                ..prune
            })
        });
        let mut found: Vec<(Self, u64)> = Vec::new();
        let types = self.blocks.map_or(vec![None], block_types);
        let stored = quantisers
            .into_iter()
            .flat_map(|quantise| types.iter().map(move |&blocks| (quantise, blocks)));
        let stored: Vec<_> = stored.collect();
        for prune in std::iter::once(None).chain(fewer.map(Some)) {
            for &(quantise, blocks) in &stored {
                let candidate = Self {
                    prune,
                    quantise,
                    blocks,
                    ..*self
                };
                if candidate.validate(None).is_err() {
                    continue;
                }
                let bytes = candidate.predicted_bytes(shapes);
                if let Some(bytes) = bytes.filter(|bytes| *bytes > own) {
                    found.push((candidate, bytes));
                }
            }
        }
        let near = |(_, bytes): &&(Self, u64)| bytes.abs_diff(target) <= target / NEAR;
        let nearest = || found.iter().min_by_key(|(_, bytes)| bytes.abs_diff(target));
        found.iter().find(near).or_else(nearest).copied()
    }
}

/// All block types and mixes, rounded the same way.
fn block_types(blocks: BlockQuantise) -> Vec<Option<BlockQuantise>> {
    let types = BlockType::ALL.into_iter().filter(|ty| ty.is_quantised());
    let mixes = Mix::ALL.into_iter().map(BlockTypes::Mix);
    types
        .map(BlockTypes::One)
        .chain(mixes)
        .map(|types| Some(BlockQuantise { types, ..blocks }))
        .collect()
}

/// Quantisers with at least as many bits and groups at most as wide.
fn quantisations(quantise: Quantise) -> Vec<Quantise> {
    let widest = match quantise.grid.group {
        Group::Channel => usize::MAX,
        Group::Columns(width) => width,
    };
    let bits = [2, 3, 4, 8]
        .into_iter()
        .filter_map(Bits::new)
        .filter(|b| *b >= quantise.grid.bits);
    bits.flat_map(|bits| {
        let narrower = GROUPS
            .into_iter()
            .filter(|width| *width < widest)
            .map(Group::Columns);
        std::iter::once(quantise.grid.group)
            .chain(narrower)
            .map(move |group| {
                let mut finer = quantise;
                (finer.grid.bits, finer.grid.group) = (bits, group);
                finer
            })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Compressor {
        name.parse().expect("a name")
    }

    #[test]
    fn a_finer_compressor_spends_more_and_comes_near_the_target() {
        let shapes = Shapes {
            linears: [(32, 256), (64, 512), (64, 256)]
                .map(|(outputs, inputs)| LinearShape {
                    outputs,
                    inputs,
                    place: Place {
                        linear: causal_lm::LinearName::Q,
                        block: 1,
                        blocks: 8,
                        heads_per_kv: 1,
                        experts: 0,
                    },
                })
                .into(),
            float_bytes: 4,
        };
        for (name, more) in [
            ("wanda-2:4", 1.1),
            ("rtn-int3", 1.2),
            ("gptq-int4", 2.0),
            ("wanda-2:4+rtn-int4", 1.3),
            ("q2_k", 1.7),
            ("gptq-q4_k_m", 1.22),
            ("wanda-2:4+q3_k", 1.3),
        ] {
            let own = named(name).predicted_bytes(&shapes).expect("fits");
            let target = (own as f64 * more) as u64;
            let (finer, spent) = named(name).finer(target, &shapes).expect("there is one");
            assert!(spent > own, "{name} {finer}");
            assert!(
                (spent as f64 / target as f64 - 1.0).abs() < 0.1,
                "{name} {finer} {spent}"
            );
        }
        let none = named("none").finer(1 << 20, &shapes);
        assert!(none.is_none(), "nothing is finer than the dense weight");
    }
}
