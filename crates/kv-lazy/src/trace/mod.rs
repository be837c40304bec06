//! Traces: the queries, keys and values of a run, kept to replay any policy on them.

mod record;

pub use record::Recorder;
