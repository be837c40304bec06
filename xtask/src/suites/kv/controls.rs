//! The full cache in integers, which is measured beside every policy: it holds every token in as few bytes.

use anyhow::Result;
use causal_lm::Model;
use eval_report::Section;

use super::Config;
use super::policy::{self, Choice};

/// Storage of the full caches.
const CONTROLS: [&str; 3] = ["int8", "k8v4", "int4"];

impl Config {
    /// Adds the full cache in integers before the policies, where it is not measured anyway; returns those that the model's heads do not admit.
    pub(super) fn add_controls(&mut self, model: &Model<'_>) -> Result<NotRun> {
        let (mut controls, mut refused) = (Vec::new(), Vec::new());
        for preset in CONTROLS {
            let control = Choice::full().stored_as(preset, false)?;
            let measured = (self.policies.iter().chain([&self.full]))
                .any(|choice| choice.name == control.name || choice.stores_all_as(&control));
            if measured {
                continue;
            }
            if policy::admits(model, preset)? {
                controls.push(control);
            } else {
                refused.push(preset);
            }
        }
        self.policies.splice(0..0, controls);
        Ok(NotRun(refused))
    }
}

/// Full caches that the heads of a model do not admit.
pub(super) struct NotRun(Vec<&'static str>);

impl NotRun {
    /// Says so in a section.
    pub(super) fn noted(&self, section: Section) -> Section {
        match self.0.is_empty() {
            true => section,
            false => section.fact(
                "full caches not run, because the heads do not admit them",
                self.0.join(", "),
            ),
        }
    }
}
