//! The repair of one block.

use super::inputs::{Collectors, Sites, Statistics, energies};
use super::measure::{Measured, errors};
use super::sites::{SITES, modules_at, site_index, site_of};
use super::state::RepairedLayer;
use super::stream::{Stream, View};
use super::{LayerId, LayerReport, Repair, Requantised, Source, WithinBlock};
use crate::compress::{Needs, Place};
use crate::matrix::{from_tensor, to_tensor};
use crate::stats::{Accumulation, Collect, EnergyCollector, InputCollector, OutputCollector};
use crate::{Error, Result};
use candle_core::{DType, Device};
use causal_lm::{Block, Decoder, Site};
use faer::Mat;
use std::time::Instant;
use tensor_io::Progress;

/// All that the repair of any block needs.
pub(super) struct BlockRepair<'a> {
    pub(super) decoder: &'a Decoder<'a>,
    pub(super) source: &'a dyn Source,
    pub(super) repair: &'a Repair,
    pub(super) progress: &'a dyn Progress,
}

/// A linear that is compressed before its inputs are summed up.
struct Early {
    site: Site,
    layer: RepairedLayer,
    /// G, where the method needs it.
    output: Option<OutputCollector>,
}

impl BlockRepair<'_> {
    /// The linears of a block, compressed and repaired.
    pub(super) fn run(
        &self,
        dense: &Block,
        calibration: &Stream,
        held_out: Option<&Stream>,
    ) -> Result<Vec<RepairedLayer>> {
        const ALL: &[Site] = &[Site::Qkv, Site::O, Site::GateUp, Site::Down];
        let steps: Vec<&[Site]> = match self.repair.within_block {
            WithinBlock::Original => vec![ALL],
            WithinBlock::Sequential => ALL.chunks(1).collect(),
        };
        let mut current = dense.clone();
        let mut layers = Vec::new();
        for sites in steps {
            let block = &current.clone();
            let view = |stream| View {
                stream,
                dense,
                block,
            };
            let start = Instant::now();
            let mut repaired = self.repair(view(calibration), sites)?;
            if let Some(held_out) = held_out {
                let view = view(held_out);
                let sites = Sites::of(dense, sites, view.stream.how.may_stream());
                self.measure(view, &sites, &mut repaired, |report, measured| {
                    report.held_out = Some(measured.energy);
                    report.held_out_drift = measured.drift;
                    if let Some(requantised) = &mut report.requantised {
                        requantised.held_out = measured.requantised;
                    }
                })?;
            }
            let seconds = |layer: &RepairedLayer| {
                let seconds = layer.report.seconds;
                seconds.compress + seconds.solve
            };
            let rest = start.elapsed().as_secs_f64() - repaired.iter().map(seconds).sum::<f64>();
            let share = rest.max(0.0) / repaired.len().max(1) as f64;
            for layer in &mut repaired {
                layer.report.seconds.collect = share;
                self.replace(&mut current, layer)?;
            }
            layers.extend(repaired);
        }
        Ok(layers)
    }

    /// The dense block with some of its linears repaired.
    pub(super) fn repaired(&self, dense: &Block, layers: &[RepairedLayer]) -> Result<Block> {
        let mut block = dense.clone();
        for layer in layers {
            self.replace(&mut block, layer)?;
        }
        Ok(block)
    }

    fn replace(&self, block: &mut Block, layer: &RepairedLayer) -> Result<()> {
        let merged = layer.merged()?;
        let weight = to_tensor(merged.as_ref(), self.decoder.dtype(), self.decoder.device())?;
        let module = layer.report.layer.module();
        Ok(self.decoder.replace(block, module, &weight)?)
    }

    /// W.
    pub(super) fn weight(&self, id: LayerId) -> Result<(Mat<f64>, DType)> {
        let checkpoint = self.decoder.checkpoint();
        let name = id.weight();
        let dtype = checkpoint.info(&name)?.candle_dtype();
        let tensor = checkpoint.tensor_as(&name, DType::F64, &Device::Cpu)?;
        let weight = from_tensor(&tensor, "weight")?;
        checkpoint.release([name.as_str()]);
        Ok((weight, dtype.unwrap_or(DType::F32)))
    }

    /// Where a linear is in the model.
    pub(super) fn place(&self, id: LayerId) -> Place {
        super::place(self.decoder, id)
    }

    /// The stored linears of a block that read an input.
    fn layers(&self, block: &Block, site: Site) -> Vec<LayerId> {
        let (config, layer) = (self.decoder.config(), block.layer);
        modules_at(config, site)
            .filter(|module| config.module_shape(layer, module).is_some())
            .map(|module| LayerId::new(config, layer, module))
            .collect()
    }

    /// What compressing and requantising ask of the inputs.
    fn needs(&self) -> Needs {
        let requantise = self.repair.requantise.map(|compressor| compressor.needs());
        self.source
            .needs()
            .max(requantise.unwrap_or(Needs::Nothing))
    }

    /// The linears that read some inputs, with their losses on the windows that they are fitted to.
    fn repair(&self, view: View<'_>, sites: &[Site]) -> Result<Vec<RepairedLayer>> {
        let how = &view.stream.how;
        let may_stream = how.may_stream() && self.needs() < Needs::Gram;
        let sites = Sites::of(view.dense, sites, may_stream);
        let mut early = self.compress_streamed(view, &sites)?;

        let mut collectors = Collectors::new(view.dense, &sites, how)?;
        let mut sums = collectors.sums();
        for Early { site, output, .. } in &mut early {
            if let Some(output) = output {
                sums.push((*site, output));
            }
        }
        let held = view.pass(sums)?;
        let statistics = collectors.finish();

        let mut early = early.into_iter();
        let mut layers = Vec::new();
        for (index, site) in SITES.into_iter().enumerate() {
            let Some(statistics) = &statistics[index] else {
                continue;
            };
            for id in self.layers(view.dense, site) {
                self.progress.advance(0)?;
                let mut layer = match sites.streamed.contains(&site) {
                    false => self.whole(id, statistics),
                    true => match early.next() {
                        Some(early) => self.streamed(view, early, statistics),
                        None => continue,
                    },
                }
                .map_err(|source| in_layer(id, source))?;
                layer.report.statistics_bytes = held[index];
                let sums = &statistics.inputs.diagonal;
                (layer.mean_square, layer.report.tokens) = (sums.mean_square(), sums.tokens);
                layers.push(layer);
            }
        }
        let streamed = Sites {
            whole: Vec::new(),
            ..sites
        };
        self.measure(view, &streamed, &mut layers, calibrated)?;
        Ok(layers)
    }

    /// Compresses the linears of streamed inputs.
    fn compress_streamed(&self, view: View<'_>, sites: &Sites) -> Result<Vec<Early>> {
        let mut known = Vec::new();
        for &site in &sites.streamed {
            let width = super::sites::width(view.dense, site).unwrap_or(0);
            let sums = InputCollector::new(width, Collect::default(), Accumulation::Sum)?;
            known.push((site, sums));
        }
        if self.source.needs() > Needs::Nothing {
            let sums = known.iter_mut();
            view.pass(sums.map(|(site, sums)| (*site, sums as _)).collect())?;
        }
        let mut all = Vec::new();
        for (site, sums) in known {
            let inputs = sums.finish();
            for id in self.layers(view.dense, site) {
                let compress = || -> Result<Early> {
                    let (layer, weight, compressed) = self.compressed(id, &inputs)?;
                    let d = &weight - &compressed;
                    let output = match self.needs_output(id, &d) {
                        true => Some(OutputCollector::new(d.as_ref())?),
                        false => None,
                    };
                    Ok(Early {
                        site,
                        layer,
                        output,
                    })
                };
                all.push(compress().map_err(|source| in_layer(id, source))?);
            }
        }
        Ok(all)
    }

    /// A linear by the H of its inputs.
    fn whole(&self, id: LayerId, statistics: &Statistics) -> Result<RepairedLayer> {
        let (mut layer, weight, compressed) = self.compressed(id, &statistics.inputs)?;
        let start = Instant::now();
        self.correct(&mut layer, (&weight, &compressed), statistics, None)?;
        let errors = errors(weight, compressed, &layer)?;
        let measured = Measured::by_gram(&layer, &errors, statistics)?;
        calibrated(&mut layer.report, measured);
        layer.report.seconds.solve = start.elapsed().as_secs_f64();
        Ok(layer)
    }

    /// A linear without H.
    fn streamed(
        &self,
        view: View<'_>,
        early: Early,
        statistics: &Statistics,
    ) -> Result<RepairedLayer> {
        let Early {
            site,
            mut layer,
            output,
        } = early;
        let start = Instant::now();
        let output = output.map(OutputCollector::finish);
        let (weight, _) = self.weight(layer.report.layer)?;
        let compressed = layer.weight.matrix()?;
        let streamed = Some((view, site, output.as_ref()));
        self.correct(&mut layer, (&weight, &compressed), statistics, streamed)?;
        layer.report.seconds.solve = start.elapsed().as_secs_f64();
        Ok(layer)
    }

    /// Measures what is left of the errors of linears at some sites, and enters it into their
    /// reports.
    fn measure(
        &self,
        view: View<'_>,
        sites: &Sites,
        layers: &mut [RepairedLayer],
        enter: impl Fn(&mut LayerReport, Measured),
    ) -> Result<()> {
        let errors_of = |layer: &RepairedLayer| -> Result<Vec<Mat<f64>>> {
            let (weight, _) = self.weight(layer.report.layer)?;
            errors(weight, layer.weight.matrix()?, layer)
        };
        let site = |layer: &RepairedLayer| site_of(layer.report.layer.module());
        let mut streamed = Vec::new();
        for layer in (layers.iter()).filter(|layer| sites.streamed.contains(&site(layer))) {
            let errors = errors_of(layer)?;
            let collectors = errors.iter().map(|e| EnergyCollector::new(e.as_ref()));
            streamed.push((site(layer), collectors.collect::<Result<_>>()?));
        }
        let whole = Sites {
            streamed: Vec::new(),
            ..sites.clone()
        };
        let collectors = Collectors::new(view.dense, &whole, &view.stream.how)?;
        let (streamed, statistics, held) = energies(view, streamed, collectors)?;
        let mut streamed = streamed.into_iter();
        for layer in layers {
            let (id, site) = (layer.report.layer, site(layer));
            let measured = if sites.streamed.contains(&site) {
                let energies = streamed.next().unwrap_or_default();
                Measured::new(layer, &energies)
            } else if let Some(statistics) = &statistics[site_index(site)] {
                errors_of(layer)
                    .and_then(|errors| Measured::by_gram(layer, &errors, statistics))
                    .map_err(|source| in_layer(id, source))?
            } else {
                continue;
            };
            enter(&mut layer.report, measured);
            let report = &mut layer.report;
            report.statistics_bytes = report.statistics_bytes.max(held[site_index(site)]);
        }
        Ok(())
    }
}

/// Enters what was measured on the windows that the repair was fitted to.
fn calibrated(report: &mut LayerReport, measured: Measured) {
    report.calibration = measured.energy;
    if let (Some(Requantised { calibration, .. }), Some(loss)) =
        (&mut report.requantised, measured.requantised)
    {
        *calibration = loss;
    }
}

fn in_layer(id: LayerId, source: Error) -> Error {
    Error::Layer {
        layer: id.to_string(),
        source: Box::new(source),
    }
}
