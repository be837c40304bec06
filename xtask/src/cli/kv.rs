//! The flags of `eval kv`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, ValueEnum};
use eval_report::Budget;

use lm_eval::ProtocolKind;

use crate::suites::kv::perplexity::Text;
use crate::suites::kv::policy::{ALPHA, Choice, PromptRule};
use crate::suites::kv::recall::Recall;
use crate::suites::kv::speed::Speed;
use crate::suites::kv::trace::{Source, Traces};
use crate::suites::kv::{Config, Task};
use crate::suites::perplexity;

#[derive(Args)]
pub(super) struct KvArgs {
    /// What to measure
    #[arg(long, value_enum, default_value_t = KvTask::Perplexity)]
    task: KvTask,
    /// Checkpoint folder in Hugging Face layout, or hf:OWNER/NAME; for --task perplexity several, separated by commas,
    /// each with a window that it supports
    #[arg(long, value_delimiter = ',', value_name = "DIR[,DIR..]")]
    model: Vec<PathBuf>,
    /// Text to decode
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// How the text becomes windows: each with BOS in front; or gptq, cut from the text with the tokenizer's own special tokens
    #[arg(long, value_name = "NAME", default_value = "windows", value_parser = super::protocol(super::DECODED))]
    protocol: ProtocolKind,
    /// Do not begin windows with the tokenizer's BOS token
    #[arg(long, conflicts_with = "protocol")]
    no_bos: bool,
    /// Policies, separated by commas; the full cache is always measured; lagged-P evicts every W steps [default: all]
    #[arg(long, value_delimiter = ',', value_name = "P[,P..]", value_parser = PossibleValuesParser::new(Choice::known().iter().map(String::as_str)))]
    policy: Vec<String>,
    /// Budgets per layer, sequence and KV head, separated by commas: number of tokens, or with a decimal point a fraction
    /// of the window
    #[arg(long, value_delimiter = ',', value_name = "B[,B..]", default_value = "0.25,0.5", value_parser = budget)]
    budget: Vec<Budget>,
    /// Tokens of each window to prefill [default: a quarter]
    #[arg(long, value_name = "N")]
    prompt: Option<NonZeroUsize>,
    /// What happens to the prompt
    #[arg(long, value_enum, default_value_t = PromptRule::Own)]
    prompt_rule: PromptRule,
    /// Attention weight at which a token counts as active, for LazyEviction, RaaS and recurrence statistics
    #[arg(long, value_name = "X", default_value_t = ALPHA, value_parser = alpha)]
    alpha: f32,
    /// Traces, separated by commas: planted, drift, heavy-hitters, or a file; without --model all three generators
    #[arg(long, value_delimiter = ',', value_name = "T[,T..]")]
    trace: Vec<String>,
    /// Save recorded traces or the model trained to recall to this folder
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Training steps of the recall model
    #[arg(long, value_name = "N", default_value = "200")]
    train_steps: NonZeroUsize,
    /// Seeds of random policies and generated traces, counted from --seed
    #[arg(long, value_name = "N", default_value = "3")]
    seeds: NonZeroUsize,
    /// Windows per batch [default: as memory allows, at most 32]
    #[arg(long, value_name = "N")]
    batch: Option<NonZeroUsize>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KvTask {
    /// Decode-time perplexity of a text
    Perplexity,
    /// Attention mass retained on traces that are recorded, read from files or generated
    Trace,
    /// Accuracy of a small model trained to recall, or saved by an earlier run
    Recall,
    /// Generation speed after a long context, of --model or of random weights
    Speed,
}

impl KvArgs {
    pub(super) fn config(self) -> Config {
        let makes = match self.task {
            KvTask::Perplexity | KvTask::Speed => false,
            KvTask::Trace => !self.model.is_empty(),
            KvTask::Recall => self.model.is_empty(),
        };
        if self.model.len() > 1 && self.task != KvTask::Perplexity {
            wrong("--model: only --task perplexity takes several");
        }
        if self.save.is_some() && !makes {
            wrong(
                "--save: this task makes nothing to keep (it keeps traces of --model, or a model trained to recall)",
            );
        }
        if !self.trace.is_empty() && self.task != KvTask::Trace {
            wrong("--trace belongs to --task trace");
        }
        if self.batch.is_some() && self.task != KvTask::Perplexity {
            wrong("--batch belongs to --task perplexity");
        }
        let prompt_rule = self.prompt_rule;
        let choice = |name: &str| {
            // clap has admitted no other name.
            Choice::named(name, prompt_rule, self.alpha).expect("the parser knows the same names")
        };
        let policies = match &self.policy[..] {
            [] if self.task == KvTask::Speed => Speed::POLICIES.into_iter().map(choice).collect(),
            [] => Choice::names(self.task != KvTask::Perplexity)
                .map(choice)
                .collect(),
            named => named.iter().map(String::as_str).map(choice).collect(),
        };
        let prompt = self.prompt.map(NonZeroUsize::get);
        let task = match self.task {
            KvTask::Perplexity => {
                let batch = self.batch.map(NonZeroUsize::get);
                let text = |text| Text {
                    text,
                    prompt,
                    batch,
                };
                match self.texts() {
                    texts if texts.is_empty() => {
                        wrong("--task perplexity needs --model DIR and --text FILE")
                    }
                    texts => Task::Perplexity(texts.into_iter().map(text).collect()),
                }
            }
            KvTask::Trace => {
                let recorded = self.texts().pop();
                let sources = match &self.trace[..] {
                    [] if recorded.is_none() => Source::GENERATORS.to_vec(),
                    named => named.iter().map(|s| Source::from(s.as_str())).collect(),
                };
                Task::Trace(Traces {
                    sources,
                    recorded,
                    prompt,
                    save: self.save,
                })
            }
            KvTask::Speed => Task::Speed(Speed {
                model: self.model.into_iter().next(),
                prompt,
            }),
            KvTask::Recall => Task::Recall(Recall {
                model: self.model.into_iter().next(),
                save: self.save,
                steps: self.train_steps.get(),
                prompt,
            }),
        };
        Config {
            policies,
            alpha: self.alpha,
            budgets: self.budget,
            seeds: self.seeds.get(),
            prompt_rule,
            task,
        }
    }

