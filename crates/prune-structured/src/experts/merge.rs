//! Averages of experts.
//!
//! By default the router keeps one row for each merged expert, that of the expert whose place it takes or their mean. So the result is a stock
//! model of its real size, and an approximation even where the experts were equal: the free place of a token that chose
//! two of them goes to another expert. Tied, all rows stay and those of a cluster share the merged expert, whose gates add up:
//! exact for equal experts, and opened here and by the folder's loader alone.

use super::layer::Layer;
use super::method::Choice;
use super::plan::{LayerExperts, Member};
use crate::tensor::values;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use causal_lm::block::Mlp;
use causal_lm::{Decoder, Linear};
use rayon::prelude::*;

/// Neurons that can be aligned at most: the assignment takes their number to the third power.
const MOST_NEURONS: usize = 4096;

/// How clusters are merged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Merging {
    /// Whether neurons are put in the order of the expert that stays.
    pub(crate) align: bool,
    /// Whether all router rows stay.
    pub(crate) tied: bool,
}

/// Each cluster in the place of its most used expert, of equally used the lowest number.
pub(crate) fn by_count(layer: &Layer<'_>, clusters: &[Vec<usize>], how: Merging) -> Choice {
    let count = |expert: usize| layer.statistics.experts[expert].count;
    let centre = |cluster: &Vec<usize>| {
        let most = cluster.iter().copied().map(count).max();
        let first = cluster.iter().copied().find(|&e| Some(count(e)) == most);
        // A cluster has members.
        first.unwrap_or_default()
    };
    let centres: Vec<usize> = clusters.iter().map(centre).collect();
    around(layer, &centres, clusters, how)
}

/// Each cluster in the place of its centre; shares are those of the tokens that chose a member.
pub(crate) fn around(
    layer: &Layer<'_>,
    centres: &[usize],
    clusters: &[Vec<usize>],
    how: Merging,
) -> Choice {
    let count = |expert: usize| layer.statistics.experts[expert].count as f64;
    let mut all: Vec<(usize, Vec<Member>)> = centres
        .iter()
        .zip(clusters)
        .map(|(&centre, cluster)| {
            if cluster.len() == 1 {
                return (centre, vec![]);
            }
            let total: f64 = cluster.iter().map(|&e| count(e)).sum();
            let share = |expert: usize| match total {
                0.0 => 1.0 / cluster.len() as f64,
                total => count(expert) / total,
            };
            let members = cluster.iter().map(|&expert| Member {
                expert,
                share: share(expert),
                align: how.align,
                row: false,
            });
            (centre, members.collect())
        })
        .collect();
    all.sort_by_key(|(centre, _)| *centre);
    let (kept, members): (Vec<usize>, Vec<Vec<Member>>) = all.into_iter().unzip();
    let mut rows = vec![];
    if how.tied {
        // Every expert is a member of one cluster.
        rows = vec![0; layer.experts()];
        for (&centre, cluster) in centres.iter().zip(clusters) {
            let at = kept.binary_search(&centre).unwrap_or_default();
            cluster.iter().for_each(|&expert| rows[expert] = at);
        }
    }
    Choice {
        kept,
        members,
        clusters: clusters.to_vec(),
        rows,
        ..Choice::default()
    }
}

/// Each cluster in the place of its centre: those that `averaged` names as the mean of their members with aligned neurons,
/// router rows included; of the others the centre alone.
pub(crate) fn means(
    centres: &[usize],
    clusters: Vec<Vec<usize>>,
    averaged: impl Fn(&[usize]) -> bool,
) -> Choice {
    let of_cluster = |(&centre, cluster): (&usize, &Vec<usize>)| {
        let mean = cluster.iter().map(|&expert| Member {
            expert,
            share: 1.0 / cluster.len() as f64,
            align: true,
            row: true,
        });
        match cluster.len() > 1 && averaged(cluster) {
            true => (centre, mean.collect()),
            false => (centre, vec![]),
        }
    };
    let mut all: Vec<(usize, Vec<Member>)> =
        centres.iter().zip(&clusters).map(of_cluster).collect();
    all.sort_by_key(|(centre, _)| *centre);
    let (kept, members) = all.into_iter().unzip();
    Choice {
        kept,
        members,
        clusters,
        ..Choice::default()
    }
}

