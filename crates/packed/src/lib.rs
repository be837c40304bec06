#![doc = include_str!("../README.md")]

mod block;
mod block_type;
mod error;
mod grid;
mod quantise;
mod rows;

pub use block::{Block, IQ4_NL_LEVELS};
pub use block_type::BlockType;
pub use error::{Error, Result};
pub use grid::RowGrid;
pub use quantise::quantise;
pub use rows::QuantRows;
