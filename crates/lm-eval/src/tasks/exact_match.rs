//! Whether a generated solution ends in the right number, by the filters of gsm8k 3.0 in the lm-evaluation-harness.

use std::sync::LazyLock;

use regex::Regex;

use super::layout::pattern;

/// Texts that end a generated answer.
pub(super) const STOPS: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];

/// The answer where none is found; it is never right.
const NONE: &str = "[invalid]";

/// The text up to the first of [`STOPS`], and whether there is one.
pub(super) fn until_stop(text: &str) -> (&str, bool) {
    let end = STOPS.iter().filter_map(|stop| text.find(stop)).min();
    (&text[..end.unwrap_or(text.len())], end.is_some())
}

/// Whether the number after the first `####` is that of `solution`: strict-match.
pub(super) fn strict(generated: &str, solution: &str) -> bool {
    static MARKED: LazyLock<Regex> = LazyLock::new(|| pattern(r"#### (-?[0-9.,]+)"));
    let found = MARKED.captures(generated);
    let found = found.map_or(NONE, |groups| groups.extract::<1>().1[0]);
    normal(found) == normal(solution)
}

/// Whether the last number is that of `solution`: flexible-extract.
pub(super) fn flexible(generated: &str, solution: &str) -> bool {
    static NUMBER: LazyLock<Regex> = LazyLock::new(|| pattern(r"-?[$0-9.,]{2,}|-?[0-9]+"));
    let found = NUMBER.find_iter(generated).last();
    normal(found.map_or(NONE, |number| number.as_str())) == normal(solution)
}

/// An answer without parts that are ignored: commas, dollar signs, everything up to `#### `, a full stop at the end.
fn normal(text: &str) -> String {
    static IGNORED: LazyLock<[Regex; 4]> =
        LazyLock::new(|| [",", r"\$", "(?s).*#### ", r"\.$"].map(pattern));
    let text = IGNORED
        .iter()
        .fold(text.trim().to_owned(), |text, ignored| {
            ignored.replace_all(&text, "").into_owned()
        });
    text.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOLUTION: &str = "She has 1,000 + 200 = <<1000+200=1200>>1,200.\n#### 1,200";

    #[test]
    fn strict_wants_the_mark_and_takes_the_first() {
        assert!(strict("So\n#### 1200", SOLUTION));
        assert!(strict("#### 1,200.\n\nmore #### 7", SOLUTION));
        assert!(!strict("#### 7\n#### 1200", SOLUTION));
        assert!(!strict("The answer is 1200", SOLUTION));
        assert!(
            !strict("#### $1200", SOLUTION),
            "the dollar stands in the way"
        );
        assert!(!strict("", SOLUTION));
    }

    #[test]
    fn flexible_takes_the_last_number() {
        assert!(flexible("The answer is $1,200.", SOLUTION));
        assert!(flexible("#### 7 and then 1200", SOLUTION));
        assert!(!flexible("1200 of 3", SOLUTION));
        assert!(!flexible("none", SOLUTION));
        assert!(flexible("minus -5", "#### -5"));
    }

    #[test]
    fn an_answer_ends_where_the_next_question_begins() {
        assert_eq!(
            until_stop("4\n#### 4\n\nQuestion: x </s>"),
            ("4\n#### 4\n\n", true)
        );
        assert_eq!(until_stop("4"), ("4", false));
    }
}
