//! Windows of text with the tokens of each that are scored.

use causal_lm::Windows;

/// Windows of one length and, for each, the tokens that its last positions predict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoredWindows {
    inputs: Windows,
    /// What follows the last positions of each window, one token for each of them.
    targets: Vec<Targets>,
    pub(crate) text: Option<TextSize>,
}

/// Targets of consecutive positions of a window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Targets {
    /// First position whose next token is scored.
    pub(crate) from: usize,
    /// The tokens after `from`, `from + 1`, ..
    pub(crate) tokens: Vec<u32>,
}

/// Size of the text that the targets cover, to normalise a log-likelihood by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextSize {
    /// Pieces between runs of white space, counted as `len(re.split(r"\s+", text))` does in Python.
    pub words: usize,
    /// Bytes in UTF-8.
    pub bytes: usize,
}

impl TextSize {
    /// The size of a whole text.
    pub fn of(text: &str) -> Self {
        let mut words = 1;
        let mut in_space = false;
        for c in text.chars() {
            words += usize::from(c.is_whitespace() && !in_space);
            in_space = c.is_whitespace();
        }
        Self {
            words,
            bytes: text.len(),
        }
    }
}

impl ScoredWindows {
    pub(crate) fn new(inputs: Windows, targets: Vec<Targets>) -> Self {
        debug_assert_eq!(inputs.count(), targets.len());
        Self {
            inputs,
            targets,
            text: None,
        }
    }

    /// What runs through the model.
    pub fn inputs(&self) -> &Windows {
        &self.inputs
    }

    /// Number of windows.
    pub fn count(&self) -> usize {
        self.targets.len()
    }

    /// Number of scored tokens.
    pub fn targets(&self) -> usize {
        self.targets.iter().map(|t| t.tokens.len()).sum()
    }

    /// For each window the first position whose next token is scored, and the tokens after it and the positions that
    /// follow.
    pub fn scored(&self) -> impl ExactSizeIterator<Item = (usize, &[u32])> {
        self.targets.iter().map(|t| (t.from, &t.tokens[..]))
    }

    /// The size of the text that the targets are, where they are all of it.
    pub fn text_size(&self) -> Option<TextSize> {
        self.text
    }

    /// Consecutive groups of at most `count` windows.
    pub(crate) fn groups(&self, count: usize) -> impl Iterator<Item = (Windows, &[Targets])> {
        let count = count.max(1);
        self.inputs.groups(count).zip(self.targets.chunks(count))
    }
}

/// Every token of a window but the first is scored.
impl From<Windows> for ScoredWindows {
    fn from(inputs: Windows) -> Self {
        let targets = inputs.iter().map(|window| Targets {
            from: 0,
            tokens: window[1..].to_vec(),
        });
        let targets = targets.collect();
        Self::new(inputs, targets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_as_by_a_split_at_white_space() {
        // len(re.split(r"\s+", text)) in Python.
        for (text, words) in [
            ("", 1),
            ("a", 1),
            ("a b", 2),
            (" a  b\n", 4),
            ("\n\n", 2),
            ("Ünïcode\u{a0}x\ty", 3),
        ] {
            assert_eq!(TextSize::of(text).words, words, "{text:?}");
        }
        assert_eq!(TextSize::of("é ").bytes, 3);
    }
}
