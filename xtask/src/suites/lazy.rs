//! What cells share and not every process needs: made when it is first asked for.

use std::cell::OnceCell;

use anyhow::Result;

/// A value that is made once.
#[derive(Debug)]
pub(super) struct Lazy<T>(OnceCell<T>);

impl<T> Default for Lazy<T> {
    fn default() -> Self {
        Self(OnceCell::new())
    }
}

impl<T> Lazy<T> {
    /// The value; the first call makes it.
    pub(super) fn get(&self, make: impl FnOnce() -> Result<T>) -> Result<&T> {
        match self.0.get() {
            Some(value) => Ok(value),
            None => {
                let value = make()?;
                Ok(self.0.get_or_init(|| value))
            }
        }
    }
}
