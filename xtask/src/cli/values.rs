//! Values of flags that several commands take.

use std::num::NonZeroUsize;
use std::str::FromStr;

use eval_report::Budget;
use frontier::{TARGETS, Target};

use super::names;
use crate::suites::kv::policy::{Choice, PromptRule};

/// A policy that the parser has admitted.
pub(super) fn policy(name: &str, prompt: PromptRule, alpha: f32) -> Choice {
    Choice::named(name, prompt, alpha).expect("the parser knows the same names")
}

/// A number of things, at least one.
pub(super) fn positive(text: &str) -> Result<NonZeroUsize, String> {
    counted(text)
}

/// A number that is not 0, of any width.
pub(super) fn counted<T: FromStr>(text: &str) -> Result<T, String> {
    let number = text.parse();
    number.map_err(|_| "expected a whole number, at least 1".into())
}

/// A number that is not 0 and not more than `most`: beyond it a run would never end, or not fit into memory.
pub(super) fn up_to<T: FromStr>(
    most: u64,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| {
        let fits = |number: &u64| (1..=most).contains(number);
        match (text.parse(), text.parse().ok().filter(fits)) {
            (Ok(number), Some(_)) => Ok(number),
            _ => Err(format!(
                "expected a whole number, at least 1 and at most {most}"
            )),
        }
    }
}

/// A value that becomes part of a line.
pub(super) fn single_line(text: &str) -> Result<String, String> {
    match text.contains(['\n', '\r']) {
        true => Err("expected one line".into()),
        false => Ok(text.into()),
    }
}

/// A seed: the largest leave room for those of further runs, which are counted from it.
pub(super) fn seed(text: &str) -> Result<u64, String> {
    const MOST: u64 = i64::MAX as u64;
    match text.parse() {
        Ok(seed) if seed <= MOST => Ok(seed),
        _ => Err(format!("expected a whole number, at most {MOST}")),
    }
}

/// A number of runs with a seed each.
pub(super) fn seeds(text: &str) -> Result<NonZeroUsize, String> {
    match positive(text) {
        Ok(seeds) if seeds.get() > 1000 => Err("expected a whole number, 1 to 1000".into()),
        other => other,
    }
}

/// A number of tokens, of which the first is never a target.
pub(super) fn window(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(tokens) if tokens >= 2 => Ok(tokens),
        _ => Err("expected a number of tokens, at least 2 (the first is never a target)".into()),
    }
}

/// A fraction, at least 0 and below 1.
pub(super) fn ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..1.0).contains(&share) => Ok(share),
        _ => Err("expected a fraction, at least 0 and below 1".into()),
    }
}

/// A temperature of sampling.
pub(super) fn temperature(text: &str) -> Result<f64, String> {
    at_least_zero(text)
}

/// A weight in tokens, of which there may be fractions.
pub(super) fn tokens(text: &str) -> Result<f64, String> {
    at_least_zero(text)
}

fn at_least_zero(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if f64::is_finite(number) && number >= 0.0 => Ok(number),
        _ => Err("expected a finite number, at least 0".into()),
    }
}

/// A probability that is reached.
pub(super) fn probability(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if number > 0.0 && number <= 1.0 => Ok(number),
        _ => Err("expected a probability, above 0 and at most 1".into()),
    }
}

/// A number that is not infinite.
pub(super) fn finite(text: &str) -> Result<f32, String> {
    match text.parse() {
        Ok(number) if f32::is_finite(number) => Ok(number),
        _ => Err("expected a finite number".into()),
    }
}

/// Tokens that a cache holds, or a fraction of all.
pub(super) fn budget(text: &str) -> Result<Budget, String> {
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

/// The runtime whose files are written.
pub(super) fn target(name: &str) -> Result<Target, String> {
    names::parse(name, &TARGETS)
}

/// The names of those flags that were given.
pub(super) fn given<const N: usize>(flags: [(&'static str, bool); N]) -> Vec<&'static str> {
    let given = flags.into_iter().filter(|(_, given)| *given);
    given.map(|(flag, _)| flag).collect()
}
