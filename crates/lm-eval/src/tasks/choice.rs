//! Multiple choice by the log-likelihood of each choice.

use tensor_io::Progress;

use super::layout::{Answer, Task};
use super::{Answers, Evaluator, Examples, Sample};
use crate::likelihood::{Continuations, Likelihoods};
use crate::{Error, Result};

/// Answers the first `count` questions of `task`: by log-likelihood, and by log-likelihood per character.
pub(super) fn answer(
    evaluator: &Evaluator<'_>,
    task: &Task,
    examples: &Examples<'_>,
    count: usize,
    progress: &dyn Progress,
) -> Result<Answers> {
    let mut questions = Vec::with_capacity(count);
    let mut encoded = Vec::with_capacity(count);
    for (i, item) in task.items.iter().take(count).enumerate() {
        let Answer::Choice { choices, right } = &item.answer else {
            continue;
        };
        let context = examples.before(i) + &item.prompt;
        let continuations: Vec<String> = choices.iter().map(|text| format!(" {text}")).collect();
        encoded.push(Continuations::encode(
            &evaluator.tokenizer,
            evaluator.bos,
            &context,
            &continuations,
        )?);
        questions.push((choices, *right));
    }
    let likelihoods =
        Likelihoods::measure(evaluator.decoder, &encoded, evaluator.positions, progress);
    let likelihoods = likelihoods.map_err(|error| match error {
        error @ Error::Continuation { .. } => Error::TaskFile {
            path: task.path.clone(),
            reason: error.to_string(),
        },
        error => error,
    })?;
    let mut answers = Answers {
        truncated: likelihoods.truncated,
        tokens_per_second: likelihoods.tokens_per_second(),
        ..Answers::default()
    };
    let scores = likelihoods.log_likelihoods;
    for (item, ((choices, right), scores)) in questions.into_iter().zip(scores).enumerate() {
        let per_character = scores.iter().zip(choices);
        let per_character = per_character.map(|(score, text)| score / text.chars().count() as f64);
        let largest = first_largest(scores.iter().copied());
        answers.correct.push(largest == Some(right));
        let largest = first_largest(per_character);
        answers.correct_by_second.push(largest == Some(right));
        answers.samples.push(Sample::Choice {
            item,
            log_likelihoods: scores,
            right,
        });
    }
    Ok(answers)
}

/// Index of the largest value, the first of equals.
fn first_largest(values: impl Iterator<Item = f64>) -> Option<usize> {
    let larger = |best: Option<(usize, f64)>, (i, value): (usize, f64)| match best {
        Some((_, largest)) if value.total_cmp(&largest).is_le() => best,
        _ => Some((i, value)),
    };
    values.enumerate().fold(None, larger).map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_scores_the_first_counts() {
        assert_eq!(first_largest([-3.0, -1.0, -1.0, -2.0].into_iter()), Some(1));
        assert_eq!(first_largest([-3.0 / 0.0, -1e9].into_iter()), Some(1));
        assert_eq!(first_largest([].into_iter()), None);
    }
}
