//! Random graphs as controls, and the graph properties that arXiv 2407.20601 relates to accuracy.

mod generate;
mod paths;
mod properties;

pub use generate::{Graph, barabasi_albert, erdos_renyi, watts_strogatz};
pub(crate) use paths::brandes;
pub use properties::{GraphProperties, Moments, PROPERTIES_LIMIT, layers};
