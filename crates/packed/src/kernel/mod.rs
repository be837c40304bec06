//! Products of a matrix with tokens, each written once for all machines.

pub(crate) mod bf16;
mod codes;
pub(crate) mod dense;
mod format;
mod grouped;
pub(crate) mod panel;
pub(crate) mod tail;
pub(crate) mod tiles;

use codes::{Bytes, FiveBits, Levels, Nibbles, SixBits, ThreeBits, TwoBits};
pub(crate) use format::Format;
use format::{Offset, Plain, Sub16, Sub16Offset, Sub32};
use grouped::{Grouped, GroupedHalves};

use crate::BlockType;
use crate::tile::Layout;

/// Something to be done with the format of a layout.
pub(crate) trait WithFormat {
    type Output;
    fn with<F: Format>(self, format: F) -> Self::Output;
}

/// Calls `f` with the format of a layout.
pub(crate) fn with_format<W: WithFormat>(layout: Layout, f: W) -> W::Output {
    match layout {
        Layout::Blocks(ty) => match ty {
            BlockType::Q4_0 => f.with(Plain::<Nibbles<8>>::NEW),
            BlockType::Q4_1 => f.with(Offset::<Nibbles<0>>::NEW),
            BlockType::Q5_0 => f.with(Plain::<FiveBits<16>>::NEW),
            BlockType::Q5_1 => f.with(Offset::<FiveBits<0>>::NEW),
            BlockType::Q8_0 => f.with(Plain::<Bytes>::NEW),
            BlockType::IQ4_NL => f.with(Plain::<Levels>::NEW),
            BlockType::Q2_K => f.with(Sub16Offset::<TwoBits<0>>::NEW),
            BlockType::Q3_K => f.with(Sub16::<ThreeBits>::NEW),
            BlockType::Q4_K => f.with(Sub32::<Nibbles<0>>::NEW),
            BlockType::Q5_K => f.with(Sub32::<FiveBits<0>>::NEW),
            BlockType::Q6_K => f.with(Sub16::<SixBits>::NEW),
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => {
                unreachable!("floats have no tiles")
            }
        },
        Layout::Groups(layout) => match (layout.bits, layout.halves) {
            (2, false) => f.with(Grouped::<TwoBits<2>>::new(layout)),
            (3, false) => f.with(Grouped::<ThreeBits>::new(layout)),
            (4, false) => f.with(Grouped::<Nibbles<8>>::new(layout)),
            (_, false) => f.with(Grouped::<Bytes>::new(layout)),
            (2, true) => f.with(GroupedHalves::<TwoBits<2>>::new(layout)),
            (3, true) => f.with(GroupedHalves::<ThreeBits>::new(layout)),
            (4, true) => f.with(GroupedHalves::<Nibbles<8>>::new(layout)),
            (_, true) => f.with(GroupedHalves::<Bytes>::new(layout)),
        },
    }
}
