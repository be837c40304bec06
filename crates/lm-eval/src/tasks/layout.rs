//! Questions from JSONL files, in the layouts that the tasks are published in.
//!
//! Prompts, choices and right answers are those of the lm-evaluation-harness; the module above names the versions. The
//! layout of a file is recognised by the fields of its first line.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// What is wrong with a line.
type Reason<T> = std::result::Result<T, String>;

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What the model is asked.
    pub prompt: String,
    /// The right answer.
    pub answer: Answer,
}

/// The right answer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// One of several.
    Choice {
        /// Texts to choose from.
        choices: Vec<String>,
        /// Index of the right one.
        right: usize,
    },
    /// A worked solution that ends in `#### number`.
    Worked(String),
}

impl Item {
    /// The question with its answer, as an example in a few-shot prompt.
    pub fn example(&self) -> String {
        let answer = match &self.answer {
            Answer::Choice { choices, right } => &choices[*right],
            Answer::Worked(text) => text,
        };
        format!("{} {answer}", self.prompt)
    }
}

/// The fields of a file's questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Layout {
    /// question, choices {text, label}, answerKey; or as first published, question {stem, choices [{text, label}]}.
    Arc,
    /// goal, sol1, sol2, label.
    Piqa,
    /// ctx_a and ctx_b or else ctx, endings, label, and activity_label.
    HellaSwag,
    /// passage, question, answer; or label in its place.
    BoolQ,
    /// Problem, options `a ) .. , b ) ..`, correct.
    MathQa,
    /// question, answer that ends in `#### number`.
    Gsm8k,
}

/// The questions of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Task {
    /// The file.
    pub path: PathBuf,
    /// Its layout.
    pub layout: Layout,
    /// The questions in their order, at least one.
    pub items: Vec<Item>,
}

impl Task {
    /// Reads a file of one JSON object a line; empty lines are skipped.
    ///
    /// # Errors
    /// [`Error::TaskFile`] for a file that cannot be read or has no question, and [`Error::TaskLine`] for a line that is not
    /// a question of the first one's layout.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let of_file = |reason: String| Error::TaskFile {
            path: path.into(),
            reason,
        };
        let text = tensor_io::read_text(path).map_err(|e| of_file(e.to_string()))?;
        let mut layout = None;
        let mut items = Vec::new();
        for (i, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let item = question_of_line(line, &mut layout).map_err(|reason| Error::TaskLine {
                path: path.into(),
                line: i + 1,
                reason,
            });
            items.push(item?);
        }
        match layout {
            Some(layout) => Ok(Self {
                path: path.into(),
                layout,
                items,
            }),
            None => Err(of_file("the file has no questions".into())),
        }
    }

    /// Name of the task: that of the file without its extension.
    pub fn name(&self) -> String {
        let stem = self.path.file_stem().unwrap_or(self.path.as_os_str());
        stem.to_string_lossy().into_owned()
    }
}

/// Reads a line; `layout` is that of the lines before it.
fn question_of_line(line: &str, layout: &mut Option<Layout>) -> Reason<Item> {
    let fields: Map<String, Value> =
        serde_json::from_str(line).map_err(|e| format!("expected a JSON object: {e}"))?;
    let layout = match layout {
        Some(layout) => *layout,
        None => *layout.insert(Layout::of(&fields)?),
    };
    layout
        .item(&Fields(&fields))
        .map_err(|reason| format!("taken for {}: {reason}", layout.name()))
}

impl Layout {
    /// Each layout with the fields that distinguish it.
    const ALL: [(Layout, &[&str]); 7] = [
        (Layout::Arc, &["question", "choices", "answerKey"]),
        (Layout::Arc, &["question", "answerKey"]),
        (Layout::Piqa, &["goal", "sol1", "sol2"]),
        (Layout::HellaSwag, &["endings", "label"]),
        (Layout::BoolQ, &["passage", "question"]),
        (Layout::MathQa, &["Problem", "options", "correct"]),
        (Layout::Gsm8k, &["question", "answer"]),
    ];

    fn of(fields: &Map<String, Value>) -> Reason<Self> {
        let fits = |names: &[&str]| names.iter().all(|name| fields.contains_key(*name));
        if let Some((layout, _)) = Self::ALL.iter().find(|(_, names)| fits(names)) {
            return Ok(*layout);
        }
        let known = Self::ALL
            .iter()
            .map(|(layout, names)| format!("{} ({})", layout.name(), names.join(", ")));
        Err(format!(
            "the fields {} are those of no known layout: {}",
            fields.keys().cloned().collect::<Vec<_>>().join(", "),
            known.collect::<Vec<_>>().join("; ")
        ))
    }

