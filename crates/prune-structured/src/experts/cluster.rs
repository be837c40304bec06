//! Hierarchical clustering.

/// How far apart two clusters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Linkage {
    /// As their members that are farthest apart.
    Complete,
    /// As their members on average.
    Average,
}

/// Unites the nearest clusters until `keep` are left. Of equally near pairs the one goes first whose first members are
/// smallest, the first cluster's before the second's. Clusters are in the order of their first members.
pub(crate) fn clusters(distances: &[Vec<f64>], keep: usize, linkage: Linkage) -> Vec<Vec<usize>> {
    let mut d: Vec<Vec<f64>> = distances.to_vec();
    let mut clusters: Vec<Vec<usize>> = (0..d.len()).map(|e| vec![e]).collect();
    while clusters.len() > keep.max(1) {
        let mut least = (f64::INFINITY, 0, 1);
        for (a, row) in d.iter().enumerate() {
            for (b, &distance) in row.iter().enumerate().skip(a + 1) {
                if distance < least.0 {
                    least = (distance, a, b);
                }
            }
        }
        let (_, a, b) = least;
        let (of_a, of_b) = (clusters[a].len() as f64, clusters[b].len() as f64);
        let unite = |(to_a, to_b): (&f64, &f64)| match linkage {
            Linkage::Complete => to_a.max(*to_b),
            Linkage::Average => (of_a * to_a + of_b * to_b) / (of_a + of_b),
        };
        let united: Vec<f64> = d[a].iter().zip(&d[b]).map(unite).collect();
        for (row, &distance) in d.iter_mut().zip(&united) {
            row[a] = distance;
        }
        d[a] = united;
        let members = clusters.remove(b);
        clusters[a].extend(members);
        clusters[a].sort_unstable();
        d.remove(b);
        d.iter_mut().for_each(|row| {
            row.remove(b);
        });
    }
    clusters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linkages_differ_in_what_is_far() {
        // On a line: 0, 1, 2.1, 3.3.
        let at = [0.0f64, 1.0, 2.1, 3.3];
        let distances: Vec<Vec<f64>> = at
            .iter()
            .map(|a| at.iter().map(|b| (a - b).abs()).collect())
            .collect();
        let complete = clusters(&distances, 2, Linkage::Complete);
        assert_eq!(complete, [vec![0, 1], vec![2, 3]]);
        assert_eq!(clusters(&distances, 9, Linkage::Average).len(), 4);
        assert_eq!(clusters(&distances, 0, Linkage::Average).len(), 1);
    }

    #[test]
    fn of_equally_near_pairs_the_first_goes_first() {
        let distances = vec![vec![1.0; 4]; 4];
        let cut = clusters(&distances, 3, Linkage::Complete);
        assert_eq!(cut, [vec![0, 1], vec![2], vec![3]]);
    }
}
