//! One layer's pass: statistics of its experts, and what they read.

use super::statistics::LayerStatistics;
use candle_core::{DType, Device, Tensor};
use causal_lm::mixture::Routing;
use causal_lm::{ExpertPass, Routed, Site, Tap, TapResult};

/// Collects what methods read of a layer.
#[derive(Default)]
pub(crate) struct Collector {
    pub(crate) statistics: LayerStatistics,
    /// What router and experts read, batch by batch.
    pub(crate) inputs: Vec<Tensor>,
    pub(crate) routings: Vec<Routing>,
}

impl Tap for Collector {
    fn observe(&mut self, _layer: usize, _site: Site, _x: &Tensor) -> TapResult {
        Ok(())
    }

    fn routed(&mut self, _layer: usize, routed: &Routed<'_>) -> TapResult {
        let experts = routed.routings.first().map_or(0, |r| r.experts);
        self.statistics = LayerStatistics::new(experts);
        for routing in routed.routings {
            self.statistics.add_routing(routing);
        }
        self.inputs = routed.inputs.to_vec();
        self.routings = routed.routings.to_vec();
        Ok(())
    }

    fn expert(&mut self, _layer: usize, pass: &ExpertPass) -> TapResult {
        let Some(expert) = pass.expert else {
            return Ok(());
        };
        let (rows, width) = (&pass.output, pass.output.dim(1)?);
        let rows = rows.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let rows: Vec<f32> = rows.flatten_all()?.to_vec1()?;
        self.statistics.experts[expert].add(&pass.gates, &rows, width);
        Ok(())
    }
}