    /// The layout's name.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Arc => "ARC",
            Layout::Piqa => "PIQA",
            Layout::HellaSwag => "HellaSwag",
            Layout::BoolQ => "BoolQ",
            Layout::MathQa => "MathQA",
            Layout::Gsm8k => "GSM8K",
        }
    }

    /// Whether answers are generated rather than chosen.
    pub fn is_generated(self) -> bool {
        self == Layout::Gsm8k
    }

    fn item(self, fields: &Fields<'_>) -> Reason<Item> {
        match self {
            Layout::Arc => arc(fields),
            Layout::Piqa => choice(
                question(fields.text("goal")?),
                vec![fields.text("sol1")?.into(), fields.text("sol2")?.into()],
                fields.index("label")?,
            ),
            Layout::HellaSwag => hella_swag(fields),
            Layout::BoolQ => {
                let name = if fields.0.contains_key("answer") {
                    "answer"
                } else {
                    "label"
                };
                let right = match fields.0.get(name) {
                    Some(Value::Bool(yes)) => usize::from(*yes),
                    _ => fields.index(name)?,
                };
                let (passage, asked) = (fields.text("passage")?, fields.text("question")?);
                let prompt = format!("{passage}\nQuestion: {asked}?\nAnswer:");
                choice(prompt, vec!["no".into(), "yes".into()], right)
            }
            Layout::MathQa => {
                let correct = fields.text("correct")?;
                let right = "abcde".find(correct).filter(|_| correct.len() == 1);
                choice(
                    question(fields.text("Problem")?),
                    math_qa_options(fields.text("options")?),
                    right.ok_or_else(|| {
                        format!("field correct: expected one of a to e, found {correct:?}")
                    })?,
                )
            }
            Layout::Gsm8k => {
                let answer = fields.text("answer")?;
                if !answer.contains("#### ") {
                    return Err(
                        "field answer: expected a solution that ends in #### and a number".into(),
                    );
                }
                Ok(Item {
                    prompt: question(fields.text("question")?),
                    answer: Answer::Worked(answer.into()),
                })
            }
        }
    }
}

/// The prompt that most tasks share.
fn question(text: &str) -> String {
    format!("Question: {text}\nAnswer:")
}

fn choice(prompt: String, choices: Vec<String>, right: usize) -> Reason<Item> {
    if choices.len() < 2 || right >= choices.len() {
        return Err(format!(
            "choice {right} (counted from 0) is right, of {} choices",
            choices.len()
        ));
    }
    let answer = Answer::Choice { choices, right };
    Ok(Item { prompt, answer })
}

fn arc(fields: &Fields<'_>) -> Reason<Item> {
    let (asked, texts, labels) = match fields.0.get("question") {
        Some(Value::Object(nested)) => {
            let nested = Fields(nested);
            let choices = nested.list("choices")?;
            let column = |name: &str| -> Reason<Vec<String>> {
                let part = |choice: &Value| choice[name].as_str().map(String::from);
                let parts: Option<_> = choices.iter().map(part).collect();
                parts.ok_or_else(|| format!("field choices: expected {name} in each"))
            };
            (nested.text("stem")?, column("text")?, column("label")?)
        }
        _ => {
            let choices = fields.0.get("choices").and_then(Value::as_object);
            let choices = Fields(choices.ok_or("field choices: expected text and label")?);
            (
                fields.text("question")?,
                choices.texts("text")?,
                choices.texts("label")?,
            )
        }
    };
    if texts.len() != labels.len() {
        return Err(format!(
            "field choices: {} texts and {} labels",
            texts.len(),
            labels.len()
        ));
    }
    if let Some(again) = (1..labels.len()).find(|&i| labels[..i].contains(&labels[i])) {
        return Err(format!(
            "field choices: label {:?} stands twice",
            labels[again]
        ));
    }
    let key = fields.text("answerKey")?;
    let right = labels.iter().position(|label| label == key);
    let right = right
        .ok_or_else(|| format!("field answerKey: expected one of {labels:?}, found {key:?}"))?;
    choice(question(asked), texts, right)
}

