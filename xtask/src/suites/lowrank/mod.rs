//! Low-rank repair: output error, quality and size by compressor, method and rank.

mod cells;
mod check;
mod config;
mod experts;
mod gguf;
mod output;
mod save;
mod start;
mod table;
mod verdict;

use anyhow::{Context, Result};
use causal_lm::{Arithmetic, Decoder, Execution};
use eval_report::{DENSE, Row, Section};
use lowrank_eora::repair::{Source, WithImportance};

use super::held_out;
use super::perplexity::{Protocol, file_name, tokens};
use crate::estimate::Probe;
use crate::model::{experts_left, naming};
use crate::scratch::Scratch;
use crate::settings::{Settings, one_line, part};

use cells::Lowrank;
use gguf::{Files, Imported};
use start::{GivenModel, Start, open};

pub(crate) use check::possible_rank;
pub(crate) use config::method_name;
pub use config::{Config, NONE, Rest};
pub use output::Output;

/// Compress and repair in every combination and measure each. Where some combinations fail, the section has the rows of
/// the others and names those that failed.
///
/// # Errors
/// A model or text that cannot be read or run, what is known beforehand to fail, and the failure of the first combination
/// where all fail.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    check::settings(settings, config)?;
    let checkpoint = causal_lm::open(&config.perplexity.model)?;
    let decoder = open(settings, &checkpoint)?;
    // What is measured stays in f32.
    let walked = match settings.weights.arithmetic {
        arithmetic @ Arithmetic::Bf16 => {
            Some(open(settings, &checkpoint)?.packed(Execution::new(arithmetic)))
        }
        Arithmetic::F32 | Arithmetic::Int8 => None,
    };
    let compressed = config.compressed.as_ref();
    let compressed = compressed.map(causal_lm::open).transpose()?;
    let given = compressed.as_ref().map(|compressed| {
        let given = GivenModel::open(settings, compressed);
        given.with_context(|| compressed.dir().display().to_string())
    });
    let given = given.transpose()?;
    let given_types = check::model(config, &decoder, given.as_ref())?;
    let imported = Imported::read(config, &decoder)?;
    save::make_folder(config)?;
    let scratch = Scratch::new()?;
    let template = save::template(config, &decoder, given.as_ref(), scratch.path())?;
    let compressors: Vec<Box<dyn Source + '_>> = (config.compressors.iter())
        .map(|compressor| match Imported::of(&imported, compressor) {
            Some(imported) => Box::new(WithImportance::new(*compressor, &imported.importance)) as _,
            None => Box::new(*compressor) as _,
        })
        .collect();
    let files = Files {
        config,
        decoder: &decoder,
        template: template.as_ref(),
        imported: &imported,
    };
    let mut starts: Vec<Start<'_>> = Vec::new();
    for (compressor, source) in config.compressors.iter().zip(&compressors) {
        // Experts are counted in the form of their compressor and written as floats.
        let in_gguf = match config.experts {
            None => files.of_compressor(compressor),
            Some(_) => Ok(None),
        };
        let in_gguf = in_gguf.with_context(|| compressor.to_string())?;
        starts.push(Start::compressor(compressor, &**source, in_gguf));
    }
    if let Some(given) = &given {
        let in_gguf = given_types.map(|types| files.of_types(&types));
        let in_gguf = in_gguf.transpose()?.flatten();
        starts.push(Start::given(config, given, in_gguf));
    }
    if !settings.quiet {
        for (name, types) in start::types(&starts) {
            eprintln!("{name}: {types}");
        }
    }
    let experts = experts_left(&decoder).filter(|_| config.experts.is_none());
    if let Some(experts) = &experts {
        settings.note(&format!("experts: {experts}"));
    }
    let protocol = Protocol::new(settings, &config.perplexity, &decoder)?;
    let evaluation = protocol.evaluation(settings, &config.perplexity.text)?;
    let windows = protocol.calibration(&config.calib)?;
    let wanted = (config.calib_samples, config.held_out_samples);
    let (calibration, held_out) = held_out::split(&windows, wanted, settings.seed)
        .with_context(|| config.calib.display().to_string())?;

    let suite = Lowrank {
        settings,
        config,
        decoder: &decoder,
        walked: walked.as_ref().unwrap_or(&decoder),
        evaluation: &evaluation,
        calibration: &calibration,
        held_out: &held_out,
        state: config.resume.as_deref().unwrap_or(scratch.path()),
        scratch: scratch.path(),
        template: template.as_ref(),
        imported: &imported,
    };
    let texts = tokens(&calibration) + tokens(&held_out);
    settings.expect("lowrank", || {
        let probe = Probe::of(&decoder, &calibration)?;
        Ok(config.seconds(&probe, texts, tokens(evaluation.inputs())))
    });
    let mut rows: Vec<Row> = Vec::new();
    rows.extend(settings.cells.get(DENSE, || suite.dense())?);
    let repairs = config.methods.iter().flatten().count() * config.ranks.len();
    let bar = settings.bar("repair", (starts.len() * (1 + repairs)) as u64);
    let mut failures = Vec::new();
    for start in &starts {
        // What failed is not finished, but the report shows the rest of it.
        let (mut made, mut failed) = (Vec::new(), Vec::new());
        let finished = settings.cells.get(&start.name, || {
            if let Some(compressor) = start.alike.filter(|_| config.experts.is_some()) {
                return suite.experts(compressor, &bar);
            }
            (made, failed) = suite.start(start, &bar);
            match failed.pop() {
                None => Ok(std::mem::take(&mut made)),
                Some(error) => Err(error),
            }
        });
        match finished {
            Ok(finished) => rows.extend(finished.into_iter().flatten()),
            Err(error) => {
                rows.append(&mut made);
                failures.extend(failed.into_iter().chain([error]));
            }
        }
    }
    bar.finish();
    if rows.iter().all(|row| row.method == DENSE) && !failures.is_empty() {
        return Err(failures.swap_remove(0));
    }
    let model = &config.perplexity.model;
    let failures = failures.into_iter().map(|error| naming(error, model));
    let failures = failures.map(|error| one_line(&error)).collect();
    if settings.is_part() {
        return Ok(part(failures));
    }
    compare_with_dense(&mut rows, &decoder, &file_name(&config.perplexity.model));
    let names: Vec<&str> = starts.iter().map(|start| start.name.as_str()).collect();
    let section = match config.experts {
        None => table::section(config, &names, rows),
        Some(_) => experts::section(rows),
    };
    let mut section = protocol
        .facts(
            section,
            &config.perplexity.text,
            evaluation.count(),
            evaluation.targets(),
        )
        .fact("calibration text", file_name(&config.calib))
        .fact("calibration windows", calibration.count())
        .fact("held-out windows", held_out.count())
        .fact(
            "calibrated on",
            format!("activations of {}", config.repair.inputs),
        )
        .fact(
            "arithmetic of calibration",
            settings.weights.arithmetic_name(),
        )
        .fact("factors", config.repair.factors.to_string());
    section.failures = failures;
    if let Some(experts) = experts {
        section = section.fact("experts", experts);
    }
    for (name, types) in start::types(&starts) {
        section = section.fact(format!("tensors of {name}"), types);
    }
    if let Some(imatrix) = &config.imatrix {
        section = section.fact("importance", file_name(imatrix));
    }
    if config.experts.is_some() {
        return Ok(vec![section]);
    }
    let spread = match config.allocate {
        None => "the same for all".to_string(),
        Some(spread) => format!("by {spread}, in the bytes of one rank for all"),
    };
    Ok(vec![section.fact("ranks", spread)])
}

fn compare_with_dense(rows: &mut [Row], decoder: &Decoder<'_>, model: &str) {
    let dense = rows
        .iter()
        .find(|row| row.method == DENSE)
        .and_then(|row| row.perplexity);
    for row in rows {
        row.model = Some(model.into());
        row.bytes_dense = Some(decoder.checkpoint().total_bytes());
        row.perplexity_dense = dense;
    }
}
