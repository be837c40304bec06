//! The texts of a search.

use causal_lm::Windows;

/// Text of a search.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// Windows that sublayers are refitted on.
    pub calibration: &'a Windows,
    /// Windows that candidates are compared on: best others than those that they are refitted on.
    pub search: &'a Windows,
}
