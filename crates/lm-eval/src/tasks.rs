//! Zero-shot and few-shot tasks: multiple choice by log-likelihood, and generation with exact match.
//!
//! Prompts, choices and measures are those of EleutherAI's lm-evaluation-harness 0.4: arc_easy and arc_challenge 1.0, piqa
//! 1.0, hellaswag 1.0, boolq 2.0, mathqa 1.0 and gsm8k 3.0. `acc` takes the choice with the largest summed log-likelihood,
//! `acc_norm` the one with the largest log-likelihood per character of the choice, without the space that joins it to the
//! question; both take the first of equals. The harness leaves out BOS unless it is given `add_bos_token=True`; here BOS is
//! in front where the tokenizer has one, as for perplexity.

mod choice;
mod exact_match;
mod examples;
mod generation;
mod layout;

use causal_lm::{Decoder, TextTokenizer};
use serde::Serialize;
use tensor_io::Progress;

use crate::{Error, Result};
pub use examples::Examples;
pub use generation::end_tokens;
pub use layout::{Answer, Item, Layout, Task};

/// A model with its tokenizer, ready to answer questions.
#[derive(Debug)]
pub struct Evaluator<'a> {
    decoder: &'a Decoder<'a>,
    tokenizer: TextTokenizer,
    bos: Option<u32>,
    positions: usize,
}

/// How many questions to ask, and how long answers may be.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TaskOptions {
    /// Only the first of a file's questions; `None` for all.
    pub questions: Option<usize>,
    /// Tokens generated at most for an answer.
    pub max_new_tokens: usize,
}

impl Default for TaskOptions {
    fn default() -> Self {
        Self {
            questions: None,
            max_new_tokens: 256,
        }
    }
}

impl<'a> Evaluator<'a> {
    /// Prompts begin with BOS where the tokenizer has one, and may take all positions of the model.
    pub fn new(decoder: &'a Decoder<'a>, tokenizer: TextTokenizer) -> Self {
        Self {
            bos: tokenizer.bos(),
            positions: decoder.config().max_positions,
            decoder,
            tokenizer,
        }
    }

    /// Prompts begin with text.
    pub fn without_bos(self) -> Self {
        Self { bos: None, ..self }
    }

    /// Prompt and answer take at most `positions` positions.
    ///
    /// # Errors
    /// [`Error::Window`] where the model does not reach that far.
    pub fn with_positions(self, positions: usize) -> Result<Self> {
        let most = self.decoder.config().max_positions;
        if positions < 2 || positions > most {
            return Err(Error::Window {
                window: positions,
                least: 2,
                most,
            });
        }
        Ok(Self { positions, ..self })
    }

    /// Whether prompts begin with BOS.
    pub fn bos(&self) -> bool {
        self.bos.is_some()
    }

    /// Positions that prompt and answer take at most.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Asks the questions of a task, each after its examples.
    ///
    /// # Errors
    /// [`Error::NoRoom`], [`Error::TaskFile`] for a question that does not fit, and what running the model reports.
    pub fn answer(
        &self,
        task: &Task,
        examples: &Examples<'_>,
        options: &TaskOptions,
        progress: &dyn Progress,
    ) -> Result<Answers> {
        let count = options.questions.unwrap_or(usize::MAX);
        let count = count.min(task.items.len());
        if task.layout.is_generated() {
            let max = options.max_new_tokens;
            generation::answer(self, task, examples, count, max, progress)
        } else {
            choice::answer(self, task, examples, count, progress)
        }
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = self.tokenizer.encode(text)?;
        Ok(self.bos.into_iter().chain(tokens).collect())
    }
}

/// A model's answers to the questions of a task.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Answers {
    /// Whether each question was answered right, by the task's first measure: `acc`, or strict match.
    pub correct: Vec<bool>,
    /// The same by its second measure: `acc_norm`, or flexible extract.
    pub correct_by_second: Vec<bool>,
    /// Prompts that were cut on the left to fit.
    pub truncated: usize,
    /// Positions that went through the model a second, or tokens generated a second.
    pub tokens_per_second: f64,
    /// What was scored or generated for each question.
    pub samples: Vec<Sample>,
}

/// What was scored or generated for one question.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Sample {
    /// Multiple choice.
    Choice {
        /// Index of the question.
        item: usize,
        /// ln P(choice | question), in nats.
        log_likelihoods: Vec<f64>,
        /// Index of the right choice.
        right: usize,
    },
    /// Generation.
    Generated {
        /// Index of the question.
        item: usize,
        /// The answer.
        generated: String,
    },
}

impl Answers {
    /// Share of right answers by the first measure.
    pub fn accuracy(&self) -> Share {
        Share::of(&self.correct)
    }

    /// Share of right answers by the second measure.
    pub fn second_accuracy(&self) -> Share {
        Share::of(&self.correct_by_second)
    }
}

/// A share of questions.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Share {
    /// From 0 to 1.
    pub value: f64,
    /// Standard error of the mean over questions, sqrt(p (1 - p) / (n - 1)); `None` for a single question.
    pub standard_error: Option<f64>,
}

impl Share {
    /// Share of the questions that only one of two models answered right (arXiv 2407.09141), from the
    /// [answers](Answers::correct) of each.
    pub fn flips(ours: &[bool], theirs: &[bool]) -> Self {
        let pairs = ours.iter().zip(theirs);
        Self::of(&pairs.map(|(a, b)| a != b).collect::<Vec<_>>())
    }

    fn of(those: &[bool]) -> Self {
        let n = those.len() as f64;
        let p = those.iter().filter(|x| **x).count() as f64 / n;
        Self {
            value: p,
            standard_error: (those.len() > 1).then(|| (p * (1.0 - p) / (n - 1.0)).sqrt()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_error_is_that_of_a_mean() {
        // Values 1, 1, 1, 0: sample variance 1/4, over 4 questions.
        let share = Share::of(&[true, true, true, false]);
        assert_eq!((share.value, share.standard_error), (0.75, Some(0.25)));
        assert_eq!(Share::of(&[true]).standard_error, None);
    }
}
