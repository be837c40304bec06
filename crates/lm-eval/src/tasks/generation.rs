//! Worked solutions, generated greedily and scored by the number at their end.

use std::ops::ControlFlow::Continue;
use std::time::Instant;

use causal_lm::{CacheSet, Decoder, GenerateOptions, Model, Snapshot, generate};
use serde_json::Value;
use tensor_io::{Config, Progress};

use super::exact_match::{flexible, strict, until_stop};
use super::layout::{Answer, Task};
use super::{Answers, Evaluator, Examples, Sample};
use crate::{Error, Result};

/// Tokens generated between two searches for a text that ends the answer.
const STRIDE: usize = 8;

/// Answers the first `count` questions of `task`: scored by the number after `####`, and by the last number.
pub(super) fn answer(
    evaluator: &Evaluator<'_>,
    task: &Task,
    examples: &Examples<'_>,
    count: usize,
    max_new_tokens: usize,
    progress: &dyn Progress,
) -> Result<Answers> {
    let positions = evaluator.positions;
    if max_new_tokens >= positions {
        return Err(Error::NoRoom {
            max_new_tokens,
            positions,
        });
    }
    progress.begin("generation", count as u64);
    let model = Model::load(evaluator.decoder)?;
    let mut generator = Generator {
        evaluator,
        cache: model.full_cache(1)?,
        model: &model,
        end: end_tokens(evaluator.decoder)?,
        shared: None,
    };
    let mut answers = Answers::default();
    let mut generated = 0;
    let start = Instant::now();
    for (i, item) in task.items.iter().take(count).enumerate() {
        let Answer::Worked(solution) = &item.answer else {
            continue;
        };
        let before = examples.before(i);
        let mut prompt = evaluator.encode(&(before.clone() + &item.prompt))?;
        let surplus = prompt.len().saturating_sub(positions - max_new_tokens);
        answers.truncated += usize::from(surplus > 0);
        prompt.drain(..surplus);
        let shared = common_prefix(&evaluator.encode(&before)?, &prompt);
        let (text, tokens) = generator.answer(&prompt, shared, max_new_tokens)?;
        generated += tokens;
        answers.correct.push(strict(&text, solution));
        answers.correct_by_second.push(flexible(&text, solution));
        answers.samples.push(Sample::Generated {
            item: i,
            generated: text,
        });
        progress.advance(1)?;
    }
    answers.tokens_per_second = generated as f64 / start.elapsed().as_secs_f64();
    Ok(answers)
}

/// Continues prompts, and keeps the cache of the examples that they share.
struct Generator<'a> {
    evaluator: &'a Evaluator<'a>,
    model: &'a Model<'a>,
    cache: CacheSet,
    end: Vec<u32>,
    shared: Option<(Vec<u32>, Snapshot)>,
}

impl Generator<'_> {
    /// The text that follows `prompt`, whose first `shared` tokens the next prompt may have too, and the number of tokens
    /// generated.
    fn answer(&mut self, prompt: &[u32], shared: usize, max: usize) -> Result<(String, usize)> {
        self.begin(&prompt[..shared])?;
        let mut options = GenerateOptions::new(0).with_stop(self.end.clone());
        let mut next = prompt[shared..].to_vec();
        let mut tokens: Vec<u32> = Vec::new();
        loop {
            options.max_new_tokens = STRIDE.min(max - tokens.len());
            let (model, cache) = (self.model, &mut self.cache);
            let generated = generate(model, cache, &next, &options, &mut |_| Continue(()))?.tokens;
            tokens.extend(&generated);
            let text = self.evaluator.tokenizer.decode(&tokens)?;
            let (answer, stopped) = until_stop(&text);
            let ended = generated.len() < options.max_new_tokens || tokens.len() == max;
            match generated.last() {
                Some(&last) if !stopped && !ended => next = vec![last],
                _ => return Ok((answer.to_owned(), tokens.len())),
            }
        }
    }

    /// Makes the cache hold `prefix` alone.
    fn begin(&mut self, prefix: &[u32]) -> Result<()> {
        match &self.shared {
            Some((held, snapshot)) if held == prefix => self
                .cache
                .restore(snapshot)
                .map_err(causal_lm::Error::from)?,
            _ => {
                self.cache.reset();
                self.shared = None;
                if !prefix.is_empty() {
                    self.model.forward(&[prefix], &mut self.cache)?;
                    self.shared = Some((prefix.to_vec(), self.cache.snapshot()));
                }
            }
        }
        Ok(())
    }
}

/// How many tokens `prompt` has in common with `examples`, leaving it at least one of its own.
fn common_prefix(examples: &[u32], prompt: &[u32]) -> usize {
    let same = examples.iter().zip(prompt).take_while(|(a, b)| a == b);
    same.count().min(prompt.len().saturating_sub(1))
}

/// The tokens that end a text: `eos_token_id` of generation_config.json, one or several, or else those of the model's
/// configuration.
///
/// # Errors
/// A generation_config.json that cannot be read.
pub fn end_tokens(decoder: &Decoder<'_>) -> Result<Vec<u32>> {
    let generation = decoder.checkpoint().dir().join("generation_config.json");
    let ids = match generation.exists() {
        true => Config::read(generation)?.get("eos_token_id").cloned(),
        false => None,
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    Ok(match ids {
        Some(Value::Array(several)) => several.iter().filter_map(id).collect(),
        Some(one) => id(&one).into_iter().collect(),
        None => decoder.config().eos.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_keeps_a_token_of_its_own() {
        assert_eq!(common_prefix(&[1, 2, 3], &[1, 2, 4, 5]), 2);
        assert_eq!(common_prefix(&[1, 2, 3], &[1, 2, 3]), 2);
        assert_eq!(common_prefix(&[], &[1]), 0);
    }
}
