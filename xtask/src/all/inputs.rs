//! What all suites run on.

use std::path::PathBuf;

use crate::suites::perplexity;

/// A model with texts.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Model and text to evaluate on.
    pub text: perplexity::Config,
    /// Text to calibrate on.
    pub calib: PathBuf,
}
