//! Progress bars on stderr.

use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tensor_io::Cancelled;

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
}

impl Bar {
    /// A bar of `total` steps on stderr.
    pub fn new(label: impl Into<String>, total: u64) -> Self {
        Self::in_group(
            MultiProgress::with_draw_target(ProgressDrawTarget::stderr()),
            label.into(),
            total,
        )
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
        Bar { group, bar }
    }

    /// `n` more steps are done.
    pub fn inc(&self, n: u64) {
        self.bar.inc(n);
    }

    /// `done` of `total` steps are done.
    pub fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
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
