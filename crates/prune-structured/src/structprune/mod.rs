//! StructPrune (arXiv 2510.03246): budgets from the energies of layers, and a refinement that
//! alternates between a block's weights and its activations.
//!
//! The paper announces a closed-form sparsity for each layer and a softmax over layer energies; its
//! published implementation holds neither and spreads one sparsity over all layers. What is here is
//! this project's reconstruction, not the authors' code or formulas. A sublayer is one half of a
//! block, with n_l parameters in its units.
//!
//! - **Energy** E_l: the Wanda-sp scores `Σ_o |W[o,c]| · ‖x_c‖₂` of the sublayer's columns, summed,
//!   per parameter of the sublayer, and divided by the mean over sublayers, so that scales cancel.
//! - **Closed form** ([`closed_form`]): shares p_l that minimise `Σ ½ E_l p_l²` when
//!   `Σ n_l p_l` parameters go: `p_l = λ n_l / E_l`.
//! - **Softmax** ([`softmax`]): parts q_l of what goes that minimise
//!   `Σ q_l E_l + τ Σ q_l ln q_l` when `Σ q_l = 1`: `q_l = exp(−E_l/τ) / Σ exp(−E_k/τ)`, with E
//!   standardised over the sublayers. τ → ∞ takes the same number of parameters from each sublayer,
//!   τ → 0 everything from the weakest.
//! - **Bounds** ([`fill`]): a sublayer that would lose more than it may is held at its bound and
//!   the multiplier solved anew for the others, so that the budget is met.
//! - **Units** ([`keep`]): whole units by largest remainder, within half a unit of the budget.
//! - **Refinement** ([`refine()`]): see there.

mod alternate;
mod refine;
mod share;

use crate::Allocation;
pub use refine::{Refits, refine};
pub use share::{closed_form, fill, keep, softmax};

/// The closed form as `structprune` uses it.
pub const CLOSED_FORM: Allocation = Allocation::ClosedForm { max_ratio: 1.0 };
/// The softmax as `structprune-softmax` uses it.
pub const SOFTMAX: Allocation = Allocation::Softmax {
    temperature: 1.0,
    max_ratio: 1.0,
};
