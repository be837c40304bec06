//! STUN's clusters by the published rule: a threshold of the distance, which all layers share.
//!
//! The rule blocks later unions of what was not united at first, so that it is no complete linkage, and the number of
//! clusters follows from the threshold. Here the threshold is searched for each layer, so that as many experts stay as are
//! wanted; where no threshold does that, the next larger number of clusters is thinned out by the shortest distances.

use super::{Choice, Choosing, Stun};
use crate::Result;
use crate::experts::cluster::{Linkage, clusters};
use crate::experts::layer::Layer;
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
        let mut found = thresholded(&distances, keep);
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
        Ok(Choice::from(self.stun.kept(layer, &found)?).with_clusters(found))
    }
}

/// The clusters of the largest threshold that leaves at least `keep`.
fn thresholded(distances: &[Vec<f64>], keep: usize) -> Vec<Vec<usize>> {
    // The clusters change only where the threshold passes a distance.
    let mut levels: Vec<f64> = distances
        .iter()
        .enumerate()
        .flat_map(|(a, row)| row[a + 1..].iter().copied())
        .collect();
    levels.sort_unstable_by(f64::total_cmp);
    levels.dedup();
    let just_above = levels.into_iter().map(|level| level.next_up());
    let mut best: Vec<Vec<usize>> = (0..distances.len()).map(|e| vec![e]).collect();
    for threshold in just_above {
        let found = published(distances, threshold, 1);
        if found.len() >= keep && found.len() < best.len() {
            best = found;
        }
    }
    best
}

/// The published rule for one threshold and at least `floor` clusters.
pub(crate) fn published(distances: &[Vec<f64>], threshold: f64, floor: usize) -> Vec<Vec<usize>> {
    let count = distances.len();
    let mut d: Vec<Vec<f64>> = distances.to_vec();
    (0..count).for_each(|e| d[e][e] = f64::INFINITY);
    let mut cluster: Vec<usize> = (0..count).collect();
    let mut clusters = count;
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
        if distance >= threshold || clusters <= floor {
            break;
        }
        let members = |of: usize| -> Vec<usize> {
            (0..count).filter(|&e| cluster[e] == cluster[of]).collect()
        };
        let (of_a, of_b) = (members(a), members(b));
        let to_b = of_a.iter().map(|&c| d[c][b]);
        let to_a = of_b.iter().map(|&c| d[c][a]);
        let far = to_b.chain(to_a).fold(f64::NEG_INFINITY, f64::max);
        if far < threshold {
            of_a.iter().for_each(|&c| d[c][b] = f64::INFINITY);
            of_b.iter().for_each(|&c| d[c][a] = f64::INFINITY);
            let (to, from) = (cluster[a], cluster[b]);
            if to != from {
                cluster
                    .iter_mut()
                    .filter(|c| **c == from)
                    .for_each(|c| *c = to);
                clusters -= 1;
            }
        } else {
            d[a][b] = f64::INFINITY;
            d[b][a] = f64::INFINITY;
        }
    }
    let mut all: Vec<Vec<usize>> = Vec::new();
    for first in 0..count {
        if cluster[..first].contains(&cluster[first]) {
            continue;
        }
        let same = (first..count).filter(|&e| cluster[e] == cluster[first]);
        all.push(same.collect());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::method::stun::row_distances;
    use crate::experts::method::stun::tests::example;

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
            let found = published(&distances, threshold, 1);
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
            let found = published(&alike, threshold, 1);
            assert_eq!(shown(&found), expected, "at {threshold}");
        }
    }

    #[test]
    fn a_threshold_is_found_for_each_number_of_clusters_that_one_gives() {
        let distances = row_distances(&example().0);
        for (keep, expected) in [(8, 8), (5, 5), (4, 4), (3, 3), (2, 2), (1, 1)] {
            assert_eq!(thresholded(&distances, keep).len(), expected, "{keep}");
        }
    }
}
