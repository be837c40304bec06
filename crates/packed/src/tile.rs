//! Weights as the kernels read them: 16 rows interleaved, so that one load holds a few columns of all of them.
//!
//! A tile is 16 rows. It is divided into blocks of 32 columns, and some blocks (the last ones: fewer) make a chunk: first
//! the scales of the chunk, then the codes of its blocks. Everything starts at a multiple of 64 bytes. A chunk is as short
//! as that allows, so that a kernel reads memory in order. Codes of a block lie in planes of 64 bytes, 4 for each row; with
//! column 4g + j, g < 8 and j < 4:
//!
//! | plane | byte j of a row holds |
//! |---|---|
//! | 8 bits, g | the code |
//! | 4 bits, p | columns 8p + j in the low and 8p + 4 + j in the high half |
//! | 2 bits, h | g = 4h + k in bits 2k and 2k + 1, k < 4 |
//! | 1 bit | g in bit g |
//!
//! Codes of 3, 5 and 6 bits have a plane of the low 2 or 4 bits and one of the others. Scales of a chunk:
//!
//! | types | blocks | floats of the rows | then, for each block |
//! |---|---|---|---|
//! | `Q4_0`, `Q5_0`, `Q8_0`, `IQ4_NL` | 2 | – | d of 16 rows (32 bytes) |
//! | `Q4_1`, `Q5_1` | 1 | – | d and m of 16 rows |
//! | `Q4_K`, `Q5_K` | 8 | d and m | scales, minimums: a byte each |
//! | `Q3_K`, `Q6_K` | 8 | d | scales of the first 16 columns, of the others |
//! | `Q2_K` | 8 | d and m | scale and minimum in a byte, first 16 columns, then the others |
//!
//! Grouped integers have the scales of all groups of the tile in front, then their zeros, then the codes.

use half::f16;
use rayon::prelude::*;

use crate::block::{Block, Form, Minimum};
use crate::block_type::K_BLOCK;
use crate::groups::Groups;
use crate::{BlockType, QuantRows};

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Columns of a block of a tile.
pub(crate) const BLOCK: usize = 32;
/// Columns of the narrowest groups, two to a block.
pub(crate) const HALF_BLOCK: usize = BLOCK / 2;
/// Blocks of a chunk of types with a scale.
pub(crate) const PLAIN_CHUNK: usize = 2;
/// Blocks of a chunk of types with a scale and a minimum.
pub(crate) const OFFSET_CHUNK: usize = 1;
/// Blocks of a chunk of types with integer scales.
pub(crate) const K_CHUNK: usize = K_BLOCK / BLOCK;

/// 64 aligned bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

impl Line {
    /// The first or second 32 bytes.
    #[inline(always)]
    pub(crate) fn half(&self, half: usize) -> &[u8; 32] {
        let at = half % 2 * 32;
        self.0[at..at + 32].first_chunk().expect("32 bytes")
    }

    /// 16 bytes.
    #[inline(always)]
    pub(crate) fn quarter(&self, quarter: usize) -> &[u8; 16] {
        let at = quarter % 4 * 16;
        self.0[at..at + 16].first_chunk().expect("16 bytes")
    }
}

/// What the bytes of tiles mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Blocks of a type.
    Blocks(BlockType),
    /// Grouped integers.
    Groups(GroupLayout),
}

/// What the bytes of tiles of grouped integers mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupLayout {
    /// Bits of a code.
    pub(crate) bits: u32,
    /// Blocks of a group, if it has any.
    pub(crate) blocks: usize,
    /// Whether a group is half a block.
    pub(crate) halves: bool,
    /// Groups of a row.
    pub(crate) groups: usize,
    /// Whether zeros are stored; else they are in the middle.
    pub(crate) zeros: bool,
}

impl GroupLayout {
    /// The group of the first or second half of block `b`. A row of an odd number of halves has room for one group more, whose
    /// scale is 0.
    pub(crate) fn group(&self, b: usize, half: usize) -> usize {
        match self.halves {
            true => 2 * b + half,
            // Numbers of 32 bits divide faster.
            false => (b as u32 / self.blocks as u32) as usize,
        }
    }

