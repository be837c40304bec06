//! Digits drawn in-process: a 5 x 7 glyph at twice its size, sheared, shifted and noisy, in 16 x 16 pixels, a row a step.

use super::{Sizes, splits};
use crate::{
    data::{Dataset, Examples, Inputs, Sequences, Targets},
    error::Result,
    rnn::InputKind,
};
use rand::Rng;

const SIDE: usize = 16;
/// Rows of five pixels, the leftmost being the highest bit.
const GLYPHS: [[u8; 7]; 10] = [
    [
        0b01110, 0b10001, 0b10001, 0b10101, 0b10001, 0b10001, 0b01110,
    ],
    [
        0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110,
    ],
    [
        0b01110, 0b10001, 0b00001, 0b00110, 0b01000, 0b10000, 0b11111,
    ],
    [
        0b11110, 0b00001, 0b00001, 0b01110, 0b00001, 0b00001, 0b11110,
    ],
    [
        0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010,
    ],
    [
        0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110,
    ],
    [
        0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110,
    ],
    [
        0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000,
    ],
    [
        0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110,
    ],
    [
        0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100,
    ],
];

pub(super) fn dataset(sizes: Sizes, seed: u64) -> Result<Dataset> {
    let [train, valid, test] = splits("row-digits", sizes, seed, |size, rng| {
        let (mut values, mut labels) = (
            Vec::with_capacity(size * SIDE * SIDE),
            Vec::with_capacity(size),
        );
        for _ in 0..size {
            let digit = rng.random_range(0..10usize);
            let shear: f32 = rng.random_range(-0.25..0.25);
            let (dx, dy) = (
                rng.random_range(0..=6) as f32,
                rng.random_range(0..=2) as f32,
            );
            let ink: f32 = rng.random_range(0.7..1.0);
            for y in 0..SIDE {
                for x in 0..SIDE {
                    // Back to the glyph: undo shift, shear around the middle, and scale.
                    let gy = (y as f32 - dy) / 2.0;
                    let gx = (x as f32 - dx - shear * (y as f32 - 8.0)) / 2.0;
                    let inside = (0.0..5.0).contains(&gx) && (0.0..7.0).contains(&gy);
                    let on = inside && GLYPHS[digit][gy as usize] >> (4 - gx as usize) & 1 == 1;
                    let noise: f32 = rng.random_range(-0.3..0.3);
                    values.push(if on { ink } else { 0.0 } + noise);
                }
            }
            labels.push(digit as u32);
        }
        let inputs = Inputs::Vectors { dim: SIDE, values };
        Ok(Examples::Sequences(Sequences::new(
            inputs,
            &vec![SIDE; size],
            Targets::Classes(labels),
        )?))
    })?;
    Ok(Dataset {
        train,
        valid,
        test,
        input: InputKind::Dense { dim: SIDE },
        outputs: 10,
    })
}
