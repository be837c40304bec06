//! The same bytes, spent on the weights instead of on factors.

use lowrank_eora::compress::{
    Bits, Compressor, Cut, Group, Pattern, Prune, Quantise, Score, Symmetry,
};

/// The linears of a model, as far as their size goes.
#[derive(Debug, Clone)]
pub(super) struct Shapes {
    /// Outputs and inputs of each.
    pub(super) linears: Vec<(usize, usize)>,
    /// Bytes of a stored float.
    pub(super) float: usize,
}

/// Groups that runtimes know, widest first.
const GROUPS: [usize; 6] = [512, 256, 128, 64, 32, 16];

/// Bytes that all linears take, by the convention of `StoredWeight::bytes`; `None` for a compressor that does not fit a
/// shape. Counts of pruned weights are those of the pattern: ties and sweeps change nothing about them.
pub(super) fn bytes(compressor: &Compressor, shapes: &Shapes) -> Option<u64> {
    let linear = |&(m, n): &(usize, usize)| {
        let all = m * n;
        let kept = match compressor.prune {
            None => all,
            Some(Prune { score, pattern }) => match (pattern, score) {
                (Pattern::Nm { keep, of }, _) if n.is_multiple_of(of) => all / of * keep,
                (Pattern::Nm { .. }, _) => return None,
                // Wanda prunes equally many of each output.
                (Pattern::Unstructured { percent, .. }, Score::Wanda) => {
                    m * (n - share(n, percent))
                }
                (Pattern::Unstructured { percent, .. }, _) => all - share(all, percent),
            },
        };
        let mask = if kept < all { all.div_ceil(8) } else { 0 };
        Some(match compressor.quantise.map(|quantise| quantise.grid) {
            None => (kept * shapes.float + mask).min(all * shapes.float),
            Some(grid) => {
                let groups = m * grid.group.count(n);
                let zeros = match grid.symmetry {
                    Symmetry::Asymmetric => (groups * grid.bits.get()).div_ceil(8),
                    _ => 0,
                };
                (kept * grid.bits.get()).div_ceil(8) + mask + 2 * groups + zeros
            }
        })
    };
    shapes
        .linears
        .iter()
        .map(linear)
        .sum::<Option<usize>>()
        .map(|bytes| bytes as u64)
}

/// ⌊count · percent / 100⌋.
fn share(count: usize, percent: f64) -> usize {
    (count as f64 * percent / 100.0).floor() as usize
}

/// How near to the target, in parts of it, several are equally near.
const NEAR: u64 = 50;

/// A compressor of the same kind with about `target` bytes, above what `compressor` takes: more bits or smaller groups
/// where it quantises, fewer pruned weights, without a pattern, where it prunes. Of those within 2 % of the target the one
/// that prunes least, else the nearest. With its bytes.
pub(super) fn same_bytes(
    compressor: &Compressor,
    target: u64,
    shapes: &Shapes,
) -> Option<(Compressor, u64)> {
    let own = bytes(compressor, shapes)?;
    let quantisers: Vec<Option<Quantise>> = match compressor.quantise {
        None => vec![None],
        Some(quantise) => quantisations(quantise).into_iter().map(Some).collect(),
    };
    // A tenth of a percent is finer than any difference that is measured.
    let fewer = compressor.prune.into_iter().flat_map(|prune| {
        (1..1000).map(move |permille| Prune {
            pattern: Pattern::Unstructured {
                percent: f64::from(permille) / 10.0,
                cut: Cut::Count,
            },
            ..prune
        })
    });
    let mut found: Vec<(Compressor, u64)> = Vec::new();
    for prune in std::iter::once(None).chain(fewer.map(Some)) {
        for &quantise in &quantisers {
            let candidate = Compressor {
                prune,
                quantise,
                ..*compressor
            };
            if let Some(bytes) = bytes(&candidate, shapes).filter(|bytes| *bytes > own) {
                found.push((candidate, bytes));
            }
        }
    }
    let near = |(_, bytes): &&(Compressor, u64)| bytes.abs_diff(target) <= target / NEAR;
    let nearest = || found.iter().min_by_key(|(_, bytes)| bytes.abs_diff(target));
    found.iter().find(near).or_else(nearest).copied()
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
    use candle_core::DType;
    use faer::Mat;
    use lowrank_eora::compress::Inputs;
    use lowrank_eora::repair::StoredWeight;

    fn shapes() -> Shapes {
        Shapes {
            linears: vec![(32, 64), (64, 64), (64, 96)],
            float: 4,
        }
    }

    fn named(name: &str) -> Compressor {
        name.parse().unwrap()
    }

    #[test]
    fn predicted_bytes_are_those_of_compressed_weights() {
        for name in [
            "rtn-int3",
            "gptq-int4-g32",
            "rtn-int4-g16-sym",
            "wanda-2:4",
            "magnitude-37.3",
            "wanda-44.9",
            "sparsegpt-44.9",
            "wanda-2:4+rtn-int4",
            "sparsegpt-50+gptq-int3-g32",
        ] {
            let compressor = named(name);
            let stored = |&(m, n): &(usize, usize)| {
                let entry = |i: usize, j: usize| ((i * 37 + j * 101 + i * j) % 193) as f64 - 96.5;
                let weight = Mat::from_fn(m, n, entry);
                let h = Mat::from_fn(n, n, |i, j| if i == j { 1.0 + i as f64 } else { 0.25 });
                let inputs = Some(Inputs::Gram(h.as_ref()));
                let compressed = compressor.compress(weight.as_ref(), inputs).unwrap();
                StoredWeight::of(compressed, DType::F32)
                    .unwrap()
                    .bytes()
                    .unwrap()
            };
            let expected: u64 = shapes().linears.iter().map(stored).sum();
            assert_eq!(bytes(&compressor, &shapes()), Some(expected), "{name}");
        }
    }

    #[test]
    fn a_control_spends_more_than_the_compressor_and_comes_near_the_target() {
        let shapes = shapes();
        for (name, more) in [
            ("wanda-2:4", 1.1),
            ("rtn-int3", 1.2),
            ("gptq-int4", 2.0),
            ("wanda-2:4+rtn-int4", 1.3),
        ] {
            let own = bytes(&named(name), &shapes).unwrap();
            let target = (own as f64 * more) as u64;
            let (control, spent) = same_bytes(&named(name), target, &shapes).unwrap();
            assert!(spent > own, "{name} {control}");
            assert!(
                (spent as f64 / target as f64 - 1.0).abs() < 0.1,
                "{name} {control} {spent}"
            );
        }
        let dense = named("none");
        assert!(
            same_bytes(&dense, 1 << 20, &shapes).is_none(),
            "nothing is finer than dense"
        );
    }
}