    /// Models and their text, where both are given.
    fn texts(&self) -> Vec<perplexity::Config> {
        match &self.text {
            Some(text) if !self.model.is_empty() => {
                let of = |model: &PathBuf| perplexity::Config {
                    model: model.clone(),
                    text: text.clone(),
                    protocol: super::with_bos(self.protocol, !self.no_bos),
                };
                self.model.iter().map(of).collect()
            }
            None if self.model.is_empty() => Vec::new(),
            _ => wrong("--model DIR and --text FILE go together"),
        }
    }
}

/// Ends the process as clap does on flags that do not go together.
fn wrong(what: &str) -> ! {
    super::Cli::command()
        .error(ErrorKind::ArgumentConflict, what)
        .exit()
}

fn alpha(text: &str) -> Result<f32, String> {
    match text.parse() {
        Ok(weight) if (0.0..1.0).contains(&weight) => Ok(weight),
        _ => Err("expected an attention weight, at least 0 and below 1".into()),
    }
}

fn budget(text: &str) -> Result<Budget, String> {
    let expected = "expected a number of tokens above 0, or with a decimal point a share above 0 and at most 1";
    let budget = if text.contains('.') {
        text.parse().ok().map(Budget::Share)
    } else {
        text.parse().ok().map(Budget::Tokens)
    };
    match budget {
        Some(Budget::Share(share)) if share > 0.0 && share <= 1.0 => Ok(Budget::Share(share)),
        Some(Budget::Tokens(tokens)) if tokens > 0 => Ok(Budget::Tokens(tokens)),
        _ => Err(expected.into()),
    }
}
