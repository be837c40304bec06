#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod baselines;
mod bytes;
mod cache;
mod choose;
mod curves;
mod divide;
mod driver;
mod error;
mod experts;
mod inputs;
mod make;
mod matrix;
mod measure;
mod measuring;
mod menu;
mod options;
mod plan;
mod refine;
mod rounds;
mod site;
mod target;
mod timing;
mod treatment;
mod write;

pub use baselines::Baseline;
pub use cache::{CACHE_FORMATS, Cache, CacheFormat, allocated};
pub use candle_core;
pub use causal_lm;
pub use curves::{Check, Curve, Point, spearman};
pub use driver::{Data, Frontier, Prepared};
pub use error::{Error, Result};
pub use kv_lazy;
pub use lowrank_eora;
pub use measure::Divergence;
pub use options::Options;
pub use plan::{Plan, Round, SitePlan, Summary};
pub use prune_structured;
pub use site::Site;
pub use target::{TARGETS, Target};
pub use treatment::{Format, Treatment};
pub use write::{Files, Written};
