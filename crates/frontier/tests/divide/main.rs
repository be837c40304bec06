//! A model measured, divided, written and opened again, as a user does it.

mod common;
mod dense;
mod experts;