    /// Lines with scales in front of a tile.
    pub(crate) fn scale_lines(&self) -> usize {
        self.groups.div_ceil(2)
    }

    /// Lines with scales and zeros.
    pub(crate) fn head_lines(&self) -> usize {
        let zeros = if self.zeros {
            self.groups.div_ceil(4)
        } else {
            0
        };
        self.scale_lines() + zeros
    }
}

/// Blocks of a chunk, but of the last one of a row.
fn chunk_blocks(form: &Form) -> usize {
    match (form.has_sub_scales(), form.minimum) {
        (true, _) => K_CHUNK,
        (false, Minimum::Absent) => PLAIN_CHUNK,
        (false, _) => OFFSET_CHUNK,
    }
}

/// Lines of scales of a chunk of so many blocks.
pub(crate) fn head_lines(form: &Form, blocks: usize) -> usize {
    match (form.has_sub_scales(), form.minimum) {
        (true, _) => 1 + blocks.div_ceil(2),
        (false, Minimum::Absent) => blocks.div_ceil(2),
        (false, _) => blocks,
    }
}

/// A matrix of tiles.
#[derive(Clone, Debug)]
pub(crate) struct Tiles {
    layout: Layout,
    rows: usize,
    cols: usize,
    /// Lines of a tile.
    stride: usize,
    lines: Vec<Line>,
}

impl Tiles {
    /// The layout.
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// Rows of the matrix; the last tile may have fewer than 16.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of a tile.
    pub(crate) fn tile_bytes(&self) -> usize {
        64 * self.stride
    }

    /// Bytes of all tiles.
    pub(crate) fn bytes(&self) -> usize {
        64 * self.lines.len()
    }

