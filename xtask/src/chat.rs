//! Chat templates: Jinja programs that turn messages into the text that a model was trained on.

use anyhow::{Context, Result};
use causal_lm::TextTokenizer;
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
    let template = environment
        .template_from_str(template)
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
