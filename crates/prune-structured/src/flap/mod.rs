//! FLAP (arXiv 2312.11983): a column whose input hardly fluctuates is nearly a constant, and a
//! constant can be folded into a bias.
//!
//! The score WIFV ([`crate::Score::Wifv`]) is the variance of an input feature times the squared
//! norm of its weight column; AL-AM ([`crate::Allocation::AlAm`]) standardises it within each
//! sublayer and removes what is lowest anywhere in the model; the removed columns' mean
//! contribution becomes a bias ([`crate::Compensation::Bias`]).
//!
//! The published implementation departs from the paper in ways that change which units go;
//! [`compat`] reproduces it.

pub mod compat;