    /// A tile.
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize) -> &[Line] {
        &self.lines[tile * self.stride..][..self.stride]
    }

    /// Tiles of blocks of a quantised type.
    pub(crate) fn from_rows(rows: &QuantRows<'_>) -> Self {
        let ty = rows.block_type();
        let form = Form::of(ty).expect("a quantised type");
        let blocks = rows.cols() / BLOCK;
        let chunk = chunk_blocks(&form);
        let (whole, rest) = (blocks / chunk, blocks % chunk);
        let planes = form.bits as usize;
        let stride = whole * (head_lines(&form, chunk) + chunk * planes)
            + if rest > 0 {
                head_lines(&form, rest) + rest * planes
            } else {
                0
            };
        let fill = |tile: usize, lines: &mut [Line]| {
            let mut block = Block::default();
            for lane in 0..TILE_ROWS.min(rows.rows() - tile * TILE_ROWS) {
                let row = rows.row(tile * TILE_ROWS + lane);
                let mut chunk = ChunkMut {
                    form: &form,
                    lane,
                    lines: &mut *lines,
                    blocks,
                };
                for (i, bytes) in row.chunks_exact(ty.block_bytes()).enumerate() {
                    block.read(ty, bytes);
                    chunk.put(i, &block);
                }
            }
        };
        Self::filled(Layout::Blocks(ty), rows.rows(), rows.cols(), stride, fill)
    }

    /// Tiles of grouped integers.
    pub(crate) fn from_groups(groups: &Groups) -> Self {
        let layout = GroupLayout {
            bits: groups.bits().get(),
            blocks: groups.width().div_ceil(BLOCK),
            halves: groups.width() == HALF_BLOCK && groups.groups() > 1,
            groups: groups.groups(),
            zeros: groups.zeros().is_some(),
        };
        let (rows, cols) = (groups.rows(), groups.cols());
        let blocks = cols.div_ceil(BLOCK);
        let planes = layout.bits as usize;
        let stride = layout.head_lines() + blocks * planes;
        let fill = |tile: usize, lines: &mut [Line]| {
            let (head, codes) = lines.split_at_mut(layout.head_lines());
            let (scales, zeros) = head.split_at_mut(layout.scale_lines());
            for lane in 0..TILE_ROWS.min(rows - tile * TILE_ROWS) {
                let row = tile * TILE_ROWS + lane;
                for group in 0..layout.groups {
                    let at = 32 * (group % 2) + 2 * lane;
                    let scale = groups.scale(row, group);
                    scales[group / 2].0[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                    if layout.zeros {
                        zeros[group / 4].0[16 * (group % 4) + lane] = groups.zero(row, group);
                    }
                }
                let mut buffer = [0; BLOCK];
                for (b, lines) in codes.chunks_exact_mut(planes).enumerate() {
                    let part = b * BLOCK..cols.min((b + 1) * BLOCK);
                    let count = part.len();
                    groups.codes_in_order(row, part, &mut buffer[..count]);
                    put_codes(layout.bits, lines, lane, &buffer);
                }
            }
        };
        Self::filled(Layout::Groups(layout), rows, cols, stride, fill)
    }

    fn filled(
        layout: Layout,
        rows: usize,
        cols: usize,
        stride: usize,
        fill: impl Fn(usize, &mut [Line]) + Sync,
    ) -> Self {
        let mut lines = vec![Line([0; 64]); rows.div_ceil(TILE_ROWS) * stride];
        if stride > 0 {
            lines
                .par_chunks_mut(stride)
                .enumerate()
                .for_each(|(tile, lines)| fill(tile, lines));
        }
        Self {
            layout,
            rows,
            cols,
            stride,
            lines,
        }
    }

    /// The bytes of a row of blocks, as they were before.
    pub(crate) fn row_bytes(&self, ty: BlockType, row: usize, bytes: &mut [u8]) {
        let form = Form::of(ty).expect("a quantised type");
        let chunk = ChunkRef {
            form: &form,
            lane: row % TILE_ROWS,
            lines: self.tile(row / TILE_ROWS),
            blocks: self.cols / BLOCK,
        };
        for (i, bytes) in bytes.chunks_exact_mut(ty.block_bytes()).enumerate() {
            chunk.get(i).encode(ty, bytes);
        }
    }

    /// The values of a row. Grouped integers come in the order of the tiles' columns.
    pub(crate) fn row_values(&self, row: usize, values: &mut [f32]) {
        match self.layout {
            Layout::Blocks(ty) => {
                let form = Form::of(ty).expect("a quantised type");
                let chunk = ChunkRef {
                    form: &form,
                    lane: row % TILE_ROWS,
                    lines: self.tile(row / TILE_ROWS),
                    blocks: self.cols / BLOCK,
                };
                for (i, values) in values.chunks_exact_mut(form.len).enumerate() {
                    chunk.get(i).values(ty, values);
                }
            }
            Layout::Groups(layout) => {
                let lane = row % TILE_ROWS;
                let (head, codes) = self.tile(row / TILE_ROWS).split_at(layout.head_lines());
                let (scales, zeros) = head.split_at(layout.scale_lines());
                let planes = codes.chunks_exact(layout.bits as usize);
                for (b, (values, lines)) in values.chunks_mut(BLOCK).zip(planes).enumerate() {
                    let codes = get_codes(layout.bits, lines, lane);
                    let halves = values.chunks_mut(HALF_BLOCK);
                    let halves = halves.zip(codes.chunks_exact(HALF_BLOCK)).enumerate();
                    for (half, (values, codes)) in halves {
                        let group = layout.group(b, half);
                        let at = 32 * (group % 2) + 2 * lane;
                        let scale = f16_at(&scales[group / 2], at).to_f32();
                        let zero = match layout.zeros {
                            true => i32::from(zeros[group / 4].0[16 * (group % 4) + lane]),
                            false => 1 << (layout.bits - 1),
                        };
                        for (value, code) in values.iter_mut().zip(codes) {
                            *value = scale * (i32::from(*code) - zero) as f32;
                        }
                    }
                }
            }
        }
    }
}

fn f16_at(line: &Line, at: usize) -> f16 {
    f16::from_le_bytes([line.0[at], line.0[at + 1]])
}

/// Where the chunk of block `b` starts, how many blocks it has, and the number of `b` among them.
fn chunk_of(form: &Form, blocks: usize, b: usize) -> (usize, usize, usize) {
    let length = chunk_blocks(form);
    let chunk = b / length;
    let whole = head_lines(form, length) + length * form.bits as usize;
    (
        chunk * whole,
        length.min(blocks - chunk * length),
        b % length,
    )
}

