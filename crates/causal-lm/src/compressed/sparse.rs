//! The bitmask formats of compressed-tensors, which older releases wrote for pruned models.
//!
//! `compressed` holds the values that are not zero in row-major order (`[m, n/2]` for 2:4, else flat), `bitmask` u8
//! `[m, ⌈n/8⌉]` a bit for every weight, lowest bit first, `shape` the two sizes.

use tensor_io::{Checkpoint, Dtype, Result};

use super::stored::{self, refuse};

/// A weight with zeros, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Sparse {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// The values, those that are zero included.
    pub values: Vec<f64>,
}

/// The prefix of a module's tensors, if it is stored so.
pub(super) fn prefix(checkpoint: &Checkpoint, module: &str) -> Option<String> {
    [module.to_string(), format!("{module}.weight")]
        .into_iter()
        .find(|prefix| checkpoint.contains(&format!("{prefix}.bitmask")))
}

pub(super) fn read(checkpoint: &Checkpoint, prefix: &str) -> Result<Sparse> {
    let name = |tensor: &str| format!("{prefix}.{tensor}");
    let [m, n] = stored::shape(checkpoint, &name("shape"))?;
    let (values, _) = stored::floats(checkpoint, &name("compressed"))?;
    let info = checkpoint.expect_shape(&name("bitmask"), &[m, n.div_ceil(8)])?;
    if info.dtype != Dtype::U8 {
        return refuse(
            checkpoint,
            &name("bitmask"),
            format!("expected uint8, found {:?}", info.dtype),
        );
    }
    let bitmask = checkpoint.bytes(&name("bitmask"))?;
    // The bitmask has as many bits, so that the product fits.
    let mut dense = vec![0.0; m * n];
    let mut values = values.into_iter();
    for (row, bits) in dense
        .chunks_mut(n.max(1))
        .zip(bitmask.chunks(n.div_ceil(8).max(1)))
    {
        for (j, weight) in row.iter_mut().enumerate() {
            if bits[j / 8] >> (j % 8) & 1 == 1 {
                match values.next() {
                    Some(value) => *weight = value,
                    None => {
                        return refuse(
                            checkpoint,
                            &name("compressed"),
                            "holds fewer values than the bitmask has bits",
                        );
                    }
                }
            }
        }
    }
    match values.next() {
        None => Ok(Sparse {
            rows: m,
            cols: n,
            values: dense,
        }),
        Some(_) => refuse(
            checkpoint,
            &name("compressed"),
            "holds more values than the bitmask has bits",
        ),
    }
}
