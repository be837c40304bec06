#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod check;
mod cholesky;
mod eigen;
mod error;
mod parallel;
mod product;
mod qr;
mod svd;
#[cfg(test)]
mod testing;
mod triangular;

pub use check::check_finite;
pub use cholesky::{Cholesky, cholesky_in_place};
pub use eigen::{Eigen, eigen};
pub use error::{Error, Result};
pub use faer;
pub use product::{Entries, add_product, add_product_f32, dot, mirror_lower, product};
pub use qr::Qr;
pub use svd::{LeftSingular, Vectors, left_singular, singular_values};
pub use triangular::{invert_lower, solve_lower, solve_upper};
