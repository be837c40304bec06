//! STUN's clusters by the published rule: a threshold of the distance.
//!
//! The rule blocks later unions of what was not united at first, so that it is no complete linkage, and the number of
//! clusters follows from the threshold. Here the threshold is searched for each layer, so that as many experts stay as are
//! wanted; where no threshold does that, the next larger number of clusters is thinned out by the shortest distances.

use super::{Choice, Choosing, Stun};
use crate::Result;
use crate::experts::cluster::{Linkage, clusters};
use crate::experts::layer::Layer;
use causal_lm::Progress;
use serde::{Deserialize, Serialize};

/// STUN's clusters as its published implementation finds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StunCompat {
    /// Distances and representatives.
    pub stun: Stun,
}

impl Choosing for StunCompat {
    fn choose(&self, layer: &Layer<'_>, keep: usize) -> Result<Choice> {
        let distances = self.stun.distances(layer)?;
        let mut found = thresholded(&distances, keep, layer.progress)?;
        if found.len() > keep {
            // Distances of clusters are those of their farthest members, as in the rule.
            let between = |a: &Vec<usize>, b: &Vec<usize>| {
                let pairs = a.iter().flat_map(|&i| b.iter().map(move |&j| (i, j)));
                let far = pairs.map(|(i, j)| distances[i][j]);
                far.fold(f64::NEG_INFINITY, f64::max)
            };
            let of_clusters: Vec<Vec<f64>> = found
                .iter()
                .map(|a| found.iter().map(|b| between(a, b)).collect())
                .collect();
            let united = clusters(&of_clusters, keep, Linkage::Complete);
            found = united
                .into_iter()
                .map(|group| {
                    let mut members: Vec<usize> =
                        group.into_iter().flat_map(|c| found[c].clone()).collect();
                    members.sort_unstable();
                    members
                })
                .collect();
        }
        self.stun.choice(layer, found)
    }
}

/// The clusters of the largest threshold that leaves at least `keep`.
fn thresholded(
    distances: &[Vec<f64>],
    keep: usize,
    progress: &dyn Progress,
) -> Result<Vec<Vec<usize>>> {
    let pairs = ascending(distances);
    let mut best: Vec<Vec<usize>> = (0..distances.len()).map(|e| vec![e]).collect();
    let mut level = pairs.first().map_or(f64::INFINITY, |pair| pair.distance);
    while level < f64::INFINITY {
        progress.advance(0)?;
        let (found, next) = published(distances, &pairs, level.next_up());
        if found.len() >= keep && found.len() < best.len() {
            best = found;
        }
        level = next;
    }
    Ok(best)
}

/// Two different experts in an order, for the rule does not treat them alike.
struct Pair {
    distance: f64,
    a: usize,
    b: usize,
}

/// All pairs from the nearest on; of equally near ones those of lower numbers first.
fn ascending(distances: &[Vec<f64>]) -> Vec<Pair> {
    let rows = distances.iter().enumerate();
    let pairs = rows.flat_map(|(a, row)| {
        let row = row.iter().enumerate().filter(move |&(b, _)| b != a);
        row.map(move |(b, &distance)| Pair { distance, a, b })
    });
    let mut pairs: Vec<Pair> = pairs.filter(|pair| pair.distance.is_finite()).collect();
    // Stable, and zeros of either sign are equal.
    pairs.sort_by(|x, y| (x.distance + 0.0).total_cmp(&(y.distance + 0.0)));
    pairs
}

