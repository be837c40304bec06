//! Settings of policies that score keys alone and evict every W steps.

use super::config::quarter;
use super::{Budget, Rule};
use serde::{Deserialize, Serialize};

/// Settings of `keydiff` and `knorm`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// First tokens kept; 4.
    pub sinks: usize,
    /// Newest tokens kept; unset: 32, a quarter of the budget where that is less.
    pub recent: Option<usize>,
    /// Steps between evictions; unset: 64, a quarter of the budget where that is less.
    pub every: Option<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sinks: 4,
            recent: None,
            every: None,
        }
    }
}

impl super::Tunable for Settings {}

impl Settings {
    /// The periods within a budget.
    pub(super) fn within(&self, budget: Budget) -> Periodic {
        Periodic::within(budget, self.sinks, (self.recent, 32), (self.every, 64))
    }
}

/// When to evict and what stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Periodic {
    /// First tokens kept.
    pub sinks: usize,
    /// Newest tokens kept.
    pub recent: usize,
    /// Steps between evictions.
    pub every: usize,
}

impl Periodic {
    /// Periods as set; what is unset is as given, or a quarter of the budget where that is less.
    pub(super) fn within(
        budget: Budget,
        sinks: usize,
        (recent, most_recent): (Option<usize>, usize),
        (every, most_every): (Option<usize>, usize),
    ) -> Self {
        Self {
            sinks,
            recent: recent.unwrap_or_else(|| quarter(budget, most_recent)),
            every: every.unwrap_or_else(|| quarter(budget, most_every)),
        }
    }

    /// The rule that says so.
    pub const fn rule(self) -> Rule {
        Rule::periodic(self.sinks, self.recent, self.every)
    }
}
