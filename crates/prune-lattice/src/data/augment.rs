//! Random deformation of images in training: affine, or affine with a smooth elastic displacement.
//!
//! An output pixel at (x, y) in [-1, 1]² takes the bilinear value of the input at A (x, y) + shift (+ displacement), zero
//! outside the image.

use crate::{names::named, seed};
use rand::Rng;

named! {
    /// How images are deformed.
    #[derive(Default)]
    pub enum Augment as "augmentation" {
        /// Not at all.
        None = "none",
        /// Rotation up to 12°, scales within 12 %, shear up to 0.2, shifts up to 2 pixels, each uniform.
        Affine = "affine",
        /// The same, and a displacement of 1.2 pixels standard deviation on a 5 x 5 grid, bicubic in between.
        #[default]
        Elastic = "elastic",
    }
}

/// Augmentation of sequences that are images, whatever the order of their pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Augmentation {
    kind: Augment,
    height: usize,
    width: usize,
    /// Place `k` of a sequence holds pixel `order[k]`.
    order: Option<Vec<u32>>,
}

/// Which deformation is drawn: one for each example and epoch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draw {
    pub(crate) seed: u64,
    pub(crate) epoch: u64,
}

/// Points of the grid of displacements on each side.
const GRID: usize = 5;
const DISPLACEMENT: f32 = 1.2;
const ROTATION: f32 = 12.0;
const SCALE: f32 = 0.12;
const SHEAR: f32 = 0.2;
const SHIFT: f32 = 2.0;

impl Augmentation {
    /// For images of `height` x `width` pixels; `order[k]` is the pixel (row by row) in place `k` of a sequence, `None` row
    /// by row.
    pub fn new(kind: Augment, height: usize, width: usize, order: Option<Vec<u32>>) -> Self {
        Self {
            kind,
            height,
            width,
            order,
        }
    }

    /// The same images deformed in another way.
    pub(super) fn of_kind(self, kind: Augment) -> Self {
        Self { kind, ..self }
    }

    /// Number of pixels.
    pub(crate) fn size(&self) -> usize {
        self.height * self.width
    }

    /// Deforms an image in the order of its sequence.
    pub(crate) fn apply(&self, image: &[f32], draw: Draw, example: u64, out: &mut Vec<f32>) {
        out.clear();
        if self.kind == Augment::None {
            out.extend_from_slice(image);
            return;
        }
        let mut rng = seed::numbered(draw.seed, "augment", (draw.epoch << 32) ^ example);
        let mut uniform = |limit: f32| rng.random_range(-limit..=limit);
        let angle = uniform(ROTATION).to_radians();
        let (s1, s2) = (1.0 + uniform(SCALE), 1.0 + uniform(SCALE));
        let shear = uniform(SHEAR);
        let pixel = [2.0 / self.width as f32, 2.0 / self.height as f32];
        let shift = [uniform(SHIFT) * pixel[0], uniform(SHIFT) * pixel[1]];
        let (sin, cos) = angle.sin_cos();
        let a = [[cos * s1, -sin * s2 + shear], [sin * s1, cos * s2]];
        let grid: Option<[[f32; GRID * GRID]; 2]> = (self.kind == Augment::Elastic).then(|| {
            [0, 1].map(|axis| {
                std::array::from_fn(|_| seed::normal(&mut rng) * DISPLACEMENT * pixel[axis])
            })
        });
        let mut plain;
        let rows = match &self.order {
            None => image,
            Some(order) => {
                plain = vec![0.0; self.size()];
                order
                    .iter()
                    .zip(image)
                    .for_each(|(&p, &v)| plain[p as usize] = v);
                &plain
            }
        };
        let mut deformed = Vec::with_capacity(self.size());
        for i in 0..self.height {
            for j in 0..self.width {
                // Centres of pixels in [-1, 1].
                let x = (2 * j + 1) as f32 / self.width as f32 - 1.0;
                let y = (2 * i + 1) as f32 / self.height as f32 - 1.0;
                let mut at = [
                    a[0][0] * x + a[0][1] * y + shift[0],
                    a[1][0] * x + a[1][1] * y + shift[1],
                ];
                if let Some(grid) = &grid {
                    let (u, v) = (
                        (x + 1.0) / 2.0 * (GRID - 1) as f32,
                        (y + 1.0) / 2.0 * (GRID - 1) as f32,
                    );
                    at[0] += bicubic(&grid[0], u, v);
                    at[1] += bicubic(&grid[1], u, v);
                }
                let column = (at[0] + 1.0) / 2.0 * self.width as f32 - 0.5;
                let row = (at[1] + 1.0) / 2.0 * self.height as f32 - 0.5;
                deformed.push(self.bilinear(rows, row, column));
            }
        }
        match &self.order {
            None => *out = deformed,
            Some(order) => out.extend(order.iter().map(|&p| deformed[p as usize])),
        }
    }

