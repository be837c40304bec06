//! The oracle on the tasks: what a cache within the budget could answer if it knew which tokens will be attended.
//!
//! Each sequence is first run through the full cache; the attention recorded there is the future that the oracle then sees, to the
//! end of the sequence. Once it has lost something, the attention of the model that it serves may differ.

use std::sync::Arc;

use anyhow::Result;
use causal_lm::{CacheSet, Model};
use kv_lazy::policy::oracle::Oracle;
use kv_lazy::policy::{Budget, Needs, Phase, Place, Policy, Protect, Rule};
use kv_lazy::trace::replay::FutureAttention;
use kv_lazy::trace::{Trace, TraceMeta};
use kv_lazy::{CacheConfig, StorageConfig};

use super::Sample;
use crate::suites::kv::{policy, recording};

/// Records every sequence's attention under the full cache.
pub(super) fn record(model: &Model<'_>, samples: &[Sample], prompt: usize) -> Result<Vec<Trace>> {
    let one = |sample: &Sample| -> Result<Trace> {
        let recorder = recording::record(model, model.full_cache(1)?, &sample.tokens)?;
        let meta = TraceMeta::new("recall", prompt, 1.0);
        Ok(recorder.into_trace(meta, sample.tokens.clone())?)
    };
    samples.iter().map(one).collect()
}

/// Caches that evict what `traces`, one a sequence, attend least.
pub(super) fn caches(
    model: &Model<'_>,
    config: &CacheConfig,
    traces: &Arc<Vec<Trace>>,
) -> Result<CacheSet> {
    let (dtype, device) = (model.decoder().dtype(), model.decoder().device());
    let oracle = |layer| -> kv_lazy::Result<(Box<dyn Policy>, Budget, StorageConfig)> {
        let budget = config.layer_budget(layer)?;
        let policy = TraceOracle {
            traces: traces.clone(),
            window: policy::lag(budget.tokens(0)),
            oracle: None,
        };
        let policy = Protect::new(policy, config.sinks, config.recent, config.prompt);
        Ok((Box::new(policy), budget, *config.storage_of(layer)?))
    };
    let shapes = model.cache_shapes();
    Ok(CacheSet::with_policies_and_storage(
        &shapes,
        traces.len(),
        dtype,
        device,
        oracle,
    )?)
}

/// An oracle over the trace of its sequence.
#[derive(Debug, Clone)]
struct TraceOracle {
    traces: Arc<Vec<Trace>>,
    window: usize,
    oracle: Option<Oracle>,
}

impl Policy for TraceOracle {
    fn name(&self) -> &'static str {
        "oracle"
    }
    fn needs(&self) -> Needs {
        // The trace holds all heads of a layer.
        Needs::NOTHING.for_all_heads()
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            recent: 0,
            ..Rule::every(self.window)
        }
    }
    fn start(&mut self, place: Place) {
        let trace = &self.traces[place.sequence];
        let layer = trace.layers.get(&place.layer);
        self.oracle = layer.map(|layer| {
            let future = FutureAttention::new(layer.clone(), trace.meta.scale);
            Oracle::new(self.window, trace.tokens.len(), Arc::new(future))
        });
    }
    fn inner(&self) -> Option<&dyn Policy> {
        self.oracle.as_ref().map(|oracle| oracle as &dyn Policy)
    }
    fn inner_mut(&mut self) -> Option<&mut dyn Policy> {
        self.oracle.as_mut().map(|oracle| oracle as &mut dyn Policy)
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
