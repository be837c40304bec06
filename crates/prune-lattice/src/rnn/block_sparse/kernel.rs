//! The products of panels with a vector. Several independent sums hide the latency of the additions.

#![expect(
    clippy::needless_range_loop,
    reason = "register tiles are indexed alike; iterators of one of them hide that"
)]

use super::{
    input::{BlockInput, QUADS, pair},
    machine::{Kernel, Machine},
    matrix::{Kind, Panel},
};

/// Groups of four are below this: an index of 16 bits masked so needs no bounds check.
const QUAD: usize = QUADS - 1;

/// Products of float weights.
pub(super) struct Floats<'a> {
    pub(super) kind: Kind,
    pub(super) panels: &'a [Panel],
    pub(super) columns: &'a [u16],
    pub(super) units: &'a [[f32; 8]],
    pub(super) x: &'a BlockInput,
    pub(super) y: &'a mut [f32],
}

/// Products of weights of 8 bits.
pub(super) struct Integers<'a> {
    pub(super) kind: Kind,
    pub(super) panels: &'a [Panel],
    pub(super) columns: &'a [u16],
    pub(super) codes: &'a [[i8; 16]],
    pub(super) scales: &'a [f32],
    pub(super) x: &'a BlockInput,
    pub(super) y: &'a mut [f32],
}

/// Removes the first `count` entries.
#[inline(always)]
fn take<'a, T>(from: &mut &'a [T], count: usize) -> &'a [T] {
    let (first, rest) = from.split_at(count);
    *from = rest;
    first
}

#[inline(always)]
fn single<T>(of: &[[T; 4]; QUADS], column: u16) -> &T {
    &of[usize::from(column) >> 2 & QUAD][usize::from(column) & 3]
}

#[inline(always)]
fn add_to(y: &mut [f32], sums: &[f32]) {
    y.iter_mut().zip(sums).for_each(|(y, s)| *y += s);
}

#[inline(always)]
fn total<M: Machine, const N: usize>(m: M, sums: [M::F; N]) -> [f32; 8] {
    let mut all = sums[0];
    for &sum in &sums[1..] {
        all = m.add(all, sum);
    }
    m.floats(all)
}

impl Kernel for Floats<'_> {
    #[inline(always)]
    fn run<M: Machine>(self, m: M) {
        let mut units = self.units;
        let zero = m.splat(0.0);
        let x = &*self.x.floats;
        for panel in self.panels {
            let y = &mut self.y[panel.row..panel.row + panel.rows];
            if self.kind == Kind::Dense {
                let (fours, _) = take(&mut units, 4 * panel.to).as_chunks::<16>();
                let mut sums = [zero; 8];
                for (u, x) in fours.iter().zip(x.iter()) {
                    for c in 0..4 {
                        let splat = m.splat(x[c]);
                        for r in 0..4 {
                            let at = 4 * (c % 2) + r;
                            sums[at] = m.mul_add(m.load(&u[4 * c + r]), splat, sums[at]);
                        }
                    }
                }
                for (r, y) in y.chunks_mut(8).enumerate() {
                    add_to(y, &m.floats(m.add(sums[r], sums[4 + r])));
                }
                continue;
            }
            let columns = &self.columns[panel.from..panel.to];
            match self.kind {
                Kind::Dense => {}
                Kind::B8x4 => {
                    let (twos, _) = columns.as_chunks::<2>();
                    let (eights, _) = take(&mut units, 4 * columns.len()).as_chunks::<8>();
                    let mut sums = [zero; 8];
                    for (blocks, u) in twos.iter().zip(eights) {
                        for b in 0..2 {
                            let x = &x[usize::from(blocks[b]) & QUAD];
                            for c in 0..4 {
                                let at = 4 * b + c;
                                sums[at] = m.mul_add(m.load(&u[at]), m.splat(x[c]), sums[at]);
                            }
                        }
                    }
                    add_to(y, &total(m, sums));
                }
                Kind::B8x1 => {
                    let (fours, _) = columns.as_chunks::<4>();
                    let (units, _) = take(&mut units, columns.len()).as_chunks::<4>();
                    let mut sums = [zero; 4];
                    for (columns, u) in fours.iter().zip(units) {
                        for k in 0..4 {
                            let x = m.splat(*single(x, columns[k]));
                            sums[k] = m.mul_add(m.load(&u[k]), x, sums[k]);
                        }
                    }
                    add_to(y, &total(m, sums));
                }
                Kind::B4x1 => {
                    let (eights, _) = columns.as_chunks::<8>();
                    let (units, _) = take(&mut units, columns.len() / 2).as_chunks::<4>();
                    let mut sums = [zero; 4];
                    for (columns, u) in eights.iter().zip(units) {
                        for k in 0..4 {
                            let [low, high] = [columns[2 * k], columns[2 * k + 1]];
                            let x = m.halves(*single(x, low), *single(x, high));
                            sums[k] = m.mul_add(m.load(&u[k]), x, sums[k]);
                        }
                    }
                    let all = total(m, sums);
                    let halves: [f32; 4] = std::array::from_fn(|l| all[l] + all[l + 4]);
                    add_to(y, &halves);
                }
            }
        }
    }
}

