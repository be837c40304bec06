//! The adding problem: two numbers of fifty are marked, their sum is asked for.

use super::{Sizes, splits};
use crate::{
    data::{Dataset, Examples, Inputs, Sequences, Targets},
    error::Result,
    rnn::InputKind,
};
use rand::Rng;

const STEPS: usize = 50;

/// Vectors (number in [0, 1], mark); one mark in each half. Always answering 1 has the error 1/6.
pub(super) fn dataset(sizes: Sizes, seed: u64) -> Result<Dataset> {
    let [train, valid, test] = splits("adding", sizes, seed, |size, rng| {
        let (mut values, mut sums) = (
            Vec::with_capacity(size * STEPS * 2),
            Vec::with_capacity(size),
        );
        for _ in 0..size {
            let marks = [
                rng.random_range(0..STEPS / 2),
                rng.random_range(STEPS / 2..STEPS),
            ];
            let mut sum = 0.0;
            for t in 0..STEPS {
                let (x, marked) = (rng.random::<f32>(), marks.contains(&t));
                sum += if marked { x } else { 0.0 };
                values.extend([x, f32::from(u8::from(marked))]);
            }
            sums.push(sum);
        }
        let inputs = Inputs::Vectors { dim: 2, values };
        Ok(Examples::Sequences(Sequences::new(
            inputs,
            &vec![STEPS; size],
            Targets::Values(sums),
        )?))
    })?;
    Ok(Dataset {
        train,
        valid,
        test,
        input: InputKind::Dense { dim: 2 },
        outputs: 1,
    })
}