fn hella_swag(fields: &Fields<'_>) -> Reason<Item> {
    let context = if fields.0.contains_key("ctx_a") {
        let (a, b) = (fields.text("ctx_a")?, fields.text("ctx_b")?);
        format!("{a} {}", capitalized(b))
    } else {
        fields.text("ctx")?.into()
    };
    let context = match fields.0.contains_key("activity_label") {
        true => format!("{}: {context}", fields.text("activity_label")?),
        false => context,
    };
    let endings = fields.texts("endings")?;
    choice(
        without_markup(&context),
        endings
            .iter()
            .map(|ending| without_markup(ending))
            .collect(),
        fields.index("label")?,
    )
}

/// HellaSwag's text without the marks that WikiHow left in it.
fn without_markup(text: &str) -> String {
    static BRACKETS: LazyLock<Regex> = LazyLock::new(|| pattern(r"\[.*?\]"));
    let text = text.trim().replace(" [title]", ". ");
    BRACKETS.replace_all(&text, "").replace("  ", " ")
}

/// The first letter in upper case and all others in lower.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(char::to_uppercase);
    first.into_iter().flatten().collect::<String>() + &letters.as_str().to_lowercase()
}

/// The options of `a ) 38 , b ) 27.675 , c ) 30 , d ) 2 , e ) none of these`. An option ends at its first comma that a
/// space follows, in the harness as here.
fn math_qa_options(options: &str) -> Vec<String> {
    static OPTION: LazyLock<Regex> = LazyLock::new(|| pattern(r"[abcd] \) .*?, |e \) .*?$"));
    let text = |found: regex::Match<'_>| found.as_str()[4..].trim_end_matches([' ', ',']).into();
    OPTION.find_iter(options).map(text).collect()
}

/// A regular expression of this crate's source.
pub(super) fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a pattern in the source is valid")
}

