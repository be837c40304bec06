//! Structured pruning: quality, size and speed by method and ratio.

mod cells;
mod check;
mod config;
mod experts;
mod parts;
pub mod search;
mod table;

use anyhow::{Context, Result};
use causal_lm::Arithmetic;
use eval_report::{DENSE, Row, Section, Stopwatch, format};

use self::cells::{Cells, Inputs, survived, time_blocks};
use self::table::{compare_with_dense, section};
use super::held_out;
use super::lazy::Lazy;
use super::perplexity::{self, Protocol, file_name, tokens};
use crate::estimate::Probe;
use crate::scratch::Scratch;
use crate::settings::{Settings, part};

pub(crate) use config::Counts;
pub use config::{Config, ExpertMethods, Export, Named};

/// Prune at every method and ratio and measure each.
///
/// # Errors
/// A model or text that cannot be read or run, what is known beforehand to fail, and the failure of the first row where all
/// fail.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    check::settings(config)?;
    let checkpoint = causal_lm::open(&config.perplexity.model)?;
    let decoder = perplexity::open(settings, &checkpoint)?;
    let is_mixture = decoder.config().mixtures.iter().any(Option::is_some);
    check::model(settings, config, &decoder)?;
    let protocol = Protocol::new(settings, &config.perplexity, &decoder)?;
    let evaluation = protocol.evaluation(settings, &config.perplexity.text)?;
    let text = protocol.calibration(&config.calib)?;
    let calibration = text.sample(config.calib_samples, settings.seed);
    let count = config.search.compared(&config.recipes);
    let compared = held_out::compared(&text, &calibration, count, settings.seed);

    // Dense models of any size are pruned, so scratch space is on disk, not in memory.
    let scratch = Scratch::new()?;
    let counts = Counts {
        evaluation: tokens(evaluation.inputs()),
        calibration: tokens(&calibration),
        compared: tokens(&compared),
    };
    settings.expect("structured", || {
        let probe = Probe::of(&decoder, &calibration)?;
        Ok(config.seconds(&probe, &counts, is_mixture))
    });
    if is_mixture {
        let suite = experts::Suite {
            settings,
            config,
            decoder: &decoder,
            protocol: &protocol,
            calibration: &calibration,
            compared: &compared,
            evaluation: &evaluation,
            scratch: scratch.path(),
        };
        return suite.run();
    }
    let cells = Cells {
        settings,
        config,
        decoder: &decoder,
        calibration: &calibration,
        evaluation: &evaluation,
        compared: &compared,
        scratch: scratch.path(),
    };
    if let Some(shard) = config.calib_shard {
        cells.calibrate_part(shard)?;
        return Ok(Vec::new());
    }
    let calibrated = Lazy::default();
    let calibrated = || {
        calibrated.get(|| {
            let bar = settings.bar("calibration", decoder.config().layers() as u64);
            let watch = Stopwatch::start();
            let calibrated = cells.calibrated(&bar)?;
            let mut row = Row::new("structured", "calibration");
            watch.stop(&mut row);
            bar.finish();
            Ok((calibrated, row))
        })
    };
    let calibrating =
        (settings.cells).get(config::CALIBRATION, || anyhow::Ok(calibrated()?.1.clone()))?;

    let mut rows = Vec::new();
    if !config.dry_run {
        rows.extend(settings.cells.get(DENSE, || {
            let bar = settings.bar(DENSE, 0);
            let mut row = Row::new("structured", DENSE);
            perplexity::measure(&decoder, &evaluation, &mut row, &bar)?;
            time_blocks(&[&decoder], evaluation.inputs())?[0].fill(&mut row);
            bar.finish();
            anyhow::Ok(row)
        })?);
    }
    let bar = settings.bar(
        "pruning",
        (config.recipes.len() * config.ratios.len()) as u64,
    );
    let mut failures = Vec::new();
    for recipe in &config.recipes {
        let curves = Lazy::default();
        for &ratio in &config.ratios {
            let name = Config::cell(recipe, ratio);
            bar.set_label(name.clone());
            let row = settings.cells.get(&name, || {
                let (calibration, _) = calibrated()?;
                let inputs = Inputs {
                    calibration,
                    curves: curves
                        .get(|| cells.curves(calibration, recipe, &bar))?
                        .as_ref(),
                };
                cells.measure(inputs, recipe, ratio, &bar)
            });
            match row.context(name) {
                Ok(row) => rows.extend(row),
                Err(error) => failures.push(error),
            }
            bar.inc(1);
        }
    }
    bar.finish();
    let failures = survived(&rows, failures, &config.perplexity.model)?;
    let (false, Some(calibrating)) = (settings.is_part(), calibrating) else {
        return Ok(part(failures));
    };
    compare_with_dense(&mut rows, &decoder, &file_name(&config.perplexity.model));
    let arithmetic = match settings.weights.arithmetic {
        Arithmetic::F32 => "f32",
        _ => settings.weights.ran(&decoder.weights()?),
    };
    let mut section = section(config, rows);
    section.failures = failures;
    if config.search.compares(&config.recipes) {
        let described = held_out::describe(&compared, &calibration);
        section = section.fact("windows that widths are compared on", described);
    }
    Ok(vec![
        protocol
            .facts(
                section,
                &config.perplexity.text,
                evaluation.count(),
                evaluation.targets(),
            )
            .fact("arithmetic", arithmetic)
            .fact("calibration text", file_name(&config.calib))
            .fact("calibration windows", calibration.count())
            .fact("calibration time", format::seconds(calibrating.seconds))
            .fact(
                "calibration memory",
                calibrating
                    .peak_rss_bytes
                    .map_or("unknown".into(), format::bytes),
            ),
    ])
}
