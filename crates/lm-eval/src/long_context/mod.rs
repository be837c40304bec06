//! Questions about long contexts that a small chat model can answer as long as it sees all of it: relatives of RULER's tasks (arXiv 2404.06654).
//!
//! A context is lines of dull sentences with the facts on lines of their own. Questions come after it, so that whatever compresses a cache of the context
//! has not seen them. Answers are teacher-forced: an answer is exact where every token of it is the most likely one, which is when greedy decoding would give it. It is
//! chosen where greedy decoding gives it that may only spell one of the candidates: what else the text could have answered.

mod text;

use std::ops::Range;

use candle_core::{DType, Tensor};
use causal_lm::{TextTokenizer, cross_entropy};
use rand::seq::{IndexedRandom, SliceRandom, index};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::{Error, Result};
use text::{NOUNS, SENTENCES};

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Questions {
    /// Four numbers under two to eight names.
    Needle2,
    /// The same among four.
    Needle4,
    /// The same among eight.
    Needle8,
    /// The value of a variable that is set to another: one hop, two chains.
    Track,
    /// The word that is given most often.
    Frequent,
    /// All that is in one of two boxes.
    Gather,
    /// Eight words from the beginning.
    Copy,
}

impl Questions {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Needle2,
        Self::Needle4,
        Self::Needle8,
        Self::Track,
        Self::Frequent,
        Self::Gather,
        Self::Copy,
    ];

    /// Name on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Needle2 => "needle-2",
            Self::Needle4 => "needle-4",
            Self::Needle8 => "needle-8",
            Self::Track => "track",
            Self::Frequent => "frequent",
            Self::Gather => "gather",
            Self::Copy => "copy",
        }
    }

    /// The questions of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// A line on what is asked.
    pub const fn about(self) -> &'static str {
        match self {
            Self::Needle2 => "Two names with a number each; both numbers are asked for.",
            Self::Needle4 => "Four names with a number each; all four numbers are asked for.",
            Self::Needle8 => "Eight names with a number each; four of the numbers are asked for.",
            Self::Track => {
                "Two variables with a value and two that are set to these; the values of the latter are asked for."
            }
            Self::Frequent => {
                "Five words, one of them given eight times and the others once; the frequent one is asked for."
            }
            Self::Gather => "Two boxes with two things each; all things of each box are asked for.",
            Self::Copy => "Eight words at the beginning, to be repeated; each word counts.",
        }
    }
}

/// A context and the questions about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Example {
    /// Tokens of the context, from the first of the text on.
    pub context: Vec<u32>,
    /// Questions, each to be asked alone after the context.
    pub questions: Vec<Question>,
}

/// A question with its answer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Question {
    /// Tokens of the question, the beginning of the answer and the answer.
    pub tokens: Vec<u32>,
    /// Tokens of each part of the answer that counts.
    pub parts: Vec<Range<usize>>,
    /// What else each part could have been, as the tokens in its place and the one that follows; empty where there is nothing to choose between.
    pub others: Vec<Vec<Vec<u32>>>,
}

/// How a question was answered.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Answer {
    /// Share of the parts whose every token is the most likely one.
    pub exact: f64,
    /// Share of the parts that are chosen among the candidates; none where there are no others.
    pub choice: Option<f64>,
    /// Cross-entropy of the answer's tokens, summed, in nats.
    pub nats: f64,
    /// Tokens of the answer.
    pub tokens: usize,
}

impl Question {
    /// A question of those tokens, with the parts of its answer.
    pub fn new(tokens: Vec<u32>, parts: Vec<Range<usize>>) -> Self {
        Self {
            tokens,
            parts,
            others: Vec::new(),
        }
    }

    /// The same where each part could have been one of `others` instead.
    #[must_use]
    pub fn among(mut self, others: Vec<Vec<Vec<u32>>>) -> Self {
        self.others = others;
        self
    }

    /// Whether a part is chosen: at every token, it is more likely than what the candidates that agree so far go on with. `rows` predict the part's tokens and the one
    /// that follows.
    fn chooses(&self, part: &Range<usize>, others: &[Vec<u32>], rows: &[Vec<f32>]) -> bool {
        let right = &self.tokens[part.start..];
        let mut agree: Vec<&[u32]> = others.iter().map(Vec::as_slice).collect();
        rows.iter()
            .zip(right)
            .enumerate()
            .all(|(i, (row, &token))| {
                let score = |token: u32| row.get(token as usize).copied();
                let beaten = agree
                    .iter()
                    .filter_map(|other| other.get(i))
                    .all(|&other| other == token || score(token) > score(other));
                agree.retain(|other| other.get(i) == Some(&token));
                beaten
            })
    }