/// The published rule for one threshold, and the least distance that a larger threshold must pass to give other clusters;
/// infinity where none does.
fn published(distances: &[Vec<f64>], pairs: &[Pair], threshold: f64) -> (Vec<Vec<usize>>, f64) {
    let count = distances.len();
    let mut d: Vec<Vec<f64>> = distances.to_vec();
    (0..count).for_each(|e| d[e][e] = f64::INFINITY);
    // Of each expert its cluster, and the members of each.
    let mut cluster: Vec<usize> = (0..count).collect();
    let mut members: Vec<Vec<usize>> = (0..count).map(|e| vec![e]).collect();
    let (mut clusters, mut next) = (count, f64::INFINITY);
    for &Pair { distance, a, b } in pairs {
        if d[a][b] == f64::INFINITY {
            continue;
        }
        if clusters == 1 {
            break;
        }
        if distance >= threshold {
            next = distance.min(next);
            break;
        }
        let (to, from) = (cluster[a], cluster[b]);
        let to_b = members[to].iter().map(|&c| d[c][b]);
        let to_a = members[from].iter().map(|&c| d[c][a]);
        let far = to_b.chain(to_a).fold(f64::NEG_INFINITY, f64::max);
        if far < threshold {
            members[to].iter().for_each(|&c| d[c][b] = f64::INFINITY);
            members[from].iter().for_each(|&c| d[c][a] = f64::INFINITY);
            if to != from {
                let moved = std::mem::take(&mut members[from]);
                moved.iter().for_each(|&c| cluster[c] = to);
                members[to].extend(moved);
                clusters -= 1;
            }
        } else {
            next = far.min(next);
            d[a][b] = f64::INFINITY;
            d[b][a] = f64::INFINITY;
        }
    }
    members.retain(|members| !members.is_empty());
    members
        .iter_mut()
        .for_each(|members| members.sort_unstable());
    members.sort_unstable_by_key(|members| members[0]);
    (members, next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::method::stun::row_distances;
    use crate::experts::method::stun::tests::example;
    use causal_lm::NoProgress;

    fn at(distances: &[Vec<f64>], threshold: f64) -> Vec<Vec<usize>> {
        published(distances, &ascending(distances), threshold).0
    }

    fn shown(clusters: &[Vec<usize>]) -> String {
        let show = |cluster: &Vec<usize>| cluster.iter().map(usize::to_string).collect::<String>();
        clusters.iter().map(show).collect::<Vec<_>>().join(",")
    }

    #[test]
    fn clusters_are_those_of_the_published_implementation() {
        let (rows, together) = example();
        let distances = row_distances(&rows);
        for (threshold, expected) in [
            (0.1, "0,1,2,3,4,5,6,7"),
            (0.3, "01,23,46,5,7"),
            (0.6, "01,23,46,5,7"),
            (0.8, "015,23,46,7"),
            (1.2, "015,23,46,7"),
            (1.5, "0123456,7"),
            (2.5, "01234567"),
        ] {
            let found = at(&distances, threshold);
            assert_eq!(shown(&found), expected, "at {threshold}");
        }
        // The published mean takes in the diagonal.
        let alike: Vec<Vec<f64>> = together
            .iter()
            .map(|row| row.iter().map(|a| -a / 0.375).collect())
            .collect();
        for (threshold, expected) in [
            (-6.0, "07,1,25,3,4,6"),
            (-3.0, "07,1,25,3,4,6"),
            (-1.5, "07,16,25,34"),
            (-0.5, "07,16,25,34"),
            (0.5, "01234567"),
        ] {
            let found = at(&alike, threshold);
            assert_eq!(shown(&found), expected, "at {threshold}");
        }
    }

    #[test]
    fn a_threshold_is_found_for_each_number_of_clusters_that_one_gives() {
        let distances = row_distances(&example().0);
        for (keep, expected) in [(8, 8), (5, 5), (4, 4), (3, 3), (2, 2), (1, 1)] {
            let found = thresholded(&distances, keep, &NoProgress).unwrap();
            assert_eq!(found.len(), expected, "{keep}");
        }
    }

    /// The rule as it is published: all distances are looked through for the least, at every step.
    fn step_by_step(distances: &[Vec<f64>], threshold: f64) -> Vec<Vec<usize>> {
        let count = distances.len();
        let mut d = distances.to_vec();
        (0..count).for_each(|e| d[e][e] = f64::INFINITY);
        let mut cluster: Vec<usize> = (0..count).collect();
        loop {
            let mut least = (f64::INFINITY, 0, 0);
            for (a, row) in d.iter().enumerate() {
                for (b, &distance) in row.iter().enumerate() {
                    if distance < least.0 {
                        least = (distance, a, b);
                    }
                }
            }
            let (distance, a, b) = least;
            if distance >= threshold {
                break;
            }
            let (to, from) = (cluster[a], cluster[b]);
            let members =
                |id: usize| -> Vec<usize> { (0..count).filter(|&e| cluster[e] == id).collect() };
            let (of_a, of_b) = (members(to), members(from));
            let to_b = of_a.iter().map(|&c| d[c][b]);
            let to_a = of_b.iter().map(|&c| d[c][a]);
            let far = to_b.chain(to_a).fold(f64::NEG_INFINITY, f64::max);
            if far < threshold {
                of_a.iter().for_each(|&c| d[c][b] = f64::INFINITY);
                of_b.iter().for_each(|&c| d[c][a] = f64::INFINITY);
                let moved = cluster.iter_mut().filter(|c| **c == from);
                moved.for_each(|c| *c = to);
            } else {
                d[a][b] = f64::INFINITY;
                d[b][a] = f64::INFINITY;
            }
        }
        let firsts = (0..count).filter(|&e| !cluster[..e].contains(&cluster[e]));
        let same = |e: usize| (e..count).filter(|&c| cluster[c] == cluster[e]).collect();
        firsts.map(same).collect()
    }

    #[test]
    fn no_threshold_is_passed_over_that_gives_other_clusters() {
        let mut x = 7u64;
        let mut random = || {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (x >> 33) % 12
        };
        for count in [2, 5, 9] {
            for _ in 0..20 {
                let mut distances = vec![vec![0.0; count]; count];
                let pairs = (0..count).flat_map(|a| (0..a).map(move |b| (a, b)));
                for (a, b) in pairs {
                    // Many are equal, and some negative.
                    let distance = random() as f64 - 2.0;
                    (distances[a][b], distances[b][a]) = (distance, distance);
                }
                let mut visited = vec![];
                let pairs = ascending(&distances);
                let mut level = pairs[0].distance;
                while level < f64::INFINITY {
                    let (found, next) = published(&distances, &pairs, level.next_up());
                    visited.push((level, found));
                    level = next;
                }
                for level in (-2..10).map(f64::from) {
                    let expected = step_by_step(&distances, level.next_up());
                    assert_eq!(at(&distances, level.next_up()), expected);
                    let last = visited.iter().rfind(|(found, _)| *found <= level);
                    let singles = || (0..count).map(|e| vec![e]).collect::<Vec<_>>();
                    let found = last.map_or_else(singles, |(_, found)| found.clone());
                    assert_eq!(found, expected, "{level} {distances:?}");
                }
            }
        }
    }

    #[test]
    fn more_than_a_hundred_experts_take_no_time() {
        let row = |e: usize| {
            (0..8)
                .map(|i| ((e * 37 + i * 61 + e * i) % 101) as f64)
                .collect()
        };
        let rows: Vec<Vec<f64>> = (0..128).map(row).collect();
        let found = thresholded(&row_distances(&rows), 96, &NoProgress).unwrap();
        assert!(found.len() >= 96 && found.len() < 128, "{}", found.len());
    }
}
