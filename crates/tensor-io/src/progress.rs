//! Progress of long calls, and how to cancel them.
//!
//! Every call that may run for seconds takes a [`Progress`]: it announces how many steps a stage has, reports steps
//! as they are done, and stops with [`Cancelled`] where the caller asks for it. Work that was saved before can be
//! resumed.

/// What a long call reports to. Calls come from any thread; a stage that runs in parallel reports from several.
pub trait Progress: Sync {
    /// A stage of `steps` steps begins, and the one before it ends. `stage` names it for people.
    fn begin(&self, stage: &str, steps: u64) {
        let _ = (stage, steps);
    }

    /// `steps` more steps of the stage are done.
    ///
    /// # Errors
    /// [`Cancelled`] to stop the call, which returns it inside its own error.
    fn advance(&self, steps: u64) -> Result<(), Cancelled>;

    /// What is being done now, such as the loss of the block that was finished.
    fn message(&self, text: &str) {
        let _ = text;
    }
}

/// A long call was cancelled by its [`Progress`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

/// Reports to nobody and never cancels.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn advance(&self, _steps: u64) -> Result<(), Cancelled> {
        Ok(())
    }
}

/// A closure is told the steps done and may cancel.
impl<F: Fn(u64) -> Result<(), Cancelled> + Sync> Progress for F {
    fn advance(&self, steps: u64) -> Result<(), Cancelled> {
        self(steps)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn work(progress: &dyn Progress) -> Result<u64, Cancelled> {
        progress.begin("work", 5);
        for step in 0..5 {
            progress.advance(1)?;
            progress.message(&step.to_string());
        }
        Ok(5)
    }

    #[test]
    fn a_closure_counts_steps_and_cancels() {
        assert_eq!(work(&NoProgress), Ok(5));
        let done = AtomicU64::new(0);
        let stop_at_three = |steps| match done.fetch_add(steps, Ordering::Relaxed) + steps {
            3 => Err(Cancelled),
            _ => Ok(()),
        };
        assert_eq!(work(&stop_at_three), Err(Cancelled));
        assert_eq!(done.into_inner(), 3);
    }
}
