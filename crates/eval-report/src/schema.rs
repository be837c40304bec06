//! The layout of `report.json`.

/// Version of the layout of `report.json`.
pub const SCHEMA: u32 = 1;
