//! Importance of a token from its inactive steps d = t − TS and its maximum recurrence interval (MRI).
//!
//! | | H1 | H2 (0 for MRI = 0) |
//! |---|---|---|
//! | paper | 2σ(−d / MRI) | 2σ(−(MRI − 1)) |
//! | reference | 2 / (1 + exp(1 + d / (MRI + 1e-5))) | the same |
//!
//! A token never active since birth (MRI = 0) has H1 = 1 in its very step and 0 after it. H1 is 0 in f32 once d / MRI passes
//! about 100, so ties are common and are broken by TS, then by position.

use super::Mode;
use serde::{Deserialize, Serialize};

/// How H1 and H2 combine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combine {
    /// H1 + H2, as in the paper.
    #[default]
    Sum,
    /// H1 alone.
    H1Only,
    /// H1 · H2.
    Product,
    /// H1 · (1 + H2): the prior counts as far as the token is still inside its interval.
    Gated,
}

/// The importance function.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Importance {
    /// H1 of the reference code.
    pub reference_h1: bool,
    /// H1 and H2 together.
    pub combine: Combine,
    /// Smallest MRI that earns H2: 1 in paper and reference code.
    pub h2_min_mri: u32,
}

impl Importance {
    /// A mode's importance.
    pub fn of(mode: Mode) -> Self {
        Self {
            reference_h1: mode == Mode::Reference,
            combine: match mode {
                Mode::Paper | Mode::Reference => Combine::Sum,
                Mode::Guarded => Combine::Gated,
            },
            h2_min_mri: 1,
        }
    }

    /// Importance of a token inactive for `inactive` steps.
    pub fn of_token(&self, inactive: u32, mri: u32) -> f32 {
        /// What the reference code adds to MRI against division by zero.
        const EPSILON: f32 = 1e-5;
        let (d, m) = (inactive as f32, mri as f32);
        let h1 = if self.reference_h1 {
            2.0 / (1.0 + (1.0 + d / (m + EPSILON)).exp())
        } else if mri == 0 {
            if inactive == 0 { 1.0 } else { 0.0 }
        } else {
            2.0 / (1.0 + (d / m).exp())
        };
        let h2 = if mri == 0 || mri < self.h2_min_mri {
            0.0
        } else {
            2.0 / (1.0 + (m - 1.0).exp())
        };
        match self.combine {
            Combine::Sum => h1 + h2,
            Combine::H1Only => h1,
            Combine::Product => h1 * h2,
            Combine::Gated => h1 * (1.0 + h2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2σ(−x).
    fn twice(x: f64) -> f64 {
        2.0 / (1.0 + x.exp())
    }

    fn check(mode: Mode, table: &[(u32, u32, f64)]) {
        let importance = Importance::of(mode);
        for &(mri, d, want) in table {
            let got = f64::from(importance.of_token(d, mri));
            assert!(
                (got - want).abs() < 1e-4,
                "{mode:?} MRI {mri} d {d}: {got} {want}"
            );
        }
    }

    /// Computed by hand from the formulas, to four places.
    #[test]
    fn paper_mode_equals_a_hand_computed_table() {
        check(
            Mode::Paper,
            &[
                (0, 0, 1.0),
                (0, 1, 0.0),
                (1, 0, 2.0),
                (1, 1, 1.5379),
                (1, 10, 1.0001),
                (1, 1000, 1.0),
                (2, 0, 1.5379),
                (2, 1, 1.2930),
                (2, 10, 0.5513),
                (2, 1000, 0.5379),
                (5, 0, 1.0360),
                (5, 1, 0.9363),
                (5, 10, 0.2744),
                (5, 1000, 0.0360),
                (50, 0, 1.0),
                (50, 1, 0.9900),
                (50, 10, 0.9003),
                (50, 1000, 0.0),
            ],
        );
    }

    #[test]
    fn reference_mode_equals_a_hand_computed_table() {
        check(
            Mode::Reference,
            &[
                (0, 0, 0.5379),
                (0, 1, 0.0),
                (1, 0, 1.5379),
                (1, 1, 1.2384),
                (1, 1000, 1.0),
                (2, 0, 1.0758),
                (2, 10, 0.5428),
                (5, 0, 0.5739),
                (50, 0, 0.5379),
                (50, 10, 0.4630),
                (50, 1000, 0.0),
            ],
        );
        assert!((twice(1.2) - 0.4630).abs() < 1e-4);
    }

    /// Refusing H2 to tokens of MRI 1 would avoid the trap too, and put a token that is attended at every step behind one that is attended at every
    /// other.
    #[test]
    fn guarded_ranks_steady_tokens_above_recurring_and_recurring_above_stale() {
        let importance = Importance::of(Mode::Guarded);
        let ranked = [
            (0, 1),
            (0, 2),
            (1, 1),
            (10, 50),
            (100, 50),
            (50, 2),
            (1000, 1),
        ];
        let scores = ranked.map(|(inactive, mri)| importance.of_token(inactive, mri));
        assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    }

    /// A stale token of MRI 1 outranks a live recurring one in paper and reference code, and no longer when guarded.
    #[test]
    fn the_trap_of_mri_one_is_there_and_guarded_avoids_it() {
        for (mode, trapped) in [
            (Mode::Paper, true),
            (Mode::Reference, true),
            (Mode::Guarded, false),
        ] {
            let importance = Importance::of(mode);
            let stale = importance.of_token(1000, 1);
            let recurring = importance.of_token(10, 50);
            assert_eq!(stale > recurring, trapped, "{mode:?}: {stale} {recurring}");
        }
    }
}
