#![doc = include_str!("../README.md")]

mod block;
mod block_type;
mod error;
mod grid;
mod groups;
mod input;
mod kernel;
mod level;
mod linear;
mod machine;
mod matrix;
mod output;
mod quantise;
mod rows;
mod team;
mod tile;

pub use block::{Block, IQ4_NL_LEVELS};
pub use block_type::BlockType;
pub use error::{Error, Result};
pub use grid::RowGrid;
pub use groups::{GroupBits, GroupParts, Groups};
pub use level::{LEVEL_VARIABLE, Level};
pub use linear::{Activations, Context, Linear, LowRank, forward};
pub use matrix::{Kind, Matrix, SharedBytes};
pub use quantise::quantise;
pub use rows::QuantRows;
pub use team::Team;
