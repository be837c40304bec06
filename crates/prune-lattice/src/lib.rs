//! Pruning of recurrent networks by order, with controls.

pub mod cell;
pub mod centrality;
pub mod data;
mod error;
pub mod experiment;
pub mod graph;
pub mod influence;
pub mod io;
pub mod layout;
pub mod mask;
pub mod order;
pub mod params;
pub mod prune;
pub mod rnn;
mod seed;
pub mod tasks;

pub use cell::{Cell, GateLayout};
pub use error::{Error, Result};
