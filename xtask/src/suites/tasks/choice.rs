//! Multiple choice by the log-likelihood of each choice.

use anyhow::{Context, Result};
use causal_lm::{Continuations, Error, Likelihoods};
use serde_json::json;

use super::examples::Examples;
use super::layout::{Answer, Data};
use super::{Answers, Subject};
use crate::bar::Bar;

/// Answers the first `count` questions of `data`: by log-likelihood, and by log-likelihood per character.
pub(crate) fn answer(
    subject: &Subject<'_>,
    data: &Data,
    examples: &Examples<'_>,
    count: usize,
    progress: &Bar,
) -> Result<Answers> {
    let mut questions = Vec::with_capacity(count);
    let mut encoded = Vec::with_capacity(count);
    for (i, item) in data.items.iter().take(count).enumerate() {
        let Answer::Choice { choices, right } = &item.answer else {
            continue;
        };
        let context = examples.before(i) + &item.prompt;
        let continuations: Vec<String> = choices.iter().map(|text| format!(" {text}")).collect();
        encoded.push(Continuations::encode(
            &subject.tokenizer,
            subject.bos,
            &context,
            &continuations,
        )?);
        questions.push((choices, *right));
    }
    let likelihoods = Likelihoods::measure(subject.decoder, &encoded, subject.positions, progress);
    let likelihoods = match likelihoods {
        Err(error @ Error::Continuation { .. }) => {
            Err(error).with_context(|| data.path.display().to_string())
        }
        other => Ok(other?),
    }?;
    let scores = &likelihoods.log_likelihoods;
    let mut answers = Answers {
        truncated: likelihoods.truncated,
        tokens_per_second: likelihoods.tokens_per_second(),
        ..Answers::default()
    };
    for (i, ((choices, right), scores)) in questions.iter().zip(scores).enumerate() {
        let per_character = scores.iter().zip(*choices);
        let per_character = per_character.map(|(score, text)| score / text.chars().count() as f64);
        answers
            .first
            .push(first_largest(scores.iter().copied()) == Some(*right));
        answers
            .second
            .push(first_largest(per_character) == Some(*right));
        answers
            .samples
            .push(json!({"item": i, "log_likelihoods": scores, "right": right}));
    }
    Ok(answers)
}

/// Index of the largest value, the first of several.
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
