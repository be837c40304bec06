//! Progress bars on stderr. Where no bar can be drawn a line says once how long the rest will take.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tensor_io::Cancelled;

use crate::estimate;
use crate::settings::Settings;

impl Settings {
    /// A progress bar on stderr, or a hidden one in a quiet run.
    pub fn bar(&self, label: impl Into<String>, total: u64) -> Bar {
        if self.quiet {
            Bar::hidden()
        } else {
            Bar::new(label, total)
        }
    }

    /// Print a line on stderr where progress is shown.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet && std::io::stderr().is_terminal() {
            eprintln!("{text}");
        }
    }
}

/// A progress bar; bars of inner loops are drawn below the outer one.
///
/// Nothing is drawn when stderr is not a terminal. Dropping a bar removes it.
#[derive(Debug)]
pub struct Bar {
    group: MultiProgress,
    bar: ProgressBar,
    /// When the stage began, until its line is printed; of outer bars that are not drawn.
    untold: Mutex<Option<Instant>>,
}

impl Bar {
    /// A bar of `total` steps on stderr.
    pub fn new(label: impl Into<String>, total: u64) -> Self {
        let bar = Self::in_group(
            MultiProgress::with_draw_target(ProgressDrawTarget::stderr()),
            label.into(),
            total,
        );
        bar.restart(!std::io::stderr().is_terminal());
        bar
    }

    /// A bar that is never drawn, nor are bars nested in it.
    pub fn hidden() -> Self {
        Self::in_group(
            MultiProgress::with_draw_target(ProgressDrawTarget::hidden()),
            String::new(),
            0,
        )
    }

    /// A bar below this one, for the steps inside one of its steps.
    pub fn nested(&self, label: impl Into<String>, total: u64) -> Self {
        Self::in_group(self.group.clone(), label.into(), total)
    }

    fn in_group(group: MultiProgress, label: String, total: u64) -> Self {
        let style = ProgressStyle::with_template(
            "{msg:28!} {bar:30} {pos}/{len} {elapsed_precise} (eta {eta})",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = group.add(
            ProgressBar::new(total)
                .with_style(style)
                .with_message(label),
        );
        Bar {
            group,
            bar,
            untold: Mutex::default(),
        }
    }

    /// `n` more steps are done.
    pub fn inc(&self, n: u64) {
        self.bar.inc(n);
        self.tell();
    }

    /// `done` of `total` steps are done.
    pub fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.tell();
    }

    /// Begins to measure the rate, where a line is to be printed.
    fn restart(&self, tells: bool) {
        let mut untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner);
        *untold = tells.then(Instant::now);
    }

    /// Prints once what is left, as soon as the rate tells.
    fn tell(&self) {
        let mut untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(started) = *untold else { return };
        let elapsed = started.elapsed().as_secs_f64();
        let total = self.bar.length().unwrap_or_default();
        if let Some(left) = estimate::left(elapsed, self.bar.position(), total) {
            eprintln!("{}: {left} left", self.bar.message());
            *untold = None;
        }
    }

    /// Change the label.
    pub fn set_label(&self, label: impl Into<String>) {
        self.bar.set_message(label.into());
    }

    /// Remove the bar.
    pub fn finish(self) {}
}

impl tensor_io::Progress for Bar {
    fn begin(&self, _stage: &str, steps: u64) {
        self.bar.set_length(steps);
        self.bar.set_position(0);
        // A stage of its own has a rate of its own, and a line unless the bar has had one.
        let tells = self.untold.lock().is_ok_and(|untold| untold.is_some());
        self.restart(tells);
    }

    fn advance(&self, steps: u64) -> Result<(), Cancelled> {
        self.inc(steps);
        Ok(())
    }

    fn message(&self, text: &str) {
        self.set_label(text);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        self.group.remove(&self.bar);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_bars_of_a_hidden_bar_are_hidden_and_count() {
        let outer = Bar::hidden();
        let inner = outer.nested("windows", 3);
        assert!(outer.untold.lock().unwrap().is_none() && inner.untold.lock().unwrap().is_none());
        inner.inc(2);
        assert!(inner.bar.is_hidden());
        assert_eq!((inner.bar.position(), inner.bar.length()), (2, Some(3)));
        inner.finish();
    }

    #[test]
    fn a_finished_bar_leaves_the_group() {
        let outer = Bar::hidden();
        let bar = {
            let inner = outer.nested("windows", 3);
            inner.bar.clone()
        };
        assert!(bar.is_finished());
    }
}
