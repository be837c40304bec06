//! The flags of `eval kv`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use eval_report::Budget;

use lm_eval::ProtocolKind;
use lm_eval::long_context::Questions;

use super::names::Known;
use super::values::policy;
use super::weights::WeightArgs;
use super::{models, wrong};
use crate::suites::kv::long_context::{Feed, LongContext};
use crate::suites::kv::perplexity::Text;
use crate::suites::kv::policy::{ALPHA, Choice, PromptRule};
use crate::suites::kv::recall::Recall;
use crate::suites::kv::speed::Speed;
use crate::suites::kv::trace::{Source, Traces};
use crate::suites::kv::{Calibration, Config, Task};
use crate::suites::perplexity;

const MODEL: &str = "Checkpoint folder in Hugging Face layout, or GGUF file; for --task perplexity several, separated by commas, each with a window that it supports";

#[derive(Args)]
pub(super) struct KvArgs {
    #[command(flatten)]
    pub(super) weights: WeightArgs,
    /// What to measure
    #[arg(long, value_enum, default_value_t = KvTask::Perplexity)]
    task: KvTask,
    #[arg(long, value_delimiter = ',', value_name = "DIR[,DIR..]", help = models(MODEL))]
    model: Vec<PathBuf>,
    /// Text to decode
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// How the text becomes windows: each with BOS in front; or gptq, cut from the text with the tokenizer's own special tokens [default: windows]
    #[arg(long, value_name = "NAME", value_parser = super::protocol(super::DECODED))]
    protocol: Option<ProtocolKind>,
    /// Do not begin windows with the tokenizer's BOS token
    #[arg(long, conflicts_with = "protocol")]
    no_bos: bool,
    /// Policies, separated by commas; the full cache is always measured; lagged-P evicts every W steps [default: all; none with --cache]
    #[arg(long, value_delimiter = ',', value_name = "P[,P..]", value_parser = Known::new(Choice::known().iter().map(String::as_str)))]
    policy: Vec<String>,
    /// JSON files with a configuration of caches each, separated by commas: rows of their own beside the policies, with the budgets, storage and all else of the file
    #[arg(long, value_delimiter = ',', value_name = "FILE[,FILE..]")]
    cache: Vec<PathBuf>,
    /// Budgets per layer, sequence and KV head, separated by commas: number of tokens, or with a decimal point a fraction
    /// of the window
    #[arg(long, value_delimiter = ',', value_name = "B[,B..]", default_value = "0.25,0.5", value_parser = super::values::budget)]
    budget: Vec<Budget>,
    /// Budgets are of the full cache's tokens, or of its bytes: then each policy gets as many tokens as fit, with its state, positions and storage counted
    #[arg(long, value_enum, default_value_t = BudgetOf::Tokens)]
    budget_of: BudgetOf,
    /// What keys and values are stored as, separated by commas: f32, f16, bf16, int8, k8v4 (8-bit keys, 4-bit values), int4; every policy runs with each, and the
    /// full cache in the first is the reference [default: as the model computes]
    #[arg(long, value_delimiter = ',', value_name = "T[,T..]", value_parser = PossibleValuesParser::new(stored()))]
    kv_dtype: Vec<String>,
    /// First tokens that every policy keeps [default: what the policy keeps by itself; 4 for --task long-context]
    #[arg(long, value_name = "N")]
    sinks: Option<usize>,
    /// Newest tokens that every policy keeps [default: what the policy keeps by itself; 32 for --task long-context]
    #[arg(long, value_name = "N")]
    recent: Option<usize>,
    /// Questions of --task long-context, separated by commas [default: all]
    #[arg(long, value_delimiter = ',', value_name = "Q[,Q..]", value_parser = PossibleValuesParser::new(Questions::ALL.map(Questions::name)))]
    questions: Vec<String>,
    /// Tokens of the contexts of --task long-context, separated by commas [default: 1024]
    #[arg(long, value_delimiter = ',', value_name = "N[,N..]", value_parser = super::values::positive)]
    context: Vec<NonZeroUsize>,
    /// How --task long-context reads contexts [default: whole]
    #[arg(long, value_enum)]
    feed: Option<Feed>,
    /// Text from which statistics of the model's queries are taken, for tri-attention; not for --task recall [default: the sequence itself]
    #[arg(long, value_name = "FILE", conflicts_with = "statistics")]
    calib: Option<PathBuf>,
    /// Save the statistics that --calib takes to this file
    #[arg(long, value_name = "FILE", requires = "calib")]
    save_statistics: Option<PathBuf>,
    /// File of statistics that --save-statistics has made of the same model, in place of --calib
    #[arg(long, value_name = "FILE")]
    statistics: Option<PathBuf>,
    /// Tokens of each window to prefill [default: a quarter]
    #[arg(long, value_name = "N", value_parser = super::values::positive)]
    prompt: Option<NonZeroUsize>,
    /// What happens to the prompt [default: own; evict for --task long-context, whose contexts are prompts]
    #[arg(long, value_enum)]
    prompt_rule: Option<PromptRule>,
    /// Attention weight at which a token counts as active, for LazyEviction, RaaS and recurrence statistics
    #[arg(long, value_name = "X", default_value_t = ALPHA, value_parser = alpha)]
    alpha: f32,
    /// Traces, separated by commas: planted, drift, heavy-hitters, or a file; without --model all three generators
    #[arg(long, value_delimiter = ',', value_name = "T[,T..]")]
    trace: Vec<String>,
    /// Save recorded traces, the model trained to recall, or the tokens of long contexts with their questions to this folder
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Training steps of the recall model [default: 200]
    #[arg(long, value_name = "N", value_parser = super::values::positive)]
    train_steps: Option<NonZeroUsize>,
    /// Seeds of random policies, generated traces and long contexts, counted from --seed [default: 3]
    #[arg(long, value_name = "N", value_parser = super::values::seeds)]
    seeds: Option<NonZeroUsize>,
    /// Windows per batch [default: as memory allows, at most 32]
    #[arg(long, value_name = "N", value_parser = super::values::positive)]
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
    /// Answers of a chat model to questions about long contexts: exact and in nats, by context length
    LongContext,
    /// Generation speed after a long context, of --model or of random weights
    Speed,
}

