//! Where the experts of a layer lie by their router rows: two coordinates for a picture.

use super::method::stun::row_distances;
use crate::{Error, Result};
use candle_core::{DType, Device};
use causal_lm::Decoder;
use faer::Mat;

/// The first two principal components of the router rows of a layer, a pair for each expert.
///
/// # Errors
/// [`Error::Missing`] for a layer without experts, and what reading the router reports.
pub fn router_map(decoder: &Decoder<'_>, layer: usize) -> Result<Vec<[f64; 2]>> {
    let has_experts = decoder
        .config()
        .mixtures
        .get(layer)
        .copied()
        .flatten()
        .is_some();
    let router = decoder.config().names.router(layer).filter(|_| has_experts);
    let router = router.ok_or(Error::Missing {
        layer,
        what: "the router",
        need: "name a layer with experts",
    })?;
    let rows = decoder
        .checkpoint()
        .tensor_as(&router, DType::F64, &Device::Cpu)?;
    principal(&rows.to_vec2()?, layer)
}

/// Coordinates along the two directions in which rows differ most.
fn principal(rows: &[Vec<f64>], layer: usize) -> Result<Vec<[f64; 2]>> {
    // Inner products of centred rows follow from distances (classical scaling).
    let (n, distances) = (rows.len(), row_distances(rows));
    let square = |i: usize, j: usize| distances[i][j] * distances[i][j];
    let mean = |i: usize| (0..n).map(|j| square(i, j)).sum::<f64>() / n as f64;
    let means: Vec<f64> = (0..n).map(mean).collect();
    let all = means.iter().sum::<f64>() / n as f64;
    let products = Mat::from_fn(n, n, |i, j| {
        -0.5 * (square(i, j) - means[i] - means[j] + all)
    });
    let found = linalg::eigen(products.as_ref()).map_err(|_| Error::Singular { layer })?;
    let coordinate = |i: usize, axis: usize| match found.values.get(axis) {
        Some(&value) if value > 0.0 => value.sqrt() * found.vectors[(i, axis)],
        _ => 0.0,
    };
    Ok((0..n)
        .map(|i| [coordinate(i, 0), coordinate(i, 1)])
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_a_plane_keep_their_distances() {
        let rows = [
            [0.0, 0.0, 1.0],
            [3.0, 0.0, 1.0],
            [0.0, 4.0, 1.0],
            [3.0, 4.0, 1.0],
        ];
        let rows: Vec<Vec<f64>> = rows.iter().map(|row| row.to_vec()).collect();
        let map = principal(&rows, 0).unwrap();
        let distances = row_distances(&rows);
        for (a, row) in map.iter().zip(&distances) {
            for (b, distance) in map.iter().zip(row) {
                let found = ((a[0] - b[0]).powi(2) + (a[1] - b[1]).powi(2)).sqrt();
                assert!((found - distance).abs() < 1e-9, "{found} is not {distance}");
            }
        }
    }
}
