//! The inputs of a block's linears, and which of them are summed up as H.
//!
//! H of an input of n channels takes n² numbers. Where n is large beside what its linears put out
//! (down_proj), H can be spared: with D known before the tokens, G = Σ (D x)(D x)ᵀ finds the best
//! correction, and losses are summed up from the tokens in a further pass.

use super::sites::{SITES, linears_at, site_index};
use super::stream::{Held, How, Sums, TeacherGram, View};
use crate::solve::Weighting;
use crate::stats::{
    Accumulation, Collect, EnergyCollector, Gram, GramCollector, InputCollector, InputStats,
};
use crate::{Error, Result};
use causal_lm::{Block, Linear, Site};

/// Whether an input of `inputs` channels is so wide for linears with so many `outputs` together that
/// it takes less without H: three errors E of `outputs × inputs` in f32, for the losses, instead of
/// `inputs²` in f64.
fn is_wide(outputs: usize, inputs: usize) -> bool {
    3 * outputs < 2 * inputs
}

/// The inputs of a block that are to be seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Sites {
    /// Those with H.
    pub(super) whole: Vec<Site>,
    /// Those without.
    pub(super) streamed: Vec<Site>,
}

impl Sites {
    /// Of `sites` those that the block has, streamed where they are wide and `may_stream`.
    pub(super) fn of(block: &Block, sites: &[Site], may_stream: bool) -> Self {
        let mut all = Self::default();
        for &site in sites {
            let linears = linears_at(site).iter();
            let linears: Vec<&Linear> = linears.filter_map(|&name| block.linear(name)).collect();
            let Some(inputs) = linears.first().map(|linear| linear.inputs()) else {
                continue;
            };
            let outputs = linears.iter().map(|linear| linear.outputs()).sum();
            match may_stream && is_wide(outputs, inputs) {
                true => all.streamed.push(site),
                false => all.whole.push(site),
            }
        }
        all
    }
}

impl How {
    /// Whether losses of these tokens can do without H.
    pub(super) fn may_stream(&self) -> bool {
        !self.cross && !self.teacher && self.accumulation == Accumulation::Sum
    }
}

/// What is known of one input.
#[derive(Debug)]
pub(super) struct Statistics {
    /// Of what the linears are fed.
    pub(super) inputs: InputStats,
    /// H of what the dense model feeds them.
    pub(super) teacher: Option<Gram>,
}

impl Statistics {
    /// H.
    pub(super) fn gram(&self) -> Result<Weighting<'_>> {
        let gram = self.inputs.gram.as_ref().ok_or(Error::MissingStatistic {
            method: "a loss",
            statistic: "H",
        })?;
        Ok(Weighting::Gram(gram.matrix()))
    }
}

/// Statistics by place in [`SITES`]; `None` where none were collected.
pub(super) type SiteStats = [Option<Statistics>; SITES.len()];

/// Sums of the inputs of a block while they are collected.
pub(super) struct Collectors {
    sites: Vec<(Site, InputCollector, Option<TeacherGram>)>,
}

impl Collectors {
    /// H and what `how` asks for of the whole inputs, channel sums alone of the streamed ones.
    pub(super) fn new(block: &Block, sites: &Sites, how: &How) -> Result<Self> {
        let whole = sites.whole.iter().map(|&site| (site, true));
        let streamed = sites.streamed.iter().map(|&site| (site, false));
        let mut collectors = Vec::new();
        for (site, gram) in whole.chain(streamed) {
            let width = super::sites::width(block, site).unwrap_or(0);
            let collect = Collect {
                gram,
                cross: gram && how.cross,
            };
            let sums = InputCollector::new(width, collect, how.accumulation)?;
            let teacher = match gram && how.teacher {
                true => Some(TeacherGram(GramCollector::new(width, how.accumulation)?)),
                false => None,
            };
            collectors.push((site, sums, teacher));
        }
        Ok(Self { sites: collectors })
    }

    /// The sums that a pass is to fill.
    pub(super) fn sums(&mut self) -> Sums<'_> {
        let mut all: Sums<'_> = Vec::new();
        for (site, sums, teacher) in &mut self.sites {
            all.push((*site, sums));
            if let Some(teacher) = teacher {
                all.push((*site, teacher));
            }
        }
        all
    }

    /// What was collected.
    pub(super) fn finish(self) -> SiteStats {
        let mut all = [const { None }; SITES.len()];
        for (site, sums, teacher) in self.sites {
            all[site_index(site)] = Some(Statistics {
                inputs: sums.finish(),
                teacher: teacher.map(|TeacherGram(gram)| gram.finish()),
            });
        }
        all
    }
}

/// Σ ‖E x‖² of the errors of several linears, in one pass together with other sums.
pub(super) fn energies(
    view: View<'_>,
    mut errors: Vec<(Site, Vec<EnergyCollector>)>,
    mut others: Collectors,
) -> Result<(Vec<Vec<f64>>, SiteStats, Held)> {
    let mut sums = others.sums();
    for (site, errors) in &mut errors {
        for error in errors {
            sums.push((*site, error));
        }
    }
    let held = view.pass(sums)?;
    let energies = errors.into_iter().map(|(_, errors)| {
        let energies = errors.into_iter().map(EnergyCollector::finish);
        energies.collect()
    });
    Ok((energies.collect(), others.finish(), held))
}

#[cfg(test)]
mod tests {
    use super::*;
    use faer::Mat;

    #[test]
    fn a_wide_input_takes_fewer_bytes_without_its_h() {
        for (outputs, inputs) in [(40, 140), (40, 61), (40, 40), (20, 29), (8, 13), (12, 17)] {
            let error = Mat::zeros(outputs, inputs);
            let errors = EnergyCollector::new(error.as_ref()).expect("finite");
            let h = GramCollector::new(inputs, Accumulation::Sum).expect("valid");
            assert_eq!(
                is_wide(outputs, inputs),
                3 * errors.bytes() < h.bytes(),
                "{outputs} × {inputs}"
            );
        }
    }
}
