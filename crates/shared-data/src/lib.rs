//! Tests that need the trained models and data sets in the folder `shared` beside the checkout.
//!
//! A test that needs something there is marked by [`needed`]: where it is absent, the test is reported as ignored and
//! says why; where it is present, the test runs. [`path`] gives the path of a file or folder.
//!
//! ```text
//! #[shared_data::needed("models/stories260K")]
//! #[test]
//! fn the_model_has_its_files() {
//!     let model = std::path::Path::new(shared_data::path!("models/stories260K"));
//!     assert!(model.join("config.json").is_file());
//! }
//! ```
//!
//! Crates take this one as a dev-dependency by path alone, without a version, so that it is left out of what they
//! publish.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use proc_macro::{Delimiter, TokenStream, TokenTree};

/// The folder beside the checkout.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared");

/// Marks a test that needs files or folders, which the arguments name relative to `shared`. Where one of them is absent
/// the test is ignored. It stands before `#[test]`, which reads the mark.
#[proc_macro_attribute]
pub fn needed(paths: TokenStream, test: TokenStream) -> TokenStream {
    let paths = match strings(paths) {
        Ok(paths) if !paths.is_empty() => paths,
        Ok(_) => return error("expected the paths that the test needs"),
        Err(error) => return error,
    };
    if !is_test(&test) {
        return error("expected to stand before #[test]");
    }
    match paths.iter().find(|path| !in_folder(path).exists()) {
        None => test,
        Some(absent) => {
            let reason = format!("needs shared/{absent} beside the checkout");
            let mut ignored: TokenStream = format!("#[ignore = {reason:?}]")
                .parse()
                .expect("an attribute with a quoted string is valid");
            ignored.extend(test);
            ignored
        }
    }
}

/// The path of a file or folder in `shared`, as a string literal.
#[proc_macro]
pub fn path(path: TokenStream) -> TokenStream {
    match strings(path) {
        Ok(paths) => match &paths[..] {
            [path] => format!("{:?}", in_folder(path))
                .parse()
                .expect("a quoted string is valid"),
            _ => error("expected one path"),
        },
        Err(error) => error,
    }
}

fn in_folder(path: &str) -> PathBuf {
    Path::new(FOLDER).join(path)
}

/// Whether an item has the attribute `#[test]`.
fn is_test(item: &TokenStream) -> bool {
    item.clone().into_iter().any(|token| match token {
        TokenTree::Group(group) => {
            group.delimiter() == Delimiter::Bracket && group.stream().to_string() == "test"
        }
        _ => false,
    })
}

/// The string literals of a list of arguments.
fn strings(list: TokenStream) -> Result<Vec<String>, TokenStream> {
    let mut strings = Vec::new();
    for token in list {
        match token {
            TokenTree::Punct(punct) if punct.as_char() == ',' => {}
            TokenTree::Literal(literal) => {
                let text = literal.to_string();
                let plain = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
                match plain {
                    Some(plain) if !plain.contains('\\') => strings.push(plain.into()),
                    _ => return Err(error("expected a plain string literal")),
                }
            }
            _ => return Err(error("expected string literals")),
        }
    }
    Ok(strings)
}

fn error(message: &str) -> TokenStream {
    format!("compile_error!({message:?});")
        .parse()
        .expect("a macro call with a quoted string is valid")
}
