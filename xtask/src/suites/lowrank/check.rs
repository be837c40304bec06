//! What is known before anything is computed: combinations that cannot be run or written.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use causal_lm::Decoder;
use lowrank_eora::compress::{Compressor, Needs};
use lowrank_eora::output::{Adapter, Layout, check_layout, gguf_types};
use lowrank_eora::packed::BlockType;
use lowrank_eora::repair::{LayerId, Source};

use super::config::{Config, method_name};
use super::experts::{self, OUTPUTS};
use super::output::Output;
use super::save;
use super::start::GivenModel;
use crate::model::experts_left;
use crate::settings::{Settings, once};
use crate::suites::perplexity;

/// What the flags alone tell.
pub(super) fn settings(settings: &Settings, config: &Config) -> Result<()> {
    perplexity::ensure_unseen(&config.calib, &config.perplexity.text)?;
    once("--compress", config.compressors.iter())?;
    once(
        "--method",
        config.methods.iter().map(|&method| method_name(method)),
    )?;
    once("--rank", config.ranks.iter())?;
    let repairs = config.methods.iter().any(Option::is_some);
    for flag in &config.asked {
        ensure!(
            reads(config, flag),
            "{flag}: changes nothing for {}{}; leave it out",
            started(config).join(", "),
            match (is_of_experts(flag) && config.experts.is_none(), repairs) {
                (true, _) => " without --experts",
                (false, false) => " without a repair",
                (false, true) => "",
            }
        );
    }
    for output in config.outputs.iter().flatten() {
        ensure!(
            repairs || !output.needs_factors(),
            "--save-as {output}: method {} makes no factors; add a method that does",
            method_name(None)
        );
    }
    let weights = |compressor: &Compressor| compressor.weights_by_importance();
    ensure!(
        config.imatrix.is_none() || config.compressors.iter().any(weights),
        "--imatrix: no compressor weights by importance; take one such as q4_k-imatrix"
    );
    save::check_paths(settings, config)
}

/// Whether a flag says something of experts.
fn is_of_experts(flag: &str) -> bool {
    matches!(
        flag,
        "--pool-tokens" | "--expert-prior" | "--no-gate-weight"
    )
}

/// Whether anything of the run reads a flag.
fn reads(config: &Config, flag: &str) -> bool {
    let repairs = config.methods.iter().any(Option::is_some);
    let mut compressors = config.compressors.iter();
    match flag {
        _ if is_of_experts(flag) => {
            let calibrates = compressors.any(|one| one.needs() > Needs::Nothing);
            config.experts.is_some() && (repairs || calibrates)
        }
        // Compressors that calibrate do so on these inputs.
        "--inputs" | "--sequential" | "--token-share" => {
            repairs || compressors.any(|one| one.needs() > Needs::Nothing)
        }
        "--rest" => {
            let outputs = config.outputs.as_ref();
            compressors.any(|one| one.blocks.is_some())
                || outputs.is_some_and(|outputs| outputs.contains(&Output::Gguf))
        }
        _ => repairs,
    }
}

/// What the run starts from, by its names.
fn started(config: &Config) -> Vec<String> {
    let given = config.compressed.as_deref().map(perplexity::file_name);
    let compressors = config.compressors.iter().map(ToString::to_string);
    compressors.chain(given).collect()
}

/// What the shapes of the models tell; of a given model that is to be written as GGUF, the types of its linears there.
pub(super) fn model(
    config: &Config,
    decoder: &Decoder<'_>,
    given: Option<&GivenModel<'_>>,
) -> Result<Option<BTreeMap<LayerId, BlockType>>> {
    if let Some(grams) = config.experts {
        experts::check(config, decoder, grams)?;
        return bases(config, given).map(|()| None);
    }
    if let Some(given) = given {
        let fits = given.source.check(decoder);
        fits.with_context(|| format!("--compressed {}", given.checkpoint.dir().display()))?;
    }
    for compressor in &config.compressors {
        let fits = compressor.check(decoder);
        fits.with_context(|| format!("--compress {compressor}"))?;
    }
    for &rank in &config.ranks {
        possible_rank("--rank", decoder, rank)?;
    }
    if config.save.is_none() {
        return Ok(None);
    }
    let outputs = save::outputs(config, given);
    for &output in &outputs {
        let named = || format!("--save-as {output}");
        storable(output, config, decoder, given).with_context(named)?;
    }
    bases(config, given)?;
    let Some(given) = given.filter(|_| outputs.contains(&Output::Gguf)) else {
        return Ok(None);
    };
    let types = given.source.gguf_types(decoder);
    Ok(Some(
        types.with_context(|| format!("--save-as {}", Output::Gguf))?,
    ))
}

