//! Text by random choices, with their probabilities.
//!
//! Each choice is written as it is made, and no option of a choice begins with another option, so the choices can be
//! read off the text: minus the logarithm of a text's probability is the sum over its choices, and no model predicts
//! new text in fewer nats on average.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::Document;

/// Writes one document.
pub(super) struct Writer<'a> {
    rng: &'a mut ChaCha8Rng,
    document: Document,
}

impl<'a> Writer<'a> {
    pub(super) fn new(rng: &'a mut ChaCha8Rng) -> Self {
        Self {
            rng,
            document: Document {
                text: String::new(),
                choices: Vec::new(),
            },
        }
    }

    pub(super) fn finish(self) -> Document {
        self.document
    }

    /// Writes text that follows from what was written before.
    pub(super) fn write(&mut self, text: &str) {
        self.document.text.push_str(text);
    }

    /// Writes one of `options` and `after` it; the option of rank i is drawn in proportion to 1 / (i + 2).
    pub(super) fn word<'w>(&mut self, options: &[&'w str], after: &str) -> &'w str {
        let weights: Vec<f64> = (0..options.len()).map(|i| 1.0 / (i as f64 + 2.0)).collect();
        let (at, nats) = self.draw(&weights);
        self.option(options, at, after, nats);
        options[at]
    }

    /// Writes one of `options`, drawn in proportion to its weight; returns its index.
    pub(super) fn choose(&mut self, options: &[(&str, f64)]) -> usize {
        let (texts, weights): (Vec<&str>, Vec<f64>) = options.iter().copied().unzip();
        let (at, nats) = self.draw(&weights);
        self.option(&texts, at, "", nats);
        at
    }

    /// Writes a number of `from..=to`, all equally likely, and `after` it.
    pub(super) fn number(&mut self, from: usize, to: usize, after: &str) -> usize {
        debug_assert!(after.starts_with(|c: char| !c.is_ascii_digit()));
        let (at, nats) = self.draw(&vec![1.0; to - from + 1]);
        let number = from + at;
        self.write(&format!("{number}{after}"));
        self.chosen(nats);
        number
    }

    fn option(&mut self, options: &[&str], at: usize, after: &str, nats: f64) {
        debug_assert!(
            options.iter().enumerate().all(|(i, a)| {
                let mut others = options.iter().enumerate().filter(|(j, _)| *j != i);
                others.all(|(_, b)| !begins_with((b, after), (a, after)))
            }),
            "one of {options:?} begins with another"
        );
        self.write(options[at]);
        self.write(after);
        self.chosen(nats);
    }

    /// Records a choice that can be read off the text written so far.
    fn chosen(&mut self, nats: f64) {
        let end = self.document.text.len();
        self.document.choices.push((end, nats));
    }

    /// An index drawn in proportion to `weights`, and minus the logarithm of its probability.
    fn draw(&mut self, weights: &[f64]) -> (usize, f64) {
        let total: f64 = weights.iter().sum();
        let mut rest = self.rng.random::<f64>() * total;
        let mut at = 0;
        while at + 1 < weights.len() && rest >= weights[at] {
            rest -= weights[at];
            at += 1;
        }
        (at, -(weights[at] / total).ln())
    }
}

/// Whether one text of two parts begins with another.
fn begins_with(text: (&str, &str), start: (&str, &str)) -> bool {
    let mut text = text.0.bytes().chain(text.1.bytes());
    let mut start = start.0.bytes().chain(start.1.bytes());
    start.all(|byte| text.next() == Some(byte))
}
