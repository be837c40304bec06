//! STUN: experts whose router rows are alike, and that are chosen together, are taken to behave alike.

use super::{Choice, Choosing, Reap};
use crate::Result;
use crate::experts::cluster::{Linkage, clusters};
use crate::experts::layer::Layer;
use crate::experts::merge::means;
use serde::{Deserialize, Serialize};

/// Clusters of complete linkage, as many as experts are to stay, one expert kept of each.
///
/// The distance of two experts is that of their router rows, less the tokens that choose both; each in units of its own
/// mean over all pairs, so that the weights have no unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stun {
    /// Weight of the distance of router rows.
    pub rows: f64,
    /// Weight of the tokens that choose both.
    pub together: f64,
    /// Which expert of a cluster stays.
    pub representative: Representative,
    /// Which clusters are averaged instead.
    #[serde(default)]
    pub reconstruct: Reconstruct,
}

/// Which clusters become the mean of their members, with neurons in the order of the one that would stay and with the mean of
/// their router rows: STUN's selective reconstruction. Its published program and its paper differ in what it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Reconstruct {
    /// None: one member of each cluster stays as it is.
    #[default]
    Never,
    /// All of layers that end with at most two, as the program does.
    FewClusters,
    /// Those of fewer than three members, as the paper is summarised.
    SmallClusters,
}

impl Reconstruct {
    /// Its name in flags and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::FewClusters => "few-clusters",
            Self::SmallClusters => "small-clusters",
        }
    }

    /// Whether a cluster of so many members, one of so many of a layer, is averaged.
    pub(crate) fn averages(self, members: usize, clusters: usize) -> bool {
        match self {
            Self::Never => false,
            Self::FewClusters => clusters <= 2,
            Self::SmallClusters => members < 3,
        }
    }
}

/// Which expert of a cluster stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Representative {
    /// The one whose weights are nearest to the cluster's mean. Neurons of different experts are not aligned, so that this
    /// comes close to the one with the smallest weights.
    #[default]
    NearestToMean,
    /// The one with the highest score of REAP.
    Reap,
}

impl Default for Stun {
    fn default() -> Self {
        Self {
            rows: 1.0,
            together: 0.0,
            representative: Representative::default(),
            reconstruct: Reconstruct::default(),
        }
    }
}

impl Choosing for Stun {
    fn choose(&self, layer: &Layer<'_>, keep: usize) -> Result<Choice> {
        let distances = self.distances(layer)?;
        self.choice(layer, clusters(&distances, keep, Linkage::Complete))
    }
}

impl Stun {
    /// Whether it reads more than weights and router rows.
    pub(crate) fn reads_layers(&self) -> bool {
        self.together != 0.0 || self.representative == Representative::Reap
    }

    /// Distances of all pairs of experts.
    pub(crate) fn distances(&self, layer: &Layer<'_>) -> Result<Vec<Vec<f64>>> {
        let together = &layer.statistics.together;
        let experts = layer.experts();
        let together: Vec<Vec<f64>> = (0..experts)
            .map(|a| {
                (0..experts)
                    .map(|b| together[a * experts + b] as f64)
                    .collect()
            })
            .collect();
        Ok(combined(
            &row_distances(&layer.router()?),
            &together,
            self.rows,
            self.together,
        ))
    }

    /// What becomes of clusters.
    pub(crate) fn choice(&self, layer: &Layer<'_>, clusters: Vec<Vec<usize>>) -> Result<Choice> {
        let (kept, count) = (self.kept(layer, &clusters)?, clusters.len());
        let averaged = |members: &[usize]| self.reconstruct.averages(members.len(), count);
        Ok(means(&kept, clusters, averaged))
    }

    /// The expert that stays of each cluster.
    fn kept(&self, layer: &Layer<'_>, clusters: &[Vec<usize>]) -> Result<Vec<usize>> {
        let reap = match self.representative {
            Representative::Reap => Reap.scores(layer)?,
            Representative::NearestToMean => vec![],
        };
        let of_cluster = |cluster: &Vec<usize>| -> Result<usize> {
            let distances = match (&cluster[..], self.representative) {
                (&[alone], _) => return Ok(alone),
                (_, Representative::Reap) => cluster.iter().map(|&e| -reap[e]).collect(),
                (_, Representative::NearestToMean) => to_mean(cluster.len(), |at| {
                    layer.progress.advance(0)?;
                    layer.weights(cluster[at])
                })?,
            };
            let nearest = (0..cluster.len()).min_by(|&a, &b| distances[a].total_cmp(&distances[b]));
            // A cluster has members.
            Ok(cluster[nearest.unwrap_or_default()])
        };
        clusters.iter().map(of_cluster).collect()
    }
}

/// Euclidean distances of router rows.
pub(crate) fn row_distances(rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let distance = |a: &Vec<f64>, b: &Vec<f64>| {
        let squares = a.iter().zip(b).map(|(x, y)| (x - y) * (x - y));
        squares.sum::<f64>().sqrt()
    };
    rows.iter()
        .map(|a| rows.iter().map(|b| distance(a, b)).collect())
        .collect()
}

/// Mean over pairs of different experts.
fn mean_of_pairs(values: &[Vec<f64>]) -> f64 {
    let count = values.len();
    let sum: f64 = (0..count)
        .flat_map(|a| (0..count).filter(move |&b| b != a).map(move |b| (a, b)))
        .map(|(a, b)| values[a][b])
        .sum();
    sum / (count * count.saturating_sub(1)).max(1) as f64
}