/// Factors have what they were fitted to beside them.
fn bases(config: &Config, given: Option<&GivenModel<'_>>) -> Result<()> {
    let outputs = match config.save {
        Some(_) => save::outputs(config, given),
        None => Vec::new(),
    };
    for output in &outputs {
        let bases = output.bases().iter();
        let bases = bases.filter(|base| config.experts.is_none() || OUTPUTS.contains(base));
        let bases: Vec<&Output> = bases.collect();
        let saved = bases.iter().any(|base| outputs.contains(base));
        let is_given = given.is_some_and(|given| *output != Output::LoraGguf || given.is_gguf());
        let names: Vec<String> = bases.iter().map(ToString::to_string).collect();
        ensure!(
            bases.is_empty() || saved || is_given,
            "--save-as {output}: its factors are fitted to the compressed model, which is not saved; add {}",
            names.join(" or ")
        );
    }
    Ok(())
}

/// Refuses a rank, the value of `flag`, that no linear has.
pub(crate) fn possible_rank(flag: &str, decoder: &Decoder<'_>, rank: usize) -> Result<()> {
    let sides = lowrank_eora::repair::linears(decoder)
        .into_iter()
        .map(|(_, [outputs, inputs])| outputs.min(inputs));
    let largest = sides.max().unwrap_or(0);
    ensure!(
        rank <= largest,
        "{flag} {rank}: the largest rank of a linear of this model is {largest}"
    );
    Ok(())
}

/// Whether an output can hold what the run makes.
fn storable(
    output: Output,
    config: &Config,
    decoder: &Decoder<'_>,
    given: Option<&GivenModel<'_>>,
) -> Result<()> {
    let all = |check: &dyn Fn(&Compressor) -> Result<()>| {
        for compressor in &config.compressors {
            check(compressor).with_context(|| compressor.to_string())?;
        }
        Ok(())
    };
    let is_new = |given: &GivenModel<'_>| output == Output::Gguf && !given.is_gguf();
    ensure!(
        given.is_none_or(is_new) || !output.is_of_the_compressor(),
        "the weights of {} are stored already",
        given.map_or_else(Default::default, |given| given
            .checkpoint
            .dir()
            .display()
            .to_string())
    );
    // Runtimes take every linear of such a folder for packed.
    let packed = output
        .layout()
        .is_some_and(|layout| !matches!(layout, Layout::Dense { .. }));
    ensure!(
        !packed || experts_left(decoder).is_none(),
        "its experts stay floats, and runtimes would look for packed ones; save it as {} or {}",
        Output::Compressed,
        Output::Gguf
    );
    let importances = matches!(output, Output::Imatrix | Output::ImatrixDat);
    ensure!(
        !importances || experts_left(decoder).is_none(),
        "importances of experts are not collected, and llama.cpp would take the file for complete"
    );
    match output {
        Output::Gguf => {
            Adapter::check_gguf(decoder)?;
            all(&|compressor| Ok(gguf_types(decoder, compressor).map(drop)?))
        }
        Output::LoraGguf => Ok(Adapter::check_gguf(decoder)?),
        Output::Requantised => {
            let compressor = config.repair.requantise;
            let compressor = compressor.context("needs --requantise with a compressor")?;
            let Some(layout) = output.layout() else {
                return Ok(());
            };
            let fits = check_layout(decoder, &compressor, layout);
            fits.with_context(|| format!("--requantise {compressor}"))
        }
        _ => match output.layout() {
            Some(layout) => all(&|compressor| Ok(check_layout(decoder, compressor, layout)?)),
            None => Ok(()),
        },
    }
}
