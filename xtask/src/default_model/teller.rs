//! Text by choices, with an account of how likely it was.
//!
//! Every choice is written down as it is made, and no option of a choice begins with another, so the choices can be read
//! off the text: minus the logarithm of a text's probability is the sum over its choices, and no model that has not seen
//! the text can predict it in fewer nats on average.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Writes one document.
pub(super) struct Teller<'a> {
    rng: &'a mut ChaCha8Rng,
    text: String,
    nats: f64,
}

impl<'a> Teller<'a> {
    pub(super) fn new(rng: &'a mut ChaCha8Rng) -> Self {
        Self {
            rng,
            text: String::new(),
            nats: 0.0,
        }
    }

    /// The text and minus the logarithm of its probability.
    pub(super) fn finish(self) -> (String, f64) {
        (self.text, self.nats)
    }

    /// Writes what follows from what was written before.
    pub(super) fn say(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Writes one of `options` and `after` it; the option of rank i is drawn in proportion to 1 / (i + 2).
    pub(super) fn word<'w>(&mut self, options: &[&'w str], after: &str) -> &'w str {
        let weights: Vec<f64> = (0..options.len()).map(|i| 1.0 / (i as f64 + 2.0)).collect();
        let at = self.draw(&weights);
        self.write(options, at, after);
        options[at]
    }

    /// Writes one of `options`, drawn in proportion to its weight; returns its index.
    pub(super) fn choose(&mut self, options: &[(&str, f64)]) -> usize {
        let (texts, weights): (Vec<&str>, Vec<f64>) = options.iter().copied().unzip();
        let at = self.draw(&weights);
        self.write(&texts, at, "");
        at
    }

    /// Writes a number of `from..=to`, all equally likely, and `after` it.
    pub(super) fn number(&mut self, from: usize, to: usize, after: &str) -> usize {
        let at = self.draw(&vec![1.0; to - from + 1]);
        self.say(&format!("{}{after}", from + at));
        debug_assert!(after.starts_with(|c: char| !c.is_ascii_digit()));
        from + at
    }

    fn write(&mut self, options: &[&str], at: usize, after: &str) {
        debug_assert!(
            options.iter().enumerate().all(|(i, a)| {
                let mut others = options.iter().enumerate().filter(|(j, _)| *j != i);
                others.all(|(_, b)| !begins_with((b, after), (a, after)))
            }),
            "one of {options:?} begins with another"
        );
        self.say(options[at]);
        self.say(after);
    }

    fn draw(&mut self, weights: &[f64]) -> usize {
        let total: f64 = weights.iter().sum();
        let mut rest = self.rng.random::<f64>() * total;
        let mut at = 0;
        while at + 1 < weights.len() && rest >= weights[at] {
            rest -= weights[at];
            at += 1;
        }
        self.nats -= (weights[at] / total).ln();
        at
    }
}

/// Whether one text of two parts begins with another.
fn begins_with(text: (&str, &str), start: (&str, &str)) -> bool {
    let mut text = text.0.bytes().chain(text.1.bytes());
    let mut start = start.0.bytes().chain(start.1.bytes());
    start.all(|byte| text.next() == Some(byte))
}
