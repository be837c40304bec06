//! How a text becomes windows and targets. Perplexities compare only where the protocol, the window and the text are the
//! same.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use causal_lm::{TextTokenizer, Windows};

use crate::scored::{ScoredWindows, Targets, TextSize};
use crate::{Error, Result};

/// The convention that windows and targets follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProtocolKind {
    /// The text is tokenised without special tokens and cut into consecutive windows. Each begins with BOS where the
    /// tokenizer has one; every token but the first is a target. What is left at the end is dropped.
    #[default]
    Windows,
    /// The same with windows of text alone.
    WindowsWithoutBos,
    /// The convention of the tables in the GPTQ paper and those after it: the text is tokenised with the tokenizer's own
    /// special tokens, and consecutive windows are cut from that. No window but the first has a BOS.
    Gptq,
    /// The rolling log-likelihood of EleutherAI's lm-evaluation-harness with the whole text as one document: every token of
    /// the text is a target exactly once, the first after BOS (or else EOS), the others after as many tokens as fit.
    Rolling,
}

impl ProtocolKind {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Windows,
        Self::WindowsWithoutBos,
        Self::Gptq,
        Self::Rolling,
    ];

    /// The name that [`FromStr`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Windows => "windows",
            Self::WindowsWithoutBos => "windows-no-bos",
            Self::Gptq => "gptq",
            Self::Rolling => "rolling",
        }
    }
}

impl fmt::Display for ProtocolKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ProtocolKind {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == name);
        known.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("expected one of {names}")
        })
    }
}

/// A convention and the positions of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Protocol {
    /// Convention.
    pub kind: ProtocolKind,
    /// Positions that go through the model at a time.
    pub window: usize,
}

impl Protocol {
    /// The protocol, for a model of `max_positions` positions.
    ///
    /// # Errors
    /// [`Error::Window`] where the model does not reach that far or no token is left to predict.
    pub fn new(kind: ProtocolKind, window: usize, max_positions: usize) -> Result<Self> {
        let least = match kind {
            ProtocolKind::Rolling => 1,
            _ => 2,
        };
        if window < least || window > max_positions {
            return Err(Error::Window {
                window,
                least,
                most: max_positions,
            });
        }
        Ok(Self { kind, window })
    }

    /// Windows and targets of a text.
    ///
    /// # Errors
    /// A text that the tokenizer refuses or that is too short, and [`Error::Protocol`] for rolling windows where the
    /// tokenizer has neither BOS nor EOS.
    pub fn evaluation(&self, tokenizer: &TextTokenizer, text: &str) -> Result<ScoredWindows> {
        match self.kind {
            ProtocolKind::Rolling => {
                let mut windows = self.rolling(tokenizer, &tokenizer.encode(text)?)?;
                windows.text = Some(TextSize::of(text));
                Ok(windows)
            }
            _ => Ok(self.windows(tokenizer, text)?.into()),
        }
    }

    /// The first `count` windows of [`Protocol::evaluation`], or all where there are fewer.
    ///
    /// # Errors
    /// As [`Protocol::evaluation`].
    pub fn first(
        &self,
        tokenizer: &TextTokenizer,
        text: &str,
        count: usize,
    ) -> Result<ScoredWindows> {
        if self.kind != ProtocolKind::Rolling {
            return Ok(self.windows(tokenizer, text)?.first(count).into());
        }
        let (tokens, ends) = tokenizer.encode_with_ends(text)?;
        let covered = count.saturating_mul(self.window);
        if covered >= tokens.len() {
            return self.evaluation(tokenizer, text);
        }
        let mut windows = self.rolling(tokenizer, &tokens[..covered])?;
        // A token may end within a character.
        let end = covered.checked_sub(1).map_or(0, |last| ends[last]);
        let end = (0..=end).rev().find(|&end| text.is_char_boundary(end));
        windows.text = end.map(|end| TextSize::of(&text[..end]));
        Ok(windows)
    }

    /// Windows to calibrate on, cut as for evaluation; for rolling windows, which overlap, as by
    /// [`ProtocolKind::Windows`].
    ///
    /// # Errors
    /// A text that the tokenizer refuses or that is shorter than a window.
    pub fn windows(&self, tokenizer: &TextTokenizer, text: &str) -> Result<Windows> {
        let (tokens, bos) = match self.kind {
            ProtocolKind::Windows | ProtocolKind::Rolling => {
                (tokenizer.encode(text)?, tokenizer.bos())
            }
            ProtocolKind::WindowsWithoutBos => (tokenizer.encode(text)?, None),
            ProtocolKind::Gptq => (tokenizer.encode_with_special_tokens(text)?, None),
        };
        Ok(Windows::cut(&tokens, self.window, bos)?)
    }

    /// Whether windows begin with BOS by this protocol.
    pub fn bos(&self, tokenizer: &TextTokenizer) -> bool {
        match self.kind {
            ProtocolKind::Windows => tokenizer.bos().is_some(),
            ProtocolKind::WindowsWithoutBos => false,
            // What the tokenizer itself puts in front of a text, or what replaces it, is in the first window alone.
            ProtocolKind::Gptq | ProtocolKind::Rolling => false,
        }
    }

    /// [`Protocol::evaluation`] of a file.
    ///
    /// # Errors
    /// As there, and a file that cannot be read.
    pub fn evaluation_file(
        &self,
        tokenizer: &TextTokenizer,
        path: impl AsRef<Path>,
    ) -> Result<ScoredWindows> {
        self.evaluation(tokenizer, &causal_lm::read_text(path)?)
    }

    /// Rolling windows: the first predicts its own tokens after a prefix, each later one the tokens after those of the one
    /// before; the last reaches back to as many positions as the others.
    fn rolling(&self, tokenizer: &TextTokenizer, tokens: &[u32]) -> Result<ScoredWindows> {
        let refuse = |reason: &str| Error::Protocol {
            protocol: self.kind.name(),
            reason: reason.into(),
        };
        let prefix = tokenizer.bos().or(tokenizer.eos());
        let prefix = prefix.ok_or_else(|| {
            refuse("the tokenizer has neither BOS nor EOS to predict the first token from")
        })?;
        if tokens.is_empty() {
            return Err(refuse("the text has no tokens"));
        }
        let length = self.window.min(tokens.len());
        let mut inputs = Vec::new();
        let mut targets = Vec::new();
        let mut done = 0;
        while done < tokens.len() {
            let end = (done + length).min(tokens.len());
            // The inputs are the `length` tokens before the last target, the prefix in front of the text.
            match (end - length).checked_sub(1) {
                None => {
                    inputs.push(prefix);
                    inputs.extend(&tokens[..end - 1]);
                }
                Some(start) => inputs.extend(&tokens[start..end - 1]),
            }
            targets.push(Targets {
                from: length - (end - done),
                tokens: tokens[done..end].to_vec(),
            });
            done = end;
        }
        Ok(ScoredWindows::new(
            Windows::of_length(inputs, length)?,
            targets,
        ))
    }
}
