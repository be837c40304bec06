//! StructPrune (arXiv 2510.03246): budgets from the energies of layers, and a refinement that
//! alternates between a block's weights and its activations. The allocations are in [`crate::allocation`].
//!
//! The paper announces a closed-form sparsity for each layer and a softmax over layer energies; its
//! published implementation holds neither and spreads one sparsity over all layers. What is here is
//! this project's reconstruction, not the authors' code or formulas. A sublayer is one half of a
//! block, with n_l parameters in its units.
//!
//! - **Energy** E_l: the Wanda-sp scores `Σ_o |W[o,c]| · ‖x_c‖₂` of the sublayer's columns, summed,
//!   per parameter of the sublayer, and divided by the mean over sublayers, so that scales cancel.
//! - **Closed form** ([`ClosedForm`](crate::allocation::ClosedForm)): shares p_l that minimise `Σ ½ E_l p_l²` when
//!   `Σ n_l p_l` parameters are removed: `p_l = λ n_l / E_l`.
//! - **Softmax** ([`Softmax`](crate::allocation::Softmax)): parts q_l of what is removed that minimise
//!   `Σ q_l E_l + τ Σ q_l ln q_l` when `Σ q_l = 1`: `q_l = exp(−E_l/τ) / Σ exp(−E_k/τ)`, with E
//!   standardised over the sublayers. τ → ∞ takes the same number of parameters from each sublayer,
//!   τ → 0 everything from the weakest.
//! - **Bounds**: a sublayer that would lose more than it may is held at its bound and the multiplier is solved anew for
//!   the others, so that the budget is met.
//! - **Units**: whole units by largest remainder, within half a unit of the budget.
//! - **Refinement** ([`refine()`]): see there.

mod alternate;
mod refine;

pub use refine::refine;
