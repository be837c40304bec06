//! `cargo xtask generate`: text from a model, as it comes.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use causal_lm::{GenerateOptions, Model, Sampling, TextTokenizer, generate};
use eval_report::format;
use lm_eval::tasks::end_tokens;

use crate::chat;
use crate::hub;
use crate::model;
use crate::settings::Settings;
use crate::stdout::{print, print_while_read};
use crate::suites::kv::calibration;
use crate::suites::kv::policy::{self, Choice};

/// The recommended storage of keys and values: its error does not show in what is written.
const KV_DTYPE: &str = "int8";

/// What to generate.
#[derive(Debug, Clone)]
pub struct Config {
    /// A folder or a GGUF file.
    pub model: PathBuf,
    /// What to continue or to answer.
    pub prompt: String,
    /// Whether the prompt is continued as it is.
    pub raw: bool,
    /// Policy of the cache.
    pub policy: Choice,
    /// What keys and values are stored as; as recommended, where the model's heads admit it.
    pub kv_dtype: Option<String>,
    /// A file with a configuration of the cache, in place of policy, storage and budget.
    pub cache: Option<PathBuf>,
    /// A file of statistics of the model's queries.
    pub statistics: Option<PathBuf>,
    /// Tokens that the cache keeps per layer and KV head.
    pub budget: usize,
    /// Tokens generated at most.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Device, seed, adapter and arithmetic.
    pub settings: Settings,
}

/// Prints the text to stdout while it is generated, then speed and memory to stderr.
///
/// # Errors
/// A model that cannot be read or run, and a prompt without tokens.
pub fn run(config: &Config) -> Result<()> {
    let started = Instant::now();
    let common = &config.settings;
    ensure!(
        !config.policy.is_oracle(),
        "--policy oracle needs the attention of the future"
    );
    let path = hub::open_model(&config.model, common)?;
    let checkpoint = common.weights.open(&path)?;
    let decoder = model::decoder(common, &checkpoint)?;
    let tokenizer = TextTokenizer::open(&path)?;
    let template = tokenizer.chat_template().filter(|_| !config.raw);
    let prompt = match template {
        Some(template) => {
            let text = chat::render(template, &tokenizer, &config.prompt)
                .context("the model's chat template (--raw leaves it out)")?;
            tokenizer.encode(&text)?
        }
        None => tokenizer.encode_with_special_tokens(&config.prompt)?,
    };
    ensure!(!prompt.is_empty(), "--prompt: the text has no tokens");
    let room = decoder.config().max_positions;
    let max_new_tokens = config.max_new_tokens.min(room.saturating_sub(prompt.len()));
    ensure!(
        max_new_tokens > 0,
        "--prompt has {}, and the model was made for {room} positions",
        format::counted(prompt.len(), "token")
    );
    let model = Model::load(&decoder)?.for_positions(prompt.len() + max_new_tokens);
    let (mut choice, flags) = match &config.cache {
        Some(file) => (
            Choice::of_file(file)?,
            format!("--cache {}", file.display()),
        ),
        None => {
            let policy = config.policy.clone();
            let flags = format!("--policy {} --budget {}", policy.name, config.budget);
            let stored = match &config.kv_dtype {
                Some(preset) => policy.stored_as(preset, true)?,
                None if policy::admits(&model, KV_DTYPE)? => policy.stored_as(KV_DTYPE, true)?,
                None => policy,
            };
            (stored, flags)
        }
    };
    let stored = choice.stored(decoder.dtype());
    if let Some(file) = &config.statistics {
        ensure!(
            choice.takes_calibration(),
            "--statistics {}: the policy takes no statistics of queries",
            file.display()
        );
        choice = choice.calibrated(&calibration::read(file, &path)?);
    }
    let cache = choice.cache(config.budget, common.seed);
    let mut cache = policy::caches(&model, Some(&cache), 0, 1).with_context(|| flags)?;
    let mut stop = end_tokens(&decoder)?;
    stop.extend(tokenizer.eos());
    let options = GenerateOptions::new(max_new_tokens)
        .with_sampling(config.sampling)
        .with_stop(stop);

    let mut text = tokenizer.stream();
    let mut first = None;
    let mut shown = Ok(ControlFlow::Continue(()));
    let mut show = |token: u32| {
        first.get_or_insert_with(|| started.elapsed());
        let text = text(token).map_err(anyhow::Error::from);
        shown = text.and_then(|text| print_while_read(&text));
        match shown {
            Ok(flow) => flow,
            Err(_) => ControlFlow::Break(()),
        }
    };
    let generated = generate(&model, &mut cache, &prompt, &options, &mut show)
        .map_err(|error| model::naming(error.into(), &config.model))?;
    if shown?.is_break() {
        return Ok(());
    }
    print("\n")?;
    let mut facts = vec![
        format::counted(generated.tokens.len(), "token"),
        format!("prompt of {}", format::counted(prompt.len(), "token")),
    ];
    if let Some(first) = first {
        facts.push(format!("first after {:.2} s", first.as_secs_f64()));
    }
    let prefill = prompt.len() as f64 / generated.prefill.as_secs_f64();
    facts.push(format!("prefill {prefill:.1} tokens/s"));
    if let Some(decode) = generated.tokens_per_second() {
        let read = decode * model.weight_bytes() as f64 / 1e9;
        facts.push(format!(
            "decode {decode:.1} tokens/s ({read:.1} GB/s of weights)"
        ));
    }
    let bytes = |name: &str, bytes: usize| format!("{name} {}", format::bytes(bytes as u64));
    facts.push(bytes("weights", model.weight_bytes()));
    let held = bytes("cache", cache.peak_bytes());
    facts.push(format!("{held} ({stored})"));
    facts.push(bytes("cache state", cache.state_bytes()));
    if max_new_tokens < config.max_new_tokens && generated.tokens.len() == max_new_tokens {
        facts.push(format!(
            "stopped at the {room} positions that the model was made for"
        ));
    }
    facts.push(common.weights.run(&model.weights()));
    let line = facts.join(", ");
    match std::io::stderr().is_terminal() {
        true => eprintln!("\n{line}"),
        false => eprintln!("{line}"),
    }
    Ok(())
}