/// One row of a tile, to be written.
struct ChunkMut<'a> {
    form: &'a Form,
    lane: usize,
    lines: &'a mut [Line],
    blocks: usize,
}

impl ChunkMut<'_> {
    /// Writes block `i` of the row, which may be one or eight blocks of the tile.
    fn put(&mut self, i: usize, block: &Block) {
        let (form, lane) = (self.form, self.lane);
        let planes = form.bits as usize;
        let first = i * form.len / BLOCK;
        let (start, count, within) = chunk_of(form, self.blocks, first);
        let (head, codes) = self.lines[start..].split_at_mut(head_lines(form, count));
        let mut half = |line: usize, half: usize, value: f16| {
            let at = 32 * half + 2 * lane;
            head[line].0[at..at + 2].copy_from_slice(&value.to_le_bytes());
        };
        match (form.has_sub_scales(), form.minimum) {
            (true, minimum) => {
                half(0, 0, block.d);
                if minimum != Minimum::Absent {
                    half(0, 1, block.m);
                }
            }
            (false, Minimum::Absent) => half(within / 2, within % 2, block.d),
            (false, _) => {
                half(within, 0, block.d);
                half(within, 1, block.m);
            }
        }
        for b in 0..form.len / BLOCK {
            if form.has_sub_scales() {
                let [first, second] = sub_scales(form, block, b);
                let line = &mut head[1 + b / 2].0;
                line[32 * (b % 2) + lane] = first;
                line[32 * (b % 2) + 16 + lane] = second;
            }
            let lines = &mut codes[(within + b) * planes..][..planes];
            let codes = block.codes[b * BLOCK..].first_chunk().expect("32 codes");
            put_codes(form.bits, lines, lane, codes);
        }
    }
}

/// The two bytes of a row for 32 columns of a K type.
fn sub_scales(form: &Form, block: &Block, b: usize) -> [u8; 2] {
    match (form.sub, form.minimum) {
        (BLOCK, _) => [block.scales[b] as u8, block.mins[b]],
        (_, Minimum::Absent) => [block.scales[2 * b] as u8, block.scales[2 * b + 1] as u8],
        (_, _) => [2 * b, 2 * b + 1].map(|b| block.scales[b] as u8 | block.mins[b] << 4),
    }
}

/// One row of a tile, to be read.
struct ChunkRef<'a> {
    form: &'a Form,
    lane: usize,
    lines: &'a [Line],
    blocks: usize,
}

impl ChunkRef<'_> {
    fn get(&self, i: usize) -> Block {
        let (form, lane) = (self.form, self.lane);
        let planes = form.bits as usize;
        let first = i * form.len / BLOCK;
        let (start, count, within) = chunk_of(form, self.blocks, first);
        let (head, codes) = self.lines[start..].split_at(head_lines(form, count));
        let half = |line: usize, half: usize| f16_at(&head[line], 32 * half + 2 * lane);
        let mut block = Block::default();
        match (form.has_sub_scales(), form.minimum) {
            (true, minimum) => {
                block.d = half(0, 0);
                if minimum != Minimum::Absent {
                    block.m = half(0, 1);
                }
            }
            (false, Minimum::Absent) => block.d = half(within / 2, within % 2),
            (false, _) => (block.d, block.m) = (half(within, 0), half(within, 1)),
        }
        for b in 0..form.len / BLOCK {
            if form.has_sub_scales() {
                let line = &head[1 + b / 2].0;
                let first = line[32 * (b % 2) + lane];
                let second = line[32 * (b % 2) + 16 + lane];
                match (form.sub, form.minimum) {
                    (BLOCK, _) => (block.scales[b], block.mins[b]) = (first as i8, second),
                    (_, minimum) => {
                        for (b, byte) in [(2 * b, first), (2 * b + 1, second)] {
                            match minimum {
                                Minimum::Absent => block.scales[b] = byte as i8,
                                _ => {
                                    block.scales[b] = (byte & 15) as i8;
                                    block.mins[b] = byte >> 4;
                                }
                            }
                        }
                    }
                }
            }
            let lines = &codes[(within + b) * planes..][..planes];
            block.codes[b * BLOCK..][..BLOCK].copy_from_slice(&get_codes(form.bits, lines, lane));
        }
        block
    }
}