    fn bilinear(&self, image: &[f32], row: f32, column: f32) -> f32 {
        let (top, left) = (row.floor(), column.floor());
        let (fy, fx) = (row - top, column - left);
        let value = |i: f32, j: f32| {
            let inside = i >= 0.0 && j >= 0.0 && i < self.height as f32 && j < self.width as f32;
            if inside {
                image[i as usize * self.width + j as usize]
            } else {
                0.0
            }
        };
        let upper = (1.0 - fx) * value(top, left) + fx * value(top, left + 1.0);
        let lower = (1.0 - fx) * value(top + 1.0, left) + fx * value(top + 1.0, left + 1.0);
        (1.0 - fy) * upper + fy * lower
    }
}

/// Weights of the four points around `t` in [0, 1) of Catmull and Rom's cubic.
fn cubic(t: f32) -> [f32; 4] {
    let (t2, t3) = (t * t, t * t * t);
    [
        0.5 * (-t3 + 2.0 * t2 - t),
        0.5 * (3.0 * t3 - 5.0 * t2 + 2.0),
        0.5 * (-3.0 * t3 + 4.0 * t2 + t),
        0.5 * (t3 - t2),
    ]
}

/// Value of the grid at column `u`, row `v`; the border is repeated.
fn bicubic(grid: &[f32; GRID * GRID], u: f32, v: f32) -> f32 {
    let (left, top) = (u.floor(), v.floor());
    let (wx, wy) = (cubic(u - left), cubic(v - top));
    let clamp = |k: i32| k.clamp(0, GRID as i32 - 1) as usize;
    let mut sum = 0.0;
    for (dy, wy) in (-1..3).zip(wy) {
        for (dx, wx) in (-1..3).zip(wx) {
            sum += wy * wx * grid[clamp(top as i32 + dy) * GRID + clamp(left as i32 + dx)];
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAW: Draw = Draw { seed: 3, epoch: 1 };

    fn image() -> Vec<f32> {
        (0..28 * 28)
            .map(|p| {
                let (i, j) = ((p / 28) as f32 - 14.0, (p % 28) as f32 - 14.0);
                (-(i * i + 2.0 * j * j) / 40.0).exp()
            })
            .collect()
    }

    fn augmented(kind: Augment, order: Option<Vec<u32>>, draw: Draw, example: u64) -> Vec<f32> {
        let mut out = Vec::new();
        let image = match &order {
            None => image(),
            Some(order) => order.iter().map(|&p| image()[p as usize]).collect(),
        };
        Augmentation::new(kind, 28, 28, order).apply(&image, draw, example, &mut out);
        out
    }

    #[test]
    fn a_deformed_image_keeps_its_ink_near_its_place_and_differs_by_example_and_epoch() {
        let sum = |v: &[f32]| v.iter().sum::<f32>();
        for kind in [Augment::Affine, Augment::Elastic] {
            let one = augmented(kind, None, DRAW, 0);
            assert_eq!(one, augmented(kind, None, DRAW, 0));
            assert_ne!(one, augmented(kind, None, DRAW, 1));
            let next = Draw { epoch: 2, ..DRAW };
            assert_ne!(one, augmented(kind, None, next, 0));
            let ratio = sum(&one) / sum(&image());
            assert!((0.6..1.6).contains(&ratio), "{kind:?}: {ratio}");
            let centre = |v: &[f32]| {
                let weighted: f32 = v.iter().enumerate().map(|(p, v)| (p % 28) as f32 * v).sum();
                weighted / sum(v)
            };
            assert!((centre(&one) - centre(&image())).abs() < 4.0);
        }
        assert_eq!(augmented(Augment::None, None, DRAW, 0), image());
    }

    #[test]
    fn a_permuted_image_is_deformed_as_the_image_and_then_permuted() {
        let order: Vec<u32> = (0..28 * 28).map(|k| k * 37 % (28 * 28)).collect();
        let plain = augmented(Augment::Elastic, None, DRAW, 5);
        let permuted = augmented(Augment::Elastic, Some(order.clone()), DRAW, 5);
        let expected: Vec<f32> = order.iter().map(|&p| plain[p as usize]).collect();
        assert_eq!(permuted, expected);
    }

    #[test]
    fn the_cubic_passes_through_its_points_and_reproduces_lines() {
        let line: [f32; GRID * GRID] = std::array::from_fn(|k| (k % GRID) as f32);
        for u in [1.0, 1.25, 1.5, 2.75] {
            assert!((bicubic(&line, u, 2.3) - u).abs() < 1e-5);
        }
        assert_eq!(cubic(0.0), [0.0, 1.0, 0.0, 0.0]);
    }
}
