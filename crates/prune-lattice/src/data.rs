//! Examples to train and evaluate on.

use crate::error::{Error, Result};

/// What the sequences consist of.
#[derive(Debug, Clone, PartialEq)]
pub enum Inputs {
    /// One symbol a step.
    Symbols(Vec<u32>),
    /// One vector a step.
    Vectors {
        /// Width of a vector.
        dim: usize,
        /// All vectors of all sequences.
        values: Vec<f32>,
    },
}

/// What is asked after the last step of each sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// A class: cross-entropy and accuracy.
    Classes(Vec<u32>),
    /// A number: squared error.
    Values(Vec<f32>),
}

/// Sequences of any lengths with one target each.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequences {
    inputs: Inputs,
    /// Start of each sequence in steps, and the end of the last.
    starts: Vec<usize>,
    targets: Targets,
}

impl Sequences {
    /// From concatenated inputs, the length of each sequence, and the targets.
    ///
    /// # Errors
    /// The lengths do not add up to the inputs, a length is 0, or there are not as many targets as sequences.
    pub fn new(inputs: Inputs, lengths: &[usize], targets: Targets) -> Result<Self> {
        let mut starts = vec![0];
        starts.extend(lengths.iter().scan(0, |at, n| {
            *at += n;
            Some(*at)
        }));
        let steps = match &inputs {
            Inputs::Symbols(s) => s.len(),
            Inputs::Vectors { dim, values } => values.len() / (*dim).max(1),
        };
        let count = match &targets {
            Targets::Classes(c) => c.len(),
            Targets::Values(v) => v.len(),
        };
        if starts[lengths.len()] != steps || lengths.contains(&0) || count != lengths.len() {
            let reason = format!(
                "{} lengths that sum to {}, {steps} steps, {count} targets",
                lengths.len(),
                starts[lengths.len()]
            );
            return Err(Error::Setting {
                setting: "sequences",
                reason,
            });
        }
        Ok(Self {
            inputs,
            starts,
            targets,
        })
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Steps of sequence `k`.
    pub fn length(&self, k: usize) -> usize {
        self.starts[k + 1] - self.starts[k]
    }

    /// The inputs of all sequences.
    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// The targets.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// The symbols of sequence `k`, for symbol inputs.
    pub fn symbols(&self, k: usize) -> Option<&[u32]> {
        match &self.inputs {
            Inputs::Symbols(s) => Some(&s[self.starts[k]..self.starts[k + 1]]),
            Inputs::Vectors { .. } => None,
        }
    }

    /// Lays the chosen sequences side by side, time-major, padded at the end; returns the number of steps and fills `rows`
    /// with the position (`step * batch + place`) of each sequence's last true step.
    pub(crate) fn batch(
        &self,
        chosen: &[usize],
        into: &mut Inputs,
        rows: &mut Vec<usize>,
    ) -> usize {
        let batch = chosen.len();
        let steps = chosen.iter().map(|&k| self.length(k)).max().unwrap_or(0);
        rows.clear();
        rows.extend(
            chosen
                .iter()
                .enumerate()
                .map(|(b, &k)| (self.length(k) - 1) * batch + b),
        );
        match (&self.inputs, into) {
            (Inputs::Symbols(from), Inputs::Symbols(to)) => {
                to.clear();
                to.resize(steps * batch, 0);
                for (b, &k) in chosen.iter().enumerate() {
                    for (t, &s) in from[self.starts[k]..self.starts[k + 1]].iter().enumerate() {
                        to[t * batch + b] = s;
                    }
                }
            }
            (Inputs::Vectors { dim, values: from }, Inputs::Vectors { values: to, .. }) => {
                to.clear();
                to.resize(steps * batch * dim, 0.0);
                for (b, &k) in chosen.iter().enumerate() {
                    for (t, v) in from[self.starts[k] * dim..self.starts[k + 1] * dim]
                        .chunks_exact(*dim)
                        .enumerate()
                    {
                        to[(t * batch + b) * dim..][..*dim].copy_from_slice(v);
                    }
                }
            }
            _ => debug_assert!(false, "buffer of another kind"),
        }
        steps
    }
}

/// Examples of one split.
#[derive(Debug, Clone, PartialEq)]
pub enum Examples {
    /// One target per sequence.
    Sequences(Sequences),
    /// A text: the next symbol is the target at every step, the state runs through.
    Text(Vec<u32>),
}

impl Examples {
    /// Whether targets are classes (accuracy makes sense).
    pub(crate) fn classes(&self) -> bool {
        match self {
            Examples::Text(_) => true,
            Examples::Sequences(s) => matches!(s.targets, Targets::Classes(_)),
        }
    }
}

/// Training, validation and test examples, and what network they ask for.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// For the gradients.
    pub train: Examples,
    /// For early stopping and every choice.
    pub valid: Examples,
    /// For the reported numbers.
    pub test: Examples,
    /// What a network reads.
    pub input: crate::rnn::InputKind,
    /// Width of its read-out.
    pub outputs: usize,
}
