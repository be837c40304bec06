//! Patterns, ratios and scores of pruning.

use super::{correlated, distance, gram, random, run};
use crate::compress::{Compressor, Inputs};
use faer::Mat;

#[test]
fn patterns_and_ratios_are_exact() {
    let (m, n) = (70, 264);
    let w = random(12, m, n);
    let h = gram(&correlated(13, n, 300));
    for score in ["magnitude", "wanda", "sparsegpt"] {
        for (keep, of) in [(2, 4), (4, 8), (1, 4), (3, 4)] {
            for quantise in ["", "+rtn-int4", "+gptq-int4-g32"] {
                let name = format!("{score}-{keep}:{of}{quantise}");
                let compressed = run(&name, &w, &h);
                let mask = compressed.mask.expect("it prunes");
                assert!(
                    mask.pruned()
                        .chunks(of)
                        .all(|c| c.iter().filter(|&&p| p).count() == of - keep)
                );
                for (at, &pruned) in mask.pruned().iter().enumerate() {
                    assert!(
                        !pruned || compressed.weight[(at / n, at % n)] == 0.0,
                        "{name}"
                    );
                }
            }
        }
        for percent in [0.0, 12.5, 50.0, 99.9] {
            let compressed = run(&format!("{score}-{percent}"), &w, &h);
            let zeros = compressed.mask.expect("it prunes").count();
            let expected = match score {
                "wanda" => m * (n as f64 * percent / 100.0) as usize,
                _ => ((m * n) as f64 * percent / 100.0) as usize,
            };
            assert_eq!(zeros, expected, "{score}-{percent}");
            if percent == 0.0 {
                assert_eq!(distance(&compressed.weight, &w), 0.0, "{score}");
            }
        }
    }
}

#[test]
fn ties_are_cut_by_position_or_all_together() {
    let w = Mat::from_fn(2, 4, |i, j| if (i, j) == (1, 0) { 0.5 } else { 1.0 });
    let zeros = |name: &str| {
        let compressor: Compressor = name.parse().expect("a name");
        let compressed = compressor.compress(w.as_ref(), None).expect("valid");
        let mask = compressed.mask.expect("it prunes");
        mask.pruned()
            .iter()
            .map(|&p| u8::from(p))
            .collect::<Vec<_>>()
    };
    assert_eq!(zeros("magnitude-50"), [1, 1, 1, 0, 1, 0, 0, 0]);
    assert_eq!(zeros("magnitude-12.5"), [0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(zeros("magnitude-12.5-ties"), [1; 8]);
    assert_eq!(zeros("magnitude-2:4"), [1, 1, 0, 0, 1, 1, 0, 0]);
}

#[test]
fn wanda_weighs_magnitudes_by_the_norms_of_the_inputs() {
    let w = Mat::from_fn(2, 4, |i, j| {
        [[4.0, -3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]][i][j]
    });
    let compressor: Compressor = "wanda-50".parse().expect("a name");
    // Norms 1, 2, 3, 5: scores 4, 6, 6, 5 and 1, 2, 3, 5.
    let squares = [1.0, 4.0, 9.0, 25.0];
    let inputs = Some(Inputs::Diagonal(&squares));
    let weight = compressor
        .compress(w.as_ref(), inputs)
        .expect("valid")
        .weight;
    let expected = [[0.0, -3.0, 2.0, 0.0], [0.0, 0.0, 1.0, 1.0]];
    assert_eq!(weight, Mat::from_fn(2, 4, |i, j| expected[i][j]));
}