    /// Scores `logits` `[tokens − 1, vocab]`, of which row i predicts token i + 1.
    ///
    /// # Errors
    /// Logits of another number of tokens or that are not finite.
    pub fn score(&self, logits: &Tensor) -> Result<Answer> {
        let logits = logits.to_dtype(DType::F32)?;
        let mut answer = Answer::default();
        for part in &self.parts {
            let rows = logits.narrow(0, part.start - 1, part.len())?;
            let wanted = &self.tokens[part.clone()];
            let nats: f64 = cross_entropy(&rows, wanted)?.iter().sum();
            if !nats.is_finite() {
                return Err(Error::LongContext(format!(
                    "the logits of a question of {} tokens are not finite",
                    self.tokens.len()
                )));
            }
            let best = rows.argmax(1)?.to_vec1::<u32>()?;
            answer.exact += f64::from(u8::from(best == wanted)) / self.parts.len() as f64;
            answer.nats += nats;
            answer.tokens += part.len();
        }
        if !self.others.is_empty() {
            let rows = logits.dim(0)?;
            let mut chosen = 0;
            for (part, others) in self.parts.iter().zip(&self.others) {
                let count = (part.len() + 1).min(rows + 1 - part.start);
                let rows = logits.narrow(0, part.start - 1, count)?.to_vec2::<f32>()?;
                chosen += usize::from(self.chooses(part, others, &rows));
            }
            answer.choice = Some(chosen as f64 / self.parts.len() as f64);
        }
        Ok(answer)
    }
}

/// A question and the answer as text: what the answer begins with, and its parts with what stands between.
struct Asked {
    question: String,
    begin: String,
    parts: Vec<String>,
    between: &'static str,
    /// What each part could have been instead.
    others: Vec<String>,
}

impl Asked {
    fn one(question: String, begin: String, answer: String) -> Self {
        Self {
            question,
            begin,
            parts: vec![answer],
            between: "",
            others: Vec::new(),
        }
    }
}

/// Candidates of a number, itself included.
const CANDIDATES: usize = 4;

/// Gives every question three other numbers: those that the other questions ask for and, where these do not suffice, some that the text does not have.
fn choose_among(asked: &mut [Asked], rng: &mut ChaCha8Rng) {
    let all: Vec<String> = asked.iter().flat_map(|asked| asked.parts.clone()).collect();
    for asked in asked {
        let mut others: Vec<String> = Vec::with_capacity(CANDIDATES - 1);
        let digits = asked.parts[0].len() as u32;
        let is_new = |number: &String, others: &[String], answer: &String| {
            number != answer && !others.contains(number)
        };
        for number in &all {
            if others.len() + 1 < CANDIDATES && is_new(number, &others, &asked.parts[0]) {
                others.push(number.clone());
            }
        }
        while others.len() + 1 < CANDIDATES {
            let number = number(rng, digits);
            if is_new(&number, &others, &asked.parts[0]) && !all.contains(&number) {
                others.push(number);
            }
        }
        asked.others = others;
    }
}

/// The facts of an example: lines, in the order in which they are to stand, and what is asked.
struct Facts {
    lines: Vec<String>,
    /// Whether the lines stand at the beginning, in place of anywhere.
    first: bool,
    asked: Vec<Asked>,
}

fn nouns(rng: &mut ChaCha8Rng, count: usize) -> Vec<&'static str> {
    let chosen = index::sample(rng, NOUNS.len(), count);
    chosen.into_iter().map(|i| NOUNS[i]).collect()
}

fn number(rng: &mut ChaCha8Rng, digits: u32) -> String {
    let least = 10u32.pow(digits - 1);
    rng.random_range(least..10 * least).to_string()
}

fn needles(rng: &mut ChaCha8Rng, count: usize) -> Facts {
    let facts: Vec<(&str, String)> = nouns(rng, count)
        .into_iter()
        .map(|noun| (noun, number(rng, 4)))
        .collect();
    let line = |(noun, number): &(&str, String)| {
        format!("The special magic number for {noun} is {number}.")
    };
    let lines = facts.iter().map(line).collect();
    let asked = facts.choose_multiple(rng, 4).map(|(noun, number)| {
        let question =
            format!("What is the special magic number for {noun} mentioned in the text?");
        let begin = format!("The special magic number for {noun} is");
        Asked::one(question, begin, number.clone())
    });
    let asked = asked.collect();
    Facts {
        lines,
        first: false,
        asked,
    }
}