impl Kernel for Integers<'_> {
    #[inline(always)]
    fn run<M: Machine>(self, m: M) {
        let mut units = self.codes;
        let zero = m.splat_i(0);
        let (pairs, codes) = (&*self.x.pairs, &*self.x.codes);
        let step = self.x.step;
        for panel in self.panels {
            let rows = panel.row..panel.row + panel.rows;
            let (y, scales) = (&mut self.y[rows.clone()], &self.scales[rows]);
            let add_scaled = |y: &mut [f32], scales: &[f32], sums: &[i32]| {
                for ((y, scale), sum) in y.iter_mut().zip(scales).zip(sums) {
                    *y += *sum as f32 * (scale * step);
                }
            };
            if self.kind == Kind::Dense {
                let (twos, _) = take(&mut units, 2 * panel.to).as_chunks::<4>();
                let mut sums = [zero; 4];
                let inputs = pairs.as_flattened();
                for (u, &x) in twos.iter().zip(inputs) {
                    let x = m.splat_i(x);
                    for r in 0..4 {
                        sums[r] = m.add_pairs(sums[r], &u[r], x);
                    }
                }
                for (r, (y, scales)) in y.chunks_mut(8).zip(scales.chunks(8)).enumerate() {
                    add_scaled(y, scales, &m.integers(sums[r]));
                }
                continue;
            }
            let columns = &self.columns[panel.from..panel.to];
            let mut sums = [zero; 4];
            match self.kind {
                Kind::Dense => {}
                Kind::B8x4 => {
                    let (twos, _) = columns.as_chunks::<2>();
                    let (fours, _) = take(&mut units, 2 * columns.len()).as_chunks::<4>();
                    for (blocks, u) in twos.iter().zip(fours) {
                        for k in 0..4 {
                            let x = pairs[usize::from(blocks[k / 2]) & QUAD][k % 2];
                            sums[k] = m.add_pairs(sums[k], &u[k], m.splat_i(x));
                        }
                    }
                }
                Kind::B8x1 => {
                    let (fours, _) = columns.as_chunks::<4>();
                    let (units, _) = take(&mut units, columns.len() / 2).as_chunks::<2>();
                    for (columns, u) in fours.iter().zip(units) {
                        for k in 0..2 {
                            let [a, b] = [columns[2 * k], columns[2 * k + 1]];
                            let x = pair(*single(codes, a), *single(codes, b));
                            sums[k] = m.add_pairs(sums[k], &u[k], m.splat_i(x));
                        }
                    }
                }
                Kind::B4x1 => {
                    let (eights, _) = columns.as_chunks::<8>();
                    let (units, _) = take(&mut units, columns.len() / 4).as_chunks::<2>();
                    for (columns, u) in eights.iter().zip(units) {
                        for k in 0..2 {
                            let two = |at: usize| {
                                let [a, b] = [columns[4 * k + at], columns[4 * k + at + 1]];
                                pair(*single(codes, a), *single(codes, b))
                            };
                            sums[k] = m.add_pairs(sums[k], &u[k], m.halves_i(two(0), two(2)));
                        }
                    }
                }
            }
            let all = m.add_i(m.add_i(sums[0], sums[1]), m.add_i(sums[2], sums[3]));
            let all = m.integers(all);
            if self.kind == Kind::B4x1 {
                let halves: [i32; 4] = std::array::from_fn(|l| all[l] + all[l + 4]);
                add_scaled(y, scales, &halves);
            } else {
                add_scaled(y, scales, &all);
            }
        }
    }
}
