//! Labels of the steps of recorded clips, as files hold them.

use crate::error::{Error, Result};
use std::path::Path;

/// A label that is not counted.
const NOT_COUNTED: f32 = 255.0;

/// Labels `[clips, steps]` of a file: 1 yes, 0 no, 255 not counted (`None`).
///
/// # Errors
/// [`Error::Data`] with the first label that is none of these.
pub(crate) fn step_labels(values: &[f32], steps: usize, file: &Path) -> Result<Vec<Option<bool>>> {
    let label = |(at, &value): (usize, &f32)| {
        if value == NOT_COUNTED {
            Ok(None)
        } else if value == 0.0 || value == 1.0 {
            Ok(Some(value == 1.0))
        } else {
            Err(Error::Data {
                file: file.into(),
                reason: format!(
                    "labels: {value} in clip {}, step {}; 0, 1 and {NOT_COUNTED} are expected",
                    at / steps,
                    at % steps
                ),
            })
        }
    };
    values.iter().enumerate().map(label).collect()
}