/// The fields of a line.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, name: &str, kind: &str) -> Reason<&'a Value> {
        let value = self.0.get(name);
        value.ok_or_else(|| format!("field {name}: expected {kind}, found none"))
    }

    fn text(&self, name: &str) -> Reason<&'a str> {
        let value = self.get(name, "text")?;
        value
            .as_str()
            .ok_or_else(|| format!("field {name}: expected text, found {value}"))
    }

    /// A number from 0, as a number or as text.
    fn index(&self, name: &str) -> Reason<usize> {
        let kind = "the number of a choice";
        let value = self.get(name, kind)?;
        let number = match value {
            Value::String(text) => text.parse().ok(),
            _ => value.as_u64().map(|number| number as usize),
        };
        number.ok_or_else(|| format!("field {name}: expected {kind}, found {value}"))
    }

    fn list(&self, name: &str) -> Reason<&'a [Value]> {
        let value = self.get(name, "a list")?;
        let list = value.as_array().map(Vec::as_slice);
        list.ok_or_else(|| format!("field {name}: expected a list, found {value}"))
    }

    fn texts(&self, name: &str) -> Reason<Vec<String>> {
        let texts = self.list(name)?.iter();
        let texts: Option<_> = texts.map(|text| text.as_str().map(String::from)).collect();
        texts.ok_or_else(|| format!("field {name}: expected a list of texts"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn item(line: Value) -> Item {
        let fields = line.as_object().unwrap();
        Layout::of(fields).unwrap().item(&Fields(fields)).unwrap()
    }

    fn chosen(prompt: &str, choices: &[&str], right: usize) -> Item {
        choice(
            prompt.into(),
            choices.iter().map(|c| c.to_string()).collect(),
            right,
        )
        .unwrap()
    }

    #[test]
    fn arc_is_read_in_both_of_its_forms() {
        let expected = chosen("Question: Why?\nAnswer:", &["so", "thus"], 1);
        let table = json!({"question": "Why?", "choices": {"text": ["so", "thus"], "label": ["1", "2"]}, "answerKey": "2"});
        let nested = json!({"question": {"stem": "Why?", "choices": [{"text": "so", "label": "1"}, {"text": "thus", "label": "2"}]}, "answerKey": "2"});
        assert_eq!(item(table), expected);
        assert_eq!(item(nested), expected);
    }

    #[test]
    fn arc_needs_a_label_of_its_own_for_each_text() {
        let refused = |texts: &[&str], labels: &[&str]| {
            let line = json!({"question": "Why?", "choices": {"text": texts, "label": labels}, "answerKey": "A"});
            let fields = line.as_object().unwrap();
            let read = Layout::of(fields).unwrap().item(&Fields(fields));
            read.unwrap_err()
        };
        assert_eq!(
            refused(&["so", "thus", "hence"], &["A", "B"]),
            "field choices: 3 texts and 2 labels"
        );
        assert_eq!(
            refused(&["so", "thus"], &["A", "A"]),
            "field choices: label \"A\" stands twice"
        );
    }

    #[test]
    fn piqa_keeps_spaces_of_its_solutions() {
        let line = json!({"goal": "dresser", "sol1": "pin ", "sol2": "wood  pin ", "label": 1});
        let expected = chosen("Question: dresser\nAnswer:", &["pin ", "wood  pin "], 1);
        assert_eq!(item(line), expected);
    }

    #[test]
    fn hella_swag_loses_its_marks_and_capitalises_the_second_sentence() {
        let line = json!({
            "activity_label": "Washing", "ctx_a": "[header] How to wash [title] Start.", "ctx_b": "a Man in NY",
            "endings": ["sits [substeps] down.", "runs  away. "], "label": "1", "ctx": "unused",
        });
        let expected = chosen(
            "Washing: How to wash. Start. A man in ny",
            &["sits down.", "runs away."],
            1,
        );
        assert_eq!(item(line), expected);
        let line = json!({"ctx": "A man", "endings": ["sits.", "runs."], "label": 0});
        assert_eq!(item(line), chosen("A man", &["sits.", "runs."], 0));
    }

    #[test]
    fn bool_q_is_read_with_answer_or_label() {
        let expected = chosen("P.\nQuestion: is it?\nAnswer:", &["no", "yes"], 1);
        for answer in [("answer", json!(true)), ("label", json!(1))] {
            let line = json!({"passage": "P.", "question": "is it", answer.0: answer.1});
            assert_eq!(item(line), expected);
        }
    }

    #[test]
    fn math_qa_options_end_at_a_comma_and_a_space() {
        let options =
            "a ) 38 , b ) 27.675 , c ) rs . 5,000 , d ) data inadequate , e ) none of these";
        let line = json!({"Problem": "p ?", "options": options, "correct": "c"});
        let choices = [
            "38",
            "27.675",
            "rs . 5,000",
            "data inadequate",
            "none of these",
        ];
        assert_eq!(item(line), chosen("Question: p ?\nAnswer:", &choices, 2));
    }

    #[test]
    fn an_example_is_the_prompt_with_its_answer() {
        let line = json!({"question": "1 + 1?", "answer": "Two.\n#### 2"});
        assert_eq!(
            item(line).example(),
            "Question: 1 + 1?\nAnswer: Two.\n#### 2"
        );
        assert_eq!(chosen("Q\nA:", &["x", "y"], 1).example(), "Q\nA: y");
    }

    #[test]
    fn a_line_that_is_no_question_is_named_by_file_line_and_field() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.jsonl");
        let good = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
        let error = |line: &str| {
            std::fs::write(&path, format!("{good}\n\n{line}\n")).unwrap();
            Task::read(&path).unwrap_err().to_string()
        };
        let with = |label: &str| good.replace("\"label\": 0", label);
        for (line, expected) in [
            (with("\"label\": 2"), "choice 2"),
            (with("\"label\": -1"), "field label: expected the number"),
            (
                with("\"other\": 0"),
                "field label: expected the number of a choice, found none",
            ),
            ("[1]".into(), "expected a JSON object"),
            ("{\"goal".into(), "expected a JSON object"),
        ] {
            let error = error(&line);
            assert!(
                error.contains("mine.jsonl:3: ") && error.contains(expected),
                "{error}"
            );
        }
        std::fs::write(&path, "{\"a\": 1, \"b\": 2}\n").unwrap();
        let error = Task::read(&path).unwrap_err().to_string();
        assert!(error.contains("mine.jsonl:1: the fields a, b"), "{error}");
        assert!(error.contains("PIQA (goal, sol1, sol2)"), "{error}");
        std::fs::write(&path, "\n").unwrap();
        assert!(
            Task::read(&path)
                .unwrap_err()
                .to_string()
                .contains("mine.jsonl: the file has no")
        );
    }
}