fn track(rng: &mut ChaCha8Rng) -> Facts {
    let mut names: Vec<String> = Vec::new();
    while names.len() < 4 {
        let name: String = (0..3).map(|_| rng.random_range('A'..='Z')).collect();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut lines = Vec::new();
    let mut asked = Vec::new();
    for pair in names.chunks(2) {
        let value = number(rng, 5);
        lines.push(format!("VAR {} = {value}", pair[0]));
        lines.push(format!("VAR {} = VAR {}", pair[1], pair[0]));
        let question = format!("What is the value of VAR {} in the text?", pair[1]);
        asked.push(Asked::one(
            question,
            format!("The value of VAR {} is", pair[1]),
            value,
        ));
    }
    // Values before what is set to them; the chains are interleaved.
    if rng.random() {
        lines.swap(1, 2);
    }
    Facts {
        lines,
        first: false,
        asked,
    }
}

fn frequent(rng: &mut ChaCha8Rng) -> Facts {
    let words = nouns(rng, 5);
    let mut lines: Vec<String> = [words[0]; 7]
        .iter()
        .chain(&words)
        .map(|word| format!("The word is {word}."))
        .collect();
    lines.shuffle(rng);
    let question = "Which word is given most often in the text?".to_owned();
    let others = words[1..].iter().map(|&word| word.to_owned()).collect();
    let asked = vec![Asked {
        others,
        ..Asked::one(question, "The word is".into(), words[0].into())
    }];
    Facts {
        lines,
        first: false,
        asked,
    }
}

fn gather(rng: &mut ChaCha8Rng) -> Facts {
    let things = nouns(rng, 4);
    let mut lines: Vec<(usize, &str)> = things
        .iter()
        .enumerate()
        .map(|(i, t)| (i % 2, *t))
        .collect();
    lines.shuffle(rng);
    let boxes = ["red", "blue"];
    let asked = (0..2).map(|which| {
        let of = |other: bool| {
            let own = lines.iter().filter(move |(b, _)| (*b == which) != other);
            own.map(|(_, thing)| (*thing).to_owned()).collect()
        };
        Asked {
            question: format!("Which things are in the {} box?", boxes[which]),
            begin: format!("The things in the {} box are the", boxes[which]),
            parts: of(false),
            between: " and the",
            // The things of the other box.
            others: of(true),
        }
    });
    let asked = asked.collect();
    let line =
        |(which, thing): &(usize, &str)| format!("The {thing} is in the {} box.", boxes[*which]);
    Facts {
        lines: lines.iter().map(line).collect(),
        first: false,
        asked,
    }
}

fn copy(rng: &mut ChaCha8Rng) -> Facts {
    let words = nouns(rng, 8);
    Facts {
        lines: vec![format!("Remember these words: {}.", words.join(" "))],
        first: true,
        asked: vec![Asked {
            question: "Repeat the words that you were told to remember.".into(),
            begin: "The words are:".into(),
            parts: words.into_iter().map(str::to_owned).collect(),
            between: "",
            others: Vec::new(),
        }],
    }
}

/// How a chat is written.
struct Chat {
    before: &'static str,
    ask: &'static str,
    answer: &'static str,
}

/// ChatML.
const CHAT: Chat = Chat {
    before: "<|im_start|>user\n",
    ask: "\n",
    answer: "<|im_end|>\n<|im_start|>assistant\n",
};
/// For tokenizers without its markers.
const PLAIN: Chat = Chat {
    before: "",
    ask: "\nQuestion: ",
    answer: "\nAnswer: ",
};

const INSTRUCTION: &str =
    "Read the following text carefully. Questions about it will come later.\n\n";

/// The example of an index: a context of about `tokens` tokens, at most.
///
/// # Errors
/// A context too short for its facts; what the tokenizer refuses.
pub fn example(
    kind: Questions,
    tokenizer: &TextTokenizer,
    tokens: usize,
    seed: u64,
    index: u64,
) -> Result<Example> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index << 8 | kind as u64);
    let mut facts = match kind {
        Questions::Needle2 => needles(&mut rng, 2),
        Questions::Needle4 => needles(&mut rng, 4),
        Questions::Needle8 => needles(&mut rng, 8),
        Questions::Track => track(&mut rng),
        Questions::Frequent => frequent(&mut rng),
        Questions::Gather => gather(&mut rng),
        Questions::Copy => copy(&mut rng),
    };
    if matches!(
        kind,
        Questions::Needle2 | Questions::Needle4 | Questions::Needle8 | Questions::Track
    ) {
        // From a stream of its own, so that candidates change no text.
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(1 << 63 | index << 8 | kind as u64);
        choose_among(&mut facts.asked, &mut rng);
    }
    let markers = tokenizer.encode("<|im_start|>")?.len() == 1;
    let chat = if markers { CHAT } else { PLAIN };
    let start = format!("{}{INSTRUCTION}", chat.before);
    let start = match tokenizer.bos() {
        // The chat may begin with BOS itself.
        Some(bos) => {
            let tokens = tokenizer.encode(&start)?;
            if tokens.first() == Some(&bos) {
                tokens
            } else {
                [vec![bos], tokens].concat()
            }
        }
        None => tokenizer.encode(&start)?,
    };
    let encode = |line: &str| tokenizer.encode(&format!("{line}\n"));
    let lines = facts
        .lines
        .iter()
        .map(|line| encode(line))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let used = start.len() + lines.iter().map(Vec::len).sum::<usize>();
    let mut noise = Vec::new();
    let mut room = tokens.saturating_sub(used);
    loop {
        let sentences: Vec<&str> = (0..5)
            .filter_map(|_| SENTENCES.choose(&mut rng).copied())
            .collect();
        let line = encode(&sentences.join(" "))?;
        if line.len() > room {
            break;
        }
        room -= line.len();
        noise.push(line);
    }
    if noise.len() < facts.lines.len() {
        return Err(Error::LongContext(format!(
            "a context of {tokens} tokens: too short for the {} facts of {} and a line between each",
            facts.lines.len(),
            kind.name()
        )));
    }
    let mut context = start;
    if facts.first {
        context.extend(lines.iter().flatten());
        context.extend(noise.iter().flatten());
    } else {
        // Before which line of noise each fact stands.
        let mut at = index::sample(&mut rng, noise.len(), lines.len()).into_vec();
        at.sort_unstable();
        let mut facts = at.into_iter().zip(lines).peekable();
        for (position, line) in noise.iter().enumerate() {
            if let Some((_, fact)) = facts.next_if(|(at, _)| *at == position) {
                context.extend(fact);
            }
            context.extend(line);
        }
    }
    let questions = facts
        .asked
        .iter()
        .map(|asked| question(asked, &chat, tokenizer));
    Ok(Example {
        context,
        questions: questions.collect::<Result<_>>()?,
    })
}