/// Writes the codes of a row to the planes of a block, which hold zeros there.
fn put_codes(bits: u32, planes: &mut [Line], lane: usize, codes: &[u8; BLOCK]) {
    match bits {
        8 => {
            for (line, codes) in planes.iter_mut().zip(codes.chunks_exact(4)) {
                line.0[4 * lane..4 * lane + 4].copy_from_slice(codes);
            }
        }
        4..=6 => {
            for (line, codes) in planes.iter_mut().zip(codes.chunks_exact(8)) {
                for j in 0..4 {
                    line.0[4 * lane + j] = codes[j] & 15 | codes[j + 4] << 4;
                }
            }
            match bits {
                5 => put_single_bits(&mut planes[4], lane, codes, 4),
                6 => put_pairs(&mut planes[4..], lane, codes, 4),
                _ => {}
            }
        }
        _ => {
            put_pairs(planes, lane, codes, 0);
            if bits == 3 {
                put_single_bits(&mut planes[2], lane, codes, 2);
            }
        }
    }
}

fn put_single_bits(line: &mut Line, lane: usize, codes: &[u8; BLOCK], bit: u32) {
    for (g, codes) in codes.chunks_exact(4).enumerate() {
        for (j, code) in codes.iter().enumerate() {
            line.0[4 * lane + j] |= (code >> bit & 1) << g;
        }
    }
}

fn put_pairs(planes: &mut [Line], lane: usize, codes: &[u8; BLOCK], shift: u32) {
    for (g, codes) in codes.chunks_exact(4).enumerate() {
        for (j, code) in codes.iter().enumerate() {
            planes[g / 4].0[4 * lane + j] |= (code >> shift & 3) << (2 * (g % 4));
        }
    }
}

/// The codes of a row.
fn get_codes(bits: u32, planes: &[Line], lane: usize) -> [u8; BLOCK] {
    std::array::from_fn(|column| {
        let (g, at) = (column / 4, 4 * lane + column % 4);
        let nibble = || planes[g / 2].0[at] >> (4 * (g % 2)) & 15;
        let pair = |first: usize| planes[first + g / 4].0[at] >> (2 * (g % 4)) & 3;
        let bit = |plane: usize| planes[plane].0[at] >> g & 1;
        match bits {
            2 => pair(0),
            3 => pair(0) | bit(2) << 2,
            4 => nibble(),
            5 => nibble() | bit(4) << 4,
            6 => nibble() | pair(4) << 4,
            _ => planes[g].0[at],
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_of_every_type_come_back_from_tiles(
            ty in prop::sample::select(BlockType::ALL.into_iter().filter(|ty| ty.is_quantised()).collect::<Vec<_>>()),
            rows in 1..36usize,
            blocks in 1..12usize,
            seed: u64,
        ) {
            let cols = ty.block_len() * blocks;
            let mut state = seed;
            let bytes: Vec<u8> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .take(rows * ty.row_bytes(cols).unwrap())
            .collect();
            let matrix = QuantRows::new(ty, rows, cols, bytes).unwrap();
            let tiles = Tiles::from_rows(&matrix);
            let mut back = vec![0; matrix.row_bytes()];
            for row in 0..rows {
                tiles.row_bytes(ty, row, &mut back);
                prop_assert_eq!(&back, matrix.row(row));
            }
        }
    }

    #[test]
    fn tiles_are_hardly_larger_than_the_blocks() {
        for (ty, bits) in [
            (BlockType::Q4_0, 4.5),
            (BlockType::Q4_1, 5.0),
            (BlockType::Q5_0, 5.5),
            (BlockType::Q8_0, 8.5),
            (BlockType::Q2_K, 2.625),
            (BlockType::Q3_K, 3.625),
            (BlockType::Q4_K, 4.625),
            (BlockType::Q5_K, 5.625),
            (BlockType::Q6_K, 6.625),
        ] {
            let bytes = vec![0; 16 * ty.row_bytes(1024).unwrap()];
            let tiles = Tiles::from_rows(&QuantRows::new(ty, 16, 1024, bytes).unwrap());
            assert_eq!(8.0 * tiles.bytes() as f64 / (16.0 * 1024.0), bits, "{ty}");
        }
    }
}
