#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod cells;
mod column;
pub mod compare;
mod error;
mod files;
pub mod format;
mod grid;
mod html;
mod json;
mod machine;
mod markdown;
pub mod part_file;
pub mod plot;
mod report;
mod row;
mod schema;
mod seeds;
mod shard;
mod speed;
mod stopwatch;
mod svg;
mod text;

pub use cells::Cells;
pub use column::Column;
pub use compare::Comparison;
pub use error::{Error, Result};
pub use files::prepare;
pub use grid::command_line;
pub use machine::Machine;
pub use plot::{Axis, Plot, Point, Reference, Scale, Series};
pub use report::{Figure, Report, Section};
pub use row::{Budget, DENSE, MemoryScope, Role, Row, Spread, SpreadOver};
pub use schema::SCHEMA;
pub use seeds::mean_over_seeds;
pub use speed::{ROUNDS, Rounds};
pub use stopwatch::Stopwatch;
pub use text::WIDTH;
