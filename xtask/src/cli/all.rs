//! The flags of `eval` without a suite, and the command lines that such a run stands for.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Parser};

use super::{Cli, Command, Common};
use crate::eval::all::{Config, Given};
use crate::eval::perplexity;

#[derive(Args)]
pub(super) struct AllArgs {
    /// Without a suite: run all of them on this checkpoint folder in Hugging Face layout, or hf:OWNER/NAME, instead of
    /// the embedded model
    #[arg(long, value_name = "DIR", requires_all = ["text", "calib"])]
    model: Option<PathBuf>,
    /// Without a suite: text to evaluate --model on
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// Without a suite: text to calibrate on, another one than --text
    #[arg(long, value_name = "FILE", requires = "model")]
    calib: Option<PathBuf>,
    /// Without a suite: begin windows with text, not with the tokenizer's BOS token
    #[arg(long, requires = "model")]
    no_bos: bool,
}

impl AllArgs {
    /// Whether anything was given that only a run of all suites takes.
    pub(super) fn is_given(&self) -> bool {
        self.model.is_some()
    }
}

impl From<AllArgs> for Config {
    fn from(args: AllArgs) -> Self {
        let given = args.model.zip(args.text).zip(args.calib);
        Config {
            given: given.map(|((model, text), calib)| Given {
                text: perplexity::Config {
                    model,
                    text,
                    bos: !args.no_bos,
                },
                calib,
            }),
        }
    }
}

/// One of the runs that all suites consist of.
pub(crate) struct Part {
    /// Its command line.
    pub(crate) words: Vec<String>,
    /// What it means.
    pub(crate) suite: super::Suite,
}

/// The runs of all suites on a model.
pub(crate) fn parts(given: &Given, common: &Common) -> Result<Vec<Part>> {
    let path = |path: &Path| path.display().to_string();
    let (model, text, calib) = (
        path(&given.text.model),
        path(&given.text.text),
        path(&given.calib),
    );
    let mut on_text = vec!["--model", &model, "--text", &text];
    if !given.text.bos {
        on_text.push("--no-bos");
    }
    let number = |name: &str, value: Option<usize>| value.map(|value| format!("{name}={value}"));
    let cut = [
        number("--window", common.window),
        number("--samples", common.samples),
    ];
    on_text.extend(cut.iter().flatten().map(String::as_str));
    let seed = format!("--seed={}", common.seed);
    let calibrated = [&on_text[..], &["--calib", &calib, "--calib-samples", "32"]].concat();
    [
        (
            "structured --method flap,wanda-sp,magnitude,random --ratio 0.125,0.25,0.5 --compensate least-squares",
            &calibrated[..],
        ),
        (
            "lowrank --compress wanda-2:4,gptq-int3 --method none,svd,eora --rank 8 --held-out-samples 8",
            &calibrated,
        ),
        (
            "kv --policy lazy,lazy-guarded,h2o,tova,streaming,random --budget 0.25,0.5 --prompt-rule evict",
            &on_text,
        ),
        (
            "lattice --task reber,mod3 --method lattice-context,strength,magnitude,random --sparsity 0.5,0.75,0.9",
            &[],
        ),
    ]
    .into_iter()
    .map(|(suite, texts)| part(suite, &[texts, &[seed.as_str()]].concat(), common.seed))
    .collect()
}

fn part(suite: &str, texts: &[&str], seed: u64) -> Result<Part> {
    let words: Vec<String> = ["cargo", "xtask", "eval"]
        .into_iter()
        .chain(suite.split(' '))
        .chain(texts.iter().copied())
        .map(String::from)
        .collect();
    // The name of the program is one word for the parser.
    let parsed = Cli::try_parse_from(&words[1..]).with_context(|| words.join(" "))?;
    let suite = match parsed.command {
        Command::Eval(args) => args.suite.map(|suite| suite.suite(seed)),
        _ => None,
    };
    let suite = suite.with_context(|| format!("{}: not a suite", words.join(" ")))?;
    Ok(Part { words, suite })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_lines_of_the_parts_are_understood() {
        for bos in [true, false] {
            let given = Given {
                text: perplexity::Config {
                    model: "a model".into(),
                    text: "text".into(),
                    bos,
                },
                calib: "calib".into(),
            };
            let common = Common {
                window: Some(64),
                samples: None,
                seed: 3,
                threads: None,
                device: super::super::Device::Cpu,
                out: None,
                json: false,
            };
            let parts = parts(&given, &common).unwrap();
            assert!(parts[0].words.contains(&"--window=64".to_owned()));
            assert_eq!(parts.len(), 4);
            let super::super::Suite::Structured(config) = &parts[0].suite else {
                panic!("not structured pruning")
            };
            assert_eq!(config.perplexity.model, Path::new("a model"));
            assert_eq!(config.perplexity.bos, bos);
        }
    }
}
