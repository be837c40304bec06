//! Examples to train and evaluate on.

mod augment;
mod labels;

pub(crate) use augment::Draw;
pub use augment::{Augment, Augmentation};
pub(crate) use labels::step_labels;

use crate::{
    error::{Error, Result},
    rnn::input::{Input, InputKind},
};

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

/// What is asked of the network, after the last step of each sequence or at every step.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Targets {
    /// A class: cross-entropy and accuracy.
    Classes(Vec<u32>),
    /// A number: squared error.
    Values(Vec<f32>),
    /// A probability at every step of every sequence: binary cross-entropy of a logit; against targets of 0 and 1 also
    /// accuracy at 0.5 and the area under the ROC curve.
    Binary {
        /// The probabilities, all sequences one after the other.
        targets: Vec<f32>,
        /// Which steps count.
        counted: Vec<bool>,
    },
}

/// Sequences of any lengths with their targets.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequences {
    inputs: Inputs,
    /// Start of each sequence in steps, and the end of the last.
    starts: Vec<usize>,
    targets: Targets,
    augmentation: Option<Augmentation>,
    /// Steps without input that follow each sequence.
    tail: usize,
    /// The symbol that stands for no input.
    blank: u32,
}

impl Sequences {
    /// From concatenated inputs, the length of each sequence, and the targets.
    ///
    /// # Errors
    /// The values are no whole vectors (of one component at least), the lengths do not add up to the inputs, a length is 0, or
    /// there are not as many targets as sequences (for [`Targets::Binary`], as steps).
    pub fn new(inputs: Inputs, lengths: &[usize], targets: Targets) -> Result<Self> {
        let mut starts = vec![0];
        starts.extend(lengths.iter().scan(0usize, |at, n| {
            *at = at.saturating_add(*n);
            Some(*at)
        }));
        let wrong = |reason: String| Error::Setting {
            setting: "sequences",
            reason,
        };
        let steps = match &inputs {
            Inputs::Symbols(s) => s.len(),
            Inputs::Vectors { dim, values } => {
                if *dim == 0 || !values.len().is_multiple_of(*dim) {
                    return Err(wrong(format!(
                        "{} values are no vectors of {dim} components",
                        values.len()
                    )));
                }
                values.len() / dim
            }
        };
        let (count, wanted) = match &targets {
            Targets::Classes(c) => (c.len(), lengths.len()),
            Targets::Values(v) => (v.len(), lengths.len()),
            Targets::Binary { targets, counted } if targets.len() == counted.len() => {
                (targets.len(), steps)
            }
            Targets::Binary { counted, .. } => (counted.len(), usize::MAX),
        };
        if starts[lengths.len()] != steps || lengths.contains(&0) || count != wanted {
            return Err(wrong(format!(
                "{} lengths that sum to {}, {steps} steps, {count} targets",
                lengths.len(),
                starts[lengths.len()]
            )));
        }
        Ok(Self {
            inputs,
            starts,
            targets,
            augmentation: None,
            tail: 0,
            blank: 0,
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

    /// Steps of sequence `k`, those without input aside.
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

    /// Steps of the longest sequence.
    pub(crate) fn longest(&self) -> usize {
        let lengths = (0..self.len()).map(|k| self.length(k) + self.tail);
        lengths.max().unwrap_or(0)
    }

    /// The same with `steps` more steps after each sequence, which read zeros, or the symbol `blank`. What is asked for after
    /// a step is asked for that much later.
    fn with_tail(mut self, steps: usize, blank: u32) -> Self {
        (self.tail, self.blank) = (steps, blank);
        self
    }

    /// The same with augmentation in training.
    ///
    /// # Errors
    /// The sequences are not images of the augmentation's size.
    pub fn augmented(mut self, augmentation: Augmentation) -> Result<Self> {
        let size = augmentation.size();
        let fits = match &self.inputs {
            Inputs::Symbols(_) => false,
            Inputs::Vectors { dim, .. } => (0..self.len()).all(|k| self.length(k) * dim == size),
        };
        if !fits {
            return Err(Error::Setting {
                setting: "augmentation",
                reason: format!("the sequences are not images of {size} pixels"),
            });
        }
        self.augmentation = Some(augmentation);
        Ok(self)
    }

    /// Lays the chosen sequences side by side, time-major, padded at the end; with a `draw`, images are augmented.
    pub(crate) fn batch(&self, chosen: &[usize], draw: Option<Draw>, into: &mut Batch) {
        let batch = chosen.len();
        let longest = chosen.iter().map(|&k| self.length(k)).max().unwrap_or(0);
        let steps = longest + self.tail;
        (into.steps, into.size) = (steps, batch);
        into.rows.clear();
        into.targets.clear();
        for (b, &k) in chosen.iter().enumerate() {
            match &self.targets {
                Targets::Classes(_) | Targets::Values(_) => {
                    into.rows.push((self.length(k) - 1 + self.tail) * batch + b);
                    into.targets.push(k);
                }
                Targets::Binary { counted, .. } => {
                    for t in (0..self.length(k)).filter(|t| counted[self.starts[k] + t]) {
                        into.rows.push((t + self.tail) * batch + b);
                        into.targets.push(self.starts[k] + t);
                    }
                }
            }
        }
        into.lengths.clear();
        let lengths = chosen.iter().map(|&k| self.length(k) + self.tail);
        into.lengths.extend(lengths);
        match (&self.inputs, &mut into.inputs) {
            (Inputs::Symbols(from), Inputs::Symbols(to)) => {
                to.clear();
                to.resize(steps * batch, 0);
                for (b, &k) in chosen.iter().enumerate() {
                    for (t, &s) in from[self.starts[k]..self.starts[k + 1]].iter().enumerate() {
                        to[t * batch + b] = s;
                    }
                    for t in self.length(k)..self.length(k) + self.tail {
                        to[t * batch + b] = self.blank;
                    }
                }
            }
            (Inputs::Vectors { dim, values: from }, Inputs::Vectors { values: to, .. }) => {
                to.clear();
                to.resize(steps * batch * dim, 0.0);
                let augmentation = self.augmentation.as_ref().zip(draw);
                let mut image = Vec::new();
                for (b, &k) in chosen.iter().enumerate() {
                    let mut values = &from[self.starts[k] * dim..self.starts[k + 1] * dim];
                    if let Some((augmentation, draw)) = augmentation {
                        augmentation.apply(values, draw, k as u64, &mut image);
                        values = &image;
                    }
                    for (t, v) in values.chunks_exact(*dim).enumerate() {
                        to[(t * batch + b) * dim..][..*dim].copy_from_slice(v);
                    }
                }
            }
            _ => debug_assert!(false, "buffer of another kind"),
        }
    }
}

/// Sequences laid side by side, time-major.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    /// `[steps, size]`, padded at the end of the shorter sequences.
    pub(crate) inputs: Inputs,
    /// Number of steps.
    pub(crate) steps: usize,
    /// Number of sequences.
    pub(crate) size: usize,
    /// True steps of each sequence.
    pub(crate) lengths: Vec<usize>,
    /// Positions (`step * size + place`) that are read out.
    pub(crate) rows: Vec<usize>,
    /// For each of them, the index of its target.
    pub(crate) targets: Vec<usize>,
}

impl Batch {
    /// An empty batch for sequences of that kind.
    pub(crate) fn new(like: &Inputs) -> Self {
        let inputs = match like {
            Inputs::Symbols(_) => Inputs::Symbols(Vec::new()),
            Inputs::Vectors { dim, .. } => Inputs::Vectors {
                dim: *dim,
                values: Vec::new(),
            },
        };
        Self {
            inputs,
            steps: 0,
            size: 0,
            lengths: Vec::new(),
            rows: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// The positions that are read out in the steps `from..to`, counted from there, and the indices of their targets.
    pub(crate) fn in_window(&self, from: usize, to: usize) -> (Vec<usize>, Vec<usize>) {
        let range = from * self.size..to * self.size;
        let pairs = self.rows.iter().zip(&self.targets);
        pairs
            .filter(|(row, _)| range.contains(row))
            .map(|(row, target)| (row - range.start, *target))
            .unzip()
    }

    /// The inputs of the steps `from..to`.
    pub(crate) fn view(&self, from: usize, to: usize) -> Input<'_> {
        match &self.inputs {
            Inputs::Symbols(s) => Input::Symbols(&s[from * self.size..to * self.size]),
            Inputs::Vectors { dim, values } => {
                Input::Vectors(&values[from * self.size * dim..to * self.size * dim])
            }
        }
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
            Examples::Sequences(s) => !matches!(s.targets, Targets::Values(_)),
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
    pub input: InputKind,
    /// Width of its read-out.
    pub outputs: usize,
}

impl Dataset {
    /// The same with training images deformed in another way.
    ///
    /// # Errors
    /// The training examples are not images that are deformed in training.
    pub fn with_augment(mut self, kind: Augment) -> Result<Self> {
        let images = match &mut self.train {
            Examples::Sequences(s) => s.augmentation.take().map(|a| (s, a)),
            Examples::Text(_) => None,
        };
        let Some((sequences, augmentation)) = images else {
            return Err(Error::Setting {
                setting: "augmentation",
                reason: "the task has no images that are deformed in training".into(),
            });
        };
        sequences.augmentation = Some(augmentation.of_kind(kind));
        Ok(self)
    }

    /// Smallest and largest component of the input vectors of all splits; `None` for symbols.
    pub fn input_range(&self) -> Option<(f32, f32)> {
        let splits = [&self.train, &self.valid, &self.test].into_iter();
        let values = splits.filter_map(|split| match split {
            Examples::Sequences(s) => match s.inputs() {
                Inputs::Vectors { values, .. } => Some(values),
                Inputs::Symbols(_) => None,
            },
            Examples::Text(_) => None,
        });
        let ends = |(low, high): (f32, f32), v: &f32| (low.min(*v), high.max(*v));
        let mut range = None;
        for values in values {
            let start = range.unwrap_or((f32::INFINITY, f32::NEG_INFINITY));
            range = Some(values.iter().fold(start, ends));
        }
        // Steps without input read zeros, and so do images at their borders.
        range.map(|(low, high)| (low.min(0.0), high.max(0.0)))
    }

    /// The same with `steps` steps without input after each sequence, for a
    /// [`Wiring`](crate::wiring::Wiring) whose outputs come later. Symbols get one more for no input.
    ///
    /// # Errors
    /// Texts have no end to wait for, and embedded symbols no zero.
    pub fn with_extra_steps(mut self, steps: usize) -> Result<Self> {
        if steps == 0 {
            return Ok(self);
        }
        let refused = |what: &str| Error::Setting {
            setting: "wiring",
            reason: format!("{what} cannot be followed by steps without input"),
        };
        let blank = match &mut self.input {
            InputKind::Dense { .. } => 0,
            InputKind::OneHot { vocab } => {
                *vocab += 1;
                *vocab as u32 - 1
            }
            InputKind::Embedding { .. } => return Err(refused("embedded symbols")),
        };
        for split in [&mut self.train, &mut self.valid, &mut self.test] {
            let Examples::Sequences(s) = split else {
                return Err(refused("texts"));
            };
            *s = s.clone().with_tail(steps, blank);
        }
        Ok(self)
    }
}
