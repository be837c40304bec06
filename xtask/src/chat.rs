//! Chat templates: Jinja programs that turn messages into the text that a model was trained on.

use std::time::SystemTime;

use anyhow::{Context, Result};
use causal_lm::TextTokenizer;
use chrono::format::{Item, StrftimeItems};
use chrono::{DateTime, Utc};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, context};

/// The text in which a user says `message` and the model is about to answer.
///
/// # Errors
/// A template that is malformed, or refuses such a conversation.
pub(crate) fn render(template: &str, tokenizer: &TextTokenizer, message: &str) -> Result<String> {
    let mut environment = Environment::new();
    // As transformers sets it.
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise);
    environment.add_function("strftime_now", |format: String| {
        strftime(&format, SystemTime::now())
    });
    let template = without_generation(template);
    let template = environment
        .template_from_str(&template)
        .context("malformed")?;
    let special = |token: Option<u32>| token.and_then(|token| tokenizer.token(token));
    let text = template.render(context! {
        messages => vec![context! { role => "user", content => message }],
        add_generation_prompt => true,
        bos_token => special(tokenizer.bos()).unwrap_or_default(),
        eos_token => special(tokenizer.eos()).unwrap_or_default(),
    })?;
    Ok(text)
}

/// The template with `{% generation %}` and `{% endgeneration %}`, by which transformers marks what a model has said, as a condition
/// that always holds: the white space around tags goes as it would.
fn without_generation(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, behind)) = rest.split_once("{%") {
        out += before;
        out += "{%";
        rest = behind;
        let Some((tag, _)) = behind.split_once("%}") else {
            continue;
        };
        let word = tag.trim_matches(['-', '+']).trim();
        let condition = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out += &tag.replacen(word, condition, 1);
        rest = &behind[tag.len()..];
    }
    out + rest
}

/// `strftime_now` of transformers: a time in the form of Python's `strftime`, here in UTC.
fn strftime(format: &str, now: SystemTime) -> Result<String, Error> {
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if items.contains(&Item::Error) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: {format:?} is no format of dates"),
        ));
    }
    let now = DateTime::<Utc>::from(now);
    Ok(now.format_with_items(items.iter()).to_string())
}

/// `raise_exception` of transformers: the template's own refusals.
fn raise(reason: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, reason))
}

/// The methods of Python's strings and dictionaries that templates call.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if value.kind() == ValueKind::Map {
        return match name {
            "items" => state.apply_filter("items", std::slice::from_ref(value)),
            "keys" => Ok(value.try_iter()?.collect()),
            "get" => {
                let (key, default): (Value, Option<Value>) = from_args(args)?;
                let found = value.get_item(&key)?;
                Ok(match found.is_undefined() {
                    true => default.unwrap_or_else(|| Value::from(())),
                    false => found,
                })
            }
            _ => Err(ErrorKind::UnknownMethod.into()),
        };
    }
    let Some(text) = value.as_str() else {
        return Err(ErrorKind::UnknownMethod.into());
    };
    let pattern = || -> Result<String, Error> {
        let (pattern,): (String,) = from_args(args)?;
        Ok(pattern)
    };
    // Without an argument white space is stripped, else the characters of the argument.
    let strip = |start: bool, end: bool| -> Result<Value, Error> {
        let (set,): (Option<String>,) = from_args(args)?;
        let is_stripped = |c: char| match &set {
            None => c.is_whitespace(),
            Some(set) => set.contains(c),
        };
        let mut text = text;
        if start {
            text = text.trim_start_matches(is_stripped);
        }
        if end {
            text = text.trim_end_matches(is_stripped);
        }
        Ok(text.into())
    };
    match name {
        "strip" => strip(true, true),
        "lstrip" => strip(true, false),
        "rstrip" => strip(false, true),
        "startswith" => Ok(text.starts_with(&pattern()?).into()),
        "endswith" => Ok(text.ends_with(&pattern()?).into()),
        "split" => Ok(match args {
            [] => text.split_whitespace().map(Value::from).collect(),
            _ => text.split(&pattern()?).map(Value::from).collect(),
        }),
        "replace" => {
            let (from, to): (String, String) = from_args(args)?;
            Ok(text.replace(&from, &to).into())
        }
        "upper" => Ok(text.to_uppercase().into()),
        "lower" => Ok(text.to_lowercase().into()),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn dates_are_those_of_python() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        // datetime.fromtimestamp(seconds, timezone.utc).strftime(format)
        for (seconds, format, expected) in [
            (0, "%Y-%m-%d %H:%M:%S %A", "1970-01-01 00:00:00 Thursday"),
            (
                951_782_399,
                "%d %b %Y, %a %I:%M %p",
                "28 Feb 2000, Mon 11:59 PM",
            ),
            (951_782_400, "%B %-d, %y", "February 29, 00"),
            (951_868_800, "%-d.%-m.", "1.3."),
            (1_735_689_599, "%d %B %Y", "31 December 2024"),
            (1_735_689_600, "%d %b %Y", "01 Jan 2025"),
            (4_107_542_400, "%d %m %Y 100%%", "01 03 2100 100%"),
        ] {
            assert_eq!(strftime(format, at(seconds)).unwrap(), expected);
        }
        let error = strftime("on %Q", at(0)).unwrap_err().to_string();
        assert!(error.contains("%Q"), "{error}");
    }

    #[test]
    fn blocks_that_mark_what_a_model_said_change_nothing() {
        let environment = Environment::new();
        let rendered = |template: &str| {
            let template = without_generation(template);
            environment.render_str(&template, ()).unwrap()
        };
        assert_eq!(
            rendered("a {% generation %} b {% endgeneration %} c"),
            "a  b  c"
        );
        assert_eq!(
            rendered("a {%- generation -%} b {%-endgeneration-%} c"),
            "abc"
        );
        let other = "{% for generation in [1] %}{{ generation }}{% endfor %} {%";
        assert_eq!(without_generation(other), other);
    }
}