/// A router with the rows of the experts that stay, or the weighted sums of their members' rows.
pub(crate) fn router(router: &Linear, experts: &LayerExperts) -> Result<Linear> {
    let weight = router.weight()?;
    let kept: Vec<u32> = experts.kept.iter().map(|&e| e as u32).collect();
    let own = router.select(&Tensor::new(kept, weight.device())?)?;
    if !experts.members.iter().flatten().any(|member| member.row) {
        return Ok(own);
    }
    let (count, width) = (experts.kept.len(), weight.dim(1)?);
    let (all, mut rows) = (values(&weight)?, values(&own.weight()?)?);
    for (row, members) in rows.chunks_mut(width).zip(&experts.members) {
        if let Some(sum) = router_row(&all, width, members) {
            row.copy_from_slice(&sum);
        }
    }
    let rows = Tensor::from_vec(rows, (count, width), weight.device())?;
    let rows = rows.to_dtype(weight.dtype())?;
    Ok(Linear::new(rows, own.bias().cloned()))
}

/// The weighted sum of members' rows of a router, `rows` of which have this width; `None` where the row is not theirs.
pub(crate) fn router_row(rows: &[f32], width: usize, members: &[Member]) -> Option<Vec<f32>> {
    if !members.iter().any(|member| member.row) {
        return None;
    }
    let mut sum = vec![0.0f64; width];
    for member in members.iter().filter(|member| member.row) {
        let row = rows.chunks(width).nth(member.expert).unwrap_or_default();
        for (sum, &x) in sum.iter_mut().zip(row) {
            *sum += member.share * f64::from(x);
        }
    }
    Some(sum.into_iter().map(|x| x as f32).collect())
}

/// The weighted sum of members' weights, neurons in the order of expert `of`.
pub(crate) fn merged(
    decoder: &Decoder<'_>,
    layer: usize,
    of: usize,
    members: &[Member],
) -> Result<Mlp> {
    let neurons_of = |expert: usize| -> Result<Neurons> {
        let mlp = decoder.expert(layer, expert)?;
        decoder.release_expert(layer, expert);
        Neurons::of(&mlp)
    };
    let centre = neurons_of(of)?;
    let mut sum = vec![0.0f64; centre.rows.len()];
    for member in members.iter().filter(|member| member.share > 0.0) {
        let neurons = neurons_of(member.expert)?;
        let order = match member.align && member.expert != of {
            true => aligned(decoder, &centre, &neurons)?,
            false => (0..centre.count).collect(),
        };
        let width = centre.width;
        for (sum, &from) in sum.chunks_mut(width).zip(&order) {
            let row = &neurons.rows[from * width..][..width];
            for (sum, &x) in sum.iter_mut().zip(row) {
                *sum += member.share * f64::from(x);
            }
        }
    }
    let like = decoder.expert(layer, of)?;
    decoder.release_expert(layer, of);
    Neurons {
        rows: sum.into_iter().map(|x| x as f32).collect(),
        ..centre
    }
    .into_mlp(&like)
}

/// An expert neuron by neuron: its row of gate, of up, and its column of down, one after the other.
struct Neurons {
    count: usize,
    hidden: usize,
    width: usize,
    rows: Vec<f32>,
}

impl Neurons {
    fn of(mlp: &Mlp) -> Result<Self> {
        let (count, hidden) = mlp.up.weight()?.dims2()?;
        let plain = |weight: &Tensor| -> Result<Vec<f32>> { values(weight) };
        let gate = match &mlp.gate {
            Some(gate) => plain(&gate.weight()?)?,
            None => vec![],
        };
        let (up, down) = (
            plain(&mlp.up.weight()?)?,
            plain(&mlp.down.weight()?.t()?.contiguous()?)?,
        );
        let mut rows = Vec::with_capacity(3 * count * hidden);
        for neuron in 0..count {
            for part in [&gate, &up, &down] {
                let row = part.get(neuron * hidden..(neuron + 1) * hidden);
                rows.extend_from_slice(row.unwrap_or_default());
            }
        }
        Ok(Self {
            count,
            hidden,
            width: rows.len() / count.max(1),
            rows,
        })
    }

    fn into_mlp(self, like: &Mlp) -> Result<Mlp> {
        let part = |at: usize| -> Result<Tensor> {
            let neurons = self.rows.chunks(self.width);
            let rows = neurons.flat_map(|row| &row[at * self.hidden..(at + 1) * self.hidden]);
            let rows: Vec<f32> = rows.copied().collect();
            Ok(Tensor::from_vec(
                rows,
                (self.count, self.hidden),
                &Device::Cpu,
            )?)
        };
        let linear = |weight: Tensor, like: &Linear| -> Result<Linear> {
            let old = like.weight()?;
            let weight = weight.to_dtype(old.dtype())?.to_device(old.device())?;
            Ok(Linear::new(weight, like.bias().cloned()))
        };
        let gate = usize::from(like.gate.is_some());
        Ok(Mlp {
            gate: match &like.gate {
                Some(like) => Some(linear(part(0)?, like)?),
                None => None,
            },
            up: linear(part(gate)?, &like.up)?,
            down: linear(part(gate + 1)?.t()?.contiguous()?, &like.down)?,
            activation: like.activation,
        })
    }
}

