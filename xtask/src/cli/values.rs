//! Values of flags that several commands take.

use std::num::NonZeroUsize;
use std::str::FromStr;

/// A number of things, at least one.
pub(super) fn positive(text: &str) -> Result<NonZeroUsize, String> {
    counted(text)
}

/// A number that is not 0, of any width.
pub(super) fn counted<T: FromStr>(text: &str) -> Result<T, String> {
    let number = text.parse();
    number.map_err(|_| "expected a whole number, at least 1".into())
}

/// A number of tokens, of which the first is never a target.
pub(super) fn window(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(tokens) if tokens >= 2 => Ok(tokens),
        _ => Err("expected a number of tokens, at least 2 (the first is never a target)".into()),
    }
}

/// A fraction, at least 0 and below 1.
pub(super) fn ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..1.0).contains(&share) => Ok(share),
        _ => Err("expected a fraction, at least 0 and below 1".into()),
    }
}
