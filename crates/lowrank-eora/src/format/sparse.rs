//! The bitmask formats of compressed-tensors, which older releases wrote for pruned models.
//!
//! `compressed` holds the values that are not zero in row-major order (`[m, n/2]` for 2:4, else flat), `bitmask` u8
//! `[m, ⌈n/8⌉]` a bit for every weight, lowest bit first, `shape` the two sizes.

use faer::Mat;
use tensor_io::{Checkpoint, Dtype};

use super::stored::{self, refuse};
use crate::Result;
use crate::compress::Rows;

/// The prefix of a module's tensors, if it is stored so.
pub(super) fn prefix(checkpoint: &Checkpoint, module: &str) -> Option<String> {
    [module.to_string(), format!("{module}.weight")]
        .into_iter()
        .find(|prefix| checkpoint.contains(&format!("{prefix}.bitmask")))
}

pub(super) fn read(checkpoint: &Checkpoint, prefix: &str) -> Result<Mat<f64>> {
    let name = |tensor: &str| format!("{prefix}.{tensor}");
    let shape = stored::integers(checkpoint, &name("shape"))?;
    let &[m, n] = shape.as_slice() else {
        return refuse(
            &name("shape"),
            format!("expected two numbers, found {shape:?}"),
        );
    };
    let (m, n) = (m as usize, n as usize);
    let (values, _) = stored::floats(checkpoint, &name("compressed"))?;
    let info = checkpoint.expect_shape(&name("bitmask"), &[m, n.div_ceil(8)])?;
    if info.dtype != Dtype::U8 {
        return refuse(
            &name("bitmask"),
            format!("expected uint8, found {:?}", info.dtype),
        );
    }
    let bitmask = checkpoint.bytes(&name("bitmask"))?;
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
                            &name("compressed"),
                            "holds fewer values than the bitmask has bits",
                        );
                    }
                }
            }
        }
    }
    match values.next() {
        None => Ok(Rows::new(dense, m, n).to_mat()),
        Some(_) => refuse(
            &name("compressed"),
            "holds more values than the bitmask has bits",
        ),
    }
}