/// Refuses experts whose neurons are too many to be aligned.
pub(crate) fn check_width(decoder: &Decoder<'_>, neurons: usize) -> Result<()> {
    if neurons > MOST_NEURONS {
        return Err(Error::Unsupported {
            method: "merging with aligned neurons",
            model_type: decoder.config().model_type,
            reason: "its experts have more than 4,096 neurons; merge without alignment",
        });
    }
    Ok(())
}

/// For each neuron of `centre` the one of `other` that takes its place: together they are as similar as possible.
fn aligned(decoder: &Decoder<'_>, centre: &Neurons, other: &Neurons) -> Result<Vec<usize>> {
    check_width(decoder, centre.count)?;
    let (count, width) = (centre.count, centre.width);
    let costs: Vec<f64> = (0..count)
        .into_par_iter()
        .flat_map_iter(|a| {
            let a = &centre.rows[a * width..][..width];
            other.rows.chunks(width).map(move |b| {
                let products = a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y));
                -products.sum::<f64>()
            })
        })
        .collect();
    Ok(assignment(&costs, count))
}

/// The column of each row in the cheapest assignment of rows to columns (Hungarian method), `costs` row by row.
pub(crate) fn assignment(costs: &[f64], count: usize) -> Vec<usize> {
    // Potentials, and the row of each column; row and column 0 are outside.
    let (mut of_row, mut of_column) = (vec![0.0; count + 1], vec![0.0; count + 1]);
    let mut row_of = vec![0usize; count + 1];
    for row in 1..=count {
        row_of[0] = row;
        let mut least = vec![f64::INFINITY; count + 1];
        let mut before = vec![0usize; count + 1];
        let mut used = vec![false; count + 1];
        let mut column = 0;
        while row_of[column] != 0 {
            used[column] = true;
            let row = row_of[column];
            let (mut delta, mut next) = (f64::INFINITY, 0);
            for j in 1..=count {
                if used[j] {
                    continue;
                }
                let reduced = costs[(row - 1) * count + j - 1] - of_row[row] - of_column[j];
                if reduced < least[j] {
                    least[j] = reduced;
                    before[j] = column;
                }
                if least[j] < delta {
                    delta = least[j];
                    next = j;
                }
            }
            if next == 0 {
                // Costs that are not numbers: any assignment will do.
                return (0..count).collect();
            }
            for j in 0..=count {
                if used[j] {
                    of_row[row_of[j]] += delta;
                    of_column[j] -= delta;
                } else {
                    least[j] -= delta;
                }
            }
            column = next;
        }
        while column != 0 {
            let previous = before[column];
            row_of[column] = row_of[previous];
            column = previous;
        }
    }
    let mut columns = vec![0; count];
    for (column, &row) in row_of.iter().enumerate().skip(1) {
        columns[row - 1] = column - 1;
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(costs: &[f64], count: usize, columns: &[usize]) -> f64 {
        let rows = columns.iter().enumerate();
        rows.map(|(row, column)| costs[row * count + column]).sum()
    }

    #[test]
    fn the_assignment_is_the_cheapest_of_all() {
        for seed in 0..50usize {
            let count = 1 + seed % 6;
            let costs: Vec<f64> = (0..count * count)
                .map(|i| ((i * 7919 + seed * 104_729) % 101) as f64 / 10.0)
                .collect();
            let found = assignment(&costs, count);
            let mut sorted = found.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..count).collect::<Vec<_>>());
            let mut best = f64::INFINITY;
            let mut columns: Vec<usize> = (0..count).collect();
            each_order(&mut columns, 0, &mut |columns| {
                best = best.min(cost(&costs, count, columns));
            });
            assert!((cost(&costs, count, &found) - best).abs() < 1e-9);
        }
    }

    fn each_order(columns: &mut Vec<usize>, at: usize, visit: &mut impl FnMut(&[usize])) {
        if at == columns.len() {
            return visit(columns);
        }
        for other in at..columns.len() {
            columns.swap(at, other);
            each_order(columns, at + 1, visit);
            columns.swap(at, other);
        }
    }
}