/// A question as tokens, with the tokens of its answer's parts.
fn question(asked: &Asked, chat: &Chat, tokenizer: &TextTokenizer) -> Result<Question> {
    let mut text = format!(
        "{}{}{}{}",
        chat.ask, asked.question, chat.answer, asked.begin
    );
    let mut spans = Vec::with_capacity(asked.parts.len());
    for (i, part) in asked.parts.iter().enumerate() {
        if i > 0 {
            text += asked.between;
        }
        let from = text.len();
        text.push(' ');
        text += part;
        spans.push(from..text.len());
    }
    text.push('.');
    let (tokens, ends) = tokenizer.encode_with_ends(&text)?;
    // A token belongs to the part in which it ends.
    let parts = spans.iter().map(|span| {
        let token = |byte: usize| ends.partition_point(|&end| end <= byte);
        token(span.start)..token(span.end)
    });
    let parts: Vec<Range<usize>> = parts.collect();
    if let Some(part) = parts.iter().find(|part| part.is_empty() || part.start == 0) {
        return Err(Error::LongContext(format!(
            "the tokenizer leaves no tokens for an answer of {:?}: {part:?}",
            asked.parts
        )));
    }
    let instead = |(part, span): (&Range<usize>, &Range<usize>)| -> Result<Vec<Vec<u32>>> {
        let follows = tokens.get(part.end).copied();
        let one = |other: &String| -> Result<Vec<u32>> {
            let (mut other, _) =
                tokenizer.encode_with_ends(&format!("{} {other}", &text[..span.start]))?;
            let mut other = other.split_off(part.start.min(other.len()));
            other.extend(follows);
            Ok(other)
        };
        asked.others.iter().map(one).collect()
    };
    let others = match asked.others.is_empty() {
        true => Vec::new(),
        false => (parts.iter().zip(&spans).map(instead)).collect::<Result<_>>()?,
    };
    Ok(Question::new(tokens, parts).among(others))
}