/// Both distances in units of their own mean.
pub(crate) fn combined(
    rows: &[Vec<f64>],
    together: &[Vec<f64>],
    of_rows: f64,
    of_together: f64,
) -> Vec<Vec<f64>> {
    let unit = |mean: f64| if mean > 0.0 { 1.0 / mean } else { 0.0 };
    let (row_unit, together_unit) = (unit(mean_of_pairs(rows)), unit(mean_of_pairs(together)));
    let combine = |(a, b): (&f64, &f64)| of_rows * row_unit * a - of_together * together_unit * b;
    rows.iter()
        .zip(together)
        .map(|(rows, together)| rows.iter().zip(together).map(combine).collect())
        .collect()
}

/// Distances of vectors to their mean. Each is made twice, so that one is in memory beside the mean.
pub(crate) fn to_mean(
    count: usize,
    mut vector: impl FnMut(usize) -> Result<Vec<f32>>,
) -> Result<Vec<f64>> {
    let mut mean: Vec<f64> = Vec::new();
    for at in 0..count {
        let vector = vector(at)?;
        mean.resize(vector.len(), 0.0);
        let sums = mean.iter_mut().zip(vector);
        sums.for_each(|(sum, x)| *sum += f64::from(x));
    }
    mean.iter_mut().for_each(|sum| *sum /= count as f64);
    let distance = |at: usize| -> Result<f64> {
        let vector = vector(at)?;
        let squares = vector.iter().zip(&mean);
        let squares = squares.map(|(&x, mean)| (f64::from(x) - mean).powi(2));
        Ok(squares.sum::<f64>().sqrt())
    };
    (0..count).map(distance).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Router rows of eight experts and the tokens that choose two of them.
    pub(crate) fn example() -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let rows = [
            [1.0, 0.0, 0.0],
            [0.9, 0.1, 0.0],
            [0.0, 1.0, 0.0],
            [0.0, 1.1, 0.1],
            [0.0, 0.0, 1.0],
            [0.5, 0.5, 0.0],
            [0.0, 0.2, 0.9],
            [2.0, 0.0, 0.0],
        ];
        let mut together = vec![vec![0.0; 8]; 8];
        for (a, b, tokens) in [
            (0, 1, 1.0),
            (0, 7, 3.0),
            (2, 3, 2.0),
            (4, 6, 1.0),
            (2, 5, 3.0),
            (1, 6, 1.0),
            (3, 4, 1.0),
        ] {
            together[a][b] = tokens;
            together[b][a] = tokens;
        }
        (rows.iter().map(|row| row.to_vec()).collect(), together)
    }

    fn cut(rows: f64, together: f64, keep: usize) -> Vec<Vec<usize>> {
        let (router, pairs) = example();
        let distances = combined(&row_distances(&router), &pairs, rows, together);
        clusters(&distances, keep, Linkage::Complete)
    }

    #[test]
    fn clusters_are_those_found_by_hand() {
        let (router, pairs) = example();
        assert!((mean_of_pairs(&row_distances(&router)) - 1.228060).abs() < 1e-6);
        assert!((mean_of_pairs(&pairs) - 0.4285714).abs() < 1e-6);
        assert_eq!(
            cut(1.0, 0.0, 5),
            [vec![0, 1], vec![2, 3], vec![4, 6], vec![5], vec![7]]
        );
        assert_eq!(cut(1.0, 0.0, 3), [vec![0, 1, 4, 5, 6], vec![2, 3], vec![7]]);
        assert_eq!(
            cut(0.0, 1.0, 5),
            [vec![0, 7], vec![1, 6], vec![2, 5], vec![3], vec![4]]
        );
        assert_eq!(
            cut(1.0, 1.0, 5),
            [vec![0, 7], vec![1], vec![2, 5], vec![3], vec![4, 6]]
        );
    }

    #[test]
    fn clusters_are_averaged_by_their_size_or_by_their_number() {
        let averaged = |which: Reconstruct| -> Vec<(usize, usize)> {
            let all = (1..5).flat_map(|members| (1..5).map(move |clusters| (members, clusters)));
            all.filter(|&(members, clusters)| which.averages(members, clusters))
                .collect()
        };
        assert_eq!(averaged(Reconstruct::Never), []);
        assert!(
            averaged(Reconstruct::FewClusters)
                .iter()
                .all(|(_, clusters)| *clusters < 3)
        );
        assert!(
            averaged(Reconstruct::SmallClusters)
                .iter()
                .all(|(members, _)| *members < 3)
        );
        assert_eq!(averaged(Reconstruct::FewClusters).len(), 8);
        assert_eq!(averaged(Reconstruct::SmallClusters).len(), 8);
    }

    #[test]
    fn the_representative_is_nearest_to_the_mean() {
        let value = |e: usize, i: usize| (((2 * e + 3 * i + (e * i) % 5) % 7) as f32 - 3.0) / 2.0;
        let mut asked = vec![];
        let vector = |e: usize| {
            asked.push(e);
            Ok((0..6).map(|i| value(e, i)).collect())
        };
        let found = to_mean(4, vector).unwrap();
        // Twice each, one after the other.
        assert_eq!(asked, [0, 1, 2, 3, 0, 1, 2, 3]);
        for (found, expected) in found.iter().zip([2.042517, 1.595893, 2.724312, 2.814583]) {
            assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
        }
    }
}
