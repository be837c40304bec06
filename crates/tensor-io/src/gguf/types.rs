//! The block types of GGUF files: id, name and size.

/// How one type stores values: in blocks of a fixed number of values and bytes, along the rows of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockLayout {
    /// Id in the file.
    pub id: u32,
    /// ggml's name.
    pub name: &'static str,
    /// Values in a block.
    pub values: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

const fn layout(id: u32, name: &'static str, values: usize, bytes: usize) -> BlockLayout {
    BlockLayout {
        id,
        name,
        values,
        bytes,
    }
}

/// Every type that a file may hold, by id.
const LAYOUTS: [BlockLayout; 32] = [
    layout(0, "F32", 1, 4),
    layout(1, "F16", 1, 2),
    layout(2, "Q4_0", 32, 18),
    layout(3, "Q4_1", 32, 20),
    layout(6, "Q5_0", 32, 22),
    layout(7, "Q5_1", 32, 24),
    layout(8, "Q8_0", 32, 34),
    layout(10, "Q2_K", 256, 84),
    layout(11, "Q3_K", 256, 110),
    layout(12, "Q4_K", 256, 144),
    layout(13, "Q5_K", 256, 176),
    layout(14, "Q6_K", 256, 210),
    layout(16, "IQ2_XXS", 256, 66),
    layout(17, "IQ2_XS", 256, 74),
    layout(18, "IQ3_XXS", 256, 98),
    layout(19, "IQ1_S", 256, 50),
    layout(20, "IQ4_NL", 32, 18),
    layout(21, "IQ3_S", 256, 110),
    layout(22, "IQ2_S", 256, 82),
    layout(23, "IQ4_XS", 256, 136),
    layout(24, "I8", 1, 1),
    layout(25, "I16", 1, 2),
    layout(26, "I32", 1, 4),
    layout(27, "I64", 1, 8),
    layout(28, "F64", 1, 8),
    layout(29, "IQ1_M", 256, 56),
    layout(30, "BF16", 1, 2),
    layout(34, "TQ1_0", 256, 54),
    layout(35, "TQ2_0", 256, 66),
    layout(39, "MXFP4", 32, 17),
    layout(40, "NVFP4", 64, 36),
    layout(41, "Q1_0", 128, 18),
];

/// Why an id is no type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotStored {
    /// The id was taken out of the format.
    Removed,
    /// A type of activations, which no file holds.
    Activation,
    Unknown,
}

impl BlockLayout {
    /// The type of this name, in either case.
    pub fn named(name: &str) -> Option<Self> {
        LAYOUTS
            .into_iter()
            .find(|layout| layout.name.eq_ignore_ascii_case(name))
    }

    pub(crate) fn of_id(id: u32) -> Result<Self, NotStored> {
        match id {
            4 | 5 | 31..=33 | 36..=38 => Err(NotStored::Removed),
            // Q8_1 and Q8_K.
            9 | 15 => Err(NotStored::Activation),
            _ => LAYOUTS
                .into_iter()
                .find(|layout| layout.id == id)
                .ok_or(NotStored::Unknown),
        }
    }

    /// Bytes of a row of `width` values; `None` where the blocks do not fill it or the size overflows.
    pub fn row_bytes(&self, width: usize) -> Option<usize> {
        let blocks = width
            .is_multiple_of(self.values)
            .then_some(width / self.values)?;
        blocks.checked_mul(self.bytes)
    }
}