impl KvArgs {
    pub(super) fn config(mut self) -> Config {
        self.model = super::names::paths(self.model);
        let makes = match self.task {
            KvTask::Perplexity | KvTask::Speed => false,
            KvTask::LongContext => true,
            KvTask::Trace => !self.model.is_empty(),
            KvTask::Recall => self.model.is_empty(),
        };
        if self.model.len() > 1 && self.task != KvTask::Perplexity {
            wrong("--model: only --task perplexity takes several");
        }
        if self.save.is_some() && !makes {
            wrong(
                "--save: this task makes nothing to keep (it keeps traces of --model, a model trained to recall, or long contexts)",
            );
        }
        self.cache = super::names::paths(std::mem::take(&mut self.cache));
        let traces = self.trace.iter().map(String::as_str).collect::<Vec<_>>();
        self.trace = super::names::joined(&traces, |text| Path::new(text).exists());
        self.check_flags();
        let long_context = self.task == KvTask::LongContext;
        let calibration = match (self.calib.take(), self.statistics.take()) {
            (Some(text), _) => Some(Calibration::Text {
                text,
                save: self.save_statistics.take(),
            }),
            (None, file) => file.map(Calibration::Statistics),
        };
        if calibration.is_some() && (self.task == KvTask::Recall || self.model.is_empty()) {
            wrong(
                "--calib and --statistics are of the queries of --model, in every task but recall",
            );
        }
        let saves = matches!(calibration, Some(Calibration::Text { save: Some(_), .. }));
        if saves && self.model.len() > 1 {
            wrong("--save-statistics: one file has the statistics of one --model");
        }
        if self.task == KvTask::Trace && self.budget_of == BudgetOf::Bytes {
            wrong("--budget-of bytes needs a model that runs: traces have tokens alone");
        }
        // Contexts are read as a prompt and must be evictable.
        let prompt_rule = self.prompt_rule.unwrap_or(match long_context {
            true => PromptRule::Evict,
            false => PromptRule::Own,
        });
        let choice = |name: &str| policy(name, prompt_rule, self.alpha);
        let policies: Vec<Choice> = match &self.policy[..] {
            [] if !self.cache.is_empty() => Vec::new(),
            [] if self.task == KvTask::Speed => Speed::POLICIES.into_iter().map(choice).collect(),
            [] => Choice::names(matches!(self.task, KvTask::Trace | KvTask::Recall))
                .map(choice)
                .collect(),
            named => {
                let mut named: Vec<Choice> = named.iter().map(String::as_str).map(choice).collect();
                // What a context is worth under eviction is told by a draw at the same bytes.
                if long_context && !named.iter().any(Choice::is_random) {
                    named.push(choice("random"));
                }
                named
            }
        };
        let (full, mut policies) = self.stored(policies);
        for file in &self.cache {
            let choice = Choice::of_file(file).unwrap_or_else(|e| wrong(&format!("{e:#}")));
            if policies.iter().any(|other| other.name == choice.name) {
                wrong(&format!("--cache: two rows would be named {}", choice.name));
            }
            policies.push(choice);
        }
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
                let sources = match self.sources() {
                    none if none.is_empty() && recorded.is_none() => Source::GENERATORS.to_vec(),
                    named => named,
                };
                Task::Trace(Traces {
                    sources,
                    recorded,
                    prompt,
                    save: self.save,
                })
            }
            KvTask::LongContext => {
                let [model] = &self.model[..] else {
                    wrong("--task long-context needs --model DIR")
                };
                let questions = match &self.questions[..] {
                    [] => Questions::ALL.to_vec(),
                    // clap has admitted no other name.
                    named => named
                        .iter()
                        .filter_map(|name| Questions::named(name))
                        .collect(),
                };
                let lengths: Vec<usize> = self.context.iter().map(|n| n.get()).collect();
                Task::LongContext(LongContext {
                    model: model.clone(),
                    questions,
                    lengths: if lengths.is_empty() {
                        vec![1024]
                    } else {
                        lengths
                    },
                    feed: self.feed.unwrap_or(Feed::Whole),
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
                steps: self.train_steps.map_or(200, NonZeroUsize::get),
                prompt,
            }),
        };
        Config {
            policies,
            full,
            by_bytes: self.budget_of == BudgetOf::Bytes,
            alpha: self.alpha,
            calibration,
            budgets: self.budget,
            seeds: self.seeds.map_or(3, NonZeroUsize::get),
            prompt_rule,
            task,
        }
    }

    /// Generators, and files that are there; what is neither is likely a generator misspelt.
    fn sources(&self) -> Vec<Source> {
        let sources = self.trace.iter().map(|name| Source::from(name.as_str()));
        let sources: Vec<Source> = sources.collect();
        for source in &sources {
            if let Source::File(file) = source
                && !file.exists()
            {
                let near = super::names::near(&file.to_string_lossy(), &Source::NAMES);
                let near = near.map(|near| format!("\n\n  tip: a similar value exists: '{near}'"));
                wrong(&format!(
                    "--trace {}: neither a file nor one of {}{}",
                    file.display(),
                    Source::NAMES.join(", "),
                    near.unwrap_or_default()
                ));
            }
        }
        sources
    }

    /// Refuses flags that the task would not heed.
    fn check_flags(&self) {
        use KvTask::{LongContext, Perplexity, Recall, Speed, Trace};
        let texts = &[Perplexity, Trace][..];
        let belongs: [(&str, bool, &[KvTask]); 12] = [
            ("--text", self.text.is_some(), texts),
            ("--protocol", self.protocol.is_some(), texts),
            ("--no-bos", self.no_bos, texts),
            ("--trace", !self.trace.is_empty(), &[Trace]),
            ("--batch", self.batch.is_some(), &[Perplexity]),
            ("--questions", !self.questions.is_empty(), &[LongContext]),
            ("--context", !self.context.is_empty(), &[LongContext]),
            ("--feed", self.feed.is_some(), &[LongContext]),
            (
                "--prompt",
                self.prompt.is_some(),
                &[Perplexity, Trace, Recall, Speed],
            ),
            (
                "--prompt-rule",
                self.prompt_rule.is_some(),
                &[Perplexity, Trace, Recall, LongContext],
            ),
            (
                "--seeds",
                self.seeds.is_some(),
                &[Perplexity, Trace, Recall, LongContext],
            ),
            ("--train-steps", self.train_steps.is_some(), &[Recall]),
        ];
        for (flag, given, tasks) in belongs {
            if given && !tasks.contains(&self.task) {
                let names = tasks.iter().filter_map(|task| task.to_possible_value());
                let names: Vec<String> = names.map(|name| name.get_name().to_owned()).collect();
                wrong(&format!("{flag} belongs to --task {}", names.join(", ")));
            }
        }
        if self.train_steps.is_some() && !self.model.is_empty() {
            wrong("--train-steps: --model has been trained");
        }
        let sources = self.sources();
        let generated = |source: &Source| Source::GENERATORS.contains(source);
        let files = !sources.is_empty() && !sources.iter().any(generated);
        if files && self.model.is_empty() && self.prompt.is_some() {
            wrong("--prompt: traces in files know their own prompts");
        }
    }

    /// The reference, and every policy in every storage, with the full cache in each but the first.
    fn stored(&self, policies: Vec<Choice>) -> (Choice, Vec<Choice>) {
        let (sinks, recent) = match self.task {
            KvTask::LongContext => (4, 32),
            _ => (0, 0),
        };
        let (sinks, recent) = (self.sinks.unwrap_or(sinks), self.recent.unwrap_or(recent));
        let policies: Vec<Choice> = policies
            .into_iter()
            .map(|choice| choice.protecting(sinks, recent))
            .collect();
        if self.kv_dtype.is_empty() {
            return (Choice::full(), policies);
        }
        let stored = |choice: &Choice, index: usize| {
            let choice = choice.clone().stored_as(&self.kv_dtype[index], index == 0);
            choice.expect("the parser knows the same names")
        };
        let full = |index| stored(&Choice::full(), index);
        let all = (0..self.kv_dtype.len()).flat_map(|index| {
            let own = (index > 0).then(|| full(index));
            let evicting = policies.iter().filter(|choice| !choice.is_full());
            own.into_iter()
                .chain(evicting.map(move |choice| stored(choice, index)))
        });
        (full(0), all.collect())
    }

    /// Models and their text, where both are given.
    fn texts(&self) -> Vec<perplexity::Config> {
        match &self.text {
            Some(text) if !self.model.is_empty() => {
                let of = |model: &PathBuf| perplexity::Config {
                    model: model.clone(),
                    text: text.clone(),
                    protocol: super::with_bos(
                        self.protocol.unwrap_or(ProtocolKind::Windows),
                        !self.no_bos,
                    ),
                };
                self.model.iter().map(of).collect()
            }
            None if self.model.is_empty() => Vec::new(),
            _ => wrong("--model DIR and --text FILE go together"),
        }
    }
}

/// What budgets are shares of.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BudgetOf {
    /// Tokens of the full cache
    Tokens,
    /// Bytes of the full cache
    Bytes,
}

/// Storage that evicts with every policy.
fn stored() -> impl Iterator<Item = &'static str> {
    let per_token = |name: &&str| !name.ends_with("per-channel");
    kv_lazy::StorageConfig::PRESETS
        .into_iter()
        .filter(per_token)
}

fn alpha(text: &str) -> Result<f32, String> {
    match text.parse() {
        Ok(weight) if (0.0..1.0).contains(&weight) => Ok(weight),
        _ => Err("expected an attention weight, at least 0 and below 1".into()),
    }
}
