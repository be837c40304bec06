//! Recording the moments of a network's states on examples.

use super::{Calibration, Moments, MomentsSum};
use crate::{
    data::{Batch, Examples},
    error::{Error, Result},
    names::with,
    rnn::{Input, InputKind, Rnn, State, Tape},
};
use serde::{Deserialize, Serialize};
use tensor_io::Progress;

/// How much to record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RecordConfig {
    /// Sequences read at most, from the first on; `None` reads all.
    pub sequences: Option<usize>,
    /// Symbols of a text read at most.
    pub symbols: Option<usize>,
    /// Sequences side by side. The moments do not depend on it, but for rounding.
    pub batch: usize,
}

with!(RecordConfig);

impl Default for RecordConfig {
    fn default() -> Self {
        Self {
            sequences: Some(2_000),
            symbols: Some(20_000),
            batch: 100,
        }
    }
}

/// Steps of a text in one pass.
const WINDOW: usize = 256;

/// What happened in one pass over a part of the examples.
struct Pass<'a> {
    input: Input<'a>,
    steps: usize,
    size: usize,
    /// True steps of each sequence.
    lengths: &'a [usize],
    /// Positions read out; `None`: all.
    rows: Option<&'a [usize]>,
    /// Whether the pass goes on where the last one ended.
    continues: bool,
}

/// Runs over the examples in parts.
fn passes(
    examples: &Examples,
    config: &RecordConfig,
    progress: &dyn Progress,
    mut each: impl FnMut(&Pass<'_>) -> Result<()>,
) -> Result<()> {
    if config.batch == 0 {
        return Err(Error::Setting {
            setting: "calibration",
            reason: "a batch of 0 sequences".into(),
        });
    }
    match examples {
        Examples::Sequences(data) => {
            let count = config.sequences.unwrap_or(usize::MAX).min(data.len());
            let order: Vec<usize> = (0..count).collect();
            progress.begin("recording states", count.div_ceil(config.batch) as u64);
            let mut batch = Batch::new(data.inputs());
            for chosen in order.chunks(config.batch) {
                data.batch(chosen, None, &mut batch);
                each(&Pass {
                    input: batch.view(0, batch.steps),
                    steps: batch.steps,
                    size: batch.size,
                    lengths: &batch.lengths,
                    rows: Some(&batch.rows),
                    continues: false,
                })?;
                progress.advance(1)?;
            }
        }
        Examples::Text(text) => {
            let text = &text[..config.symbols.unwrap_or(usize::MAX).min(text.len())];
            progress.begin("recording states", text.len().div_ceil(WINDOW) as u64);
            for (k, part) in text.chunks(WINDOW).enumerate() {
                each(&Pass {
                    input: Input::Symbols(part),
                    steps: part.len(),
                    size: 1,
                    lengths: &[part.len()],
                    rows: None,
                    continues: k > 0,
                })?;
                progress.advance(1)?;
            }
        }
    }
    Ok(())
}

/// A network that runs over the passes, its state carried from one to the next where they continue.
struct Runner<'a> {
    rnn: &'a Rnn,
    tape: Tape,
    state: State,
}

impl<'a> Runner<'a> {
    fn new(rnn: &'a Rnn) -> Self {
        Self {
            rnn,
            tape: Tape::new(),
            state: State::zeros(rnn, 0),
        }
    }

    fn run(&mut self, pass: &Pass<'_>) -> Result<()> {
        if !pass.continues {
            self.state = State::zeros(self.rnn, pass.size);
        }
        self.tape
            .forward(self.rnn, pass.input, pass.steps, &mut self.state)
    }

    /// State of a layer at a position, `offset` steps later.
    fn state(&self, layer: usize, position: usize, size: usize, offset: usize) -> &[f32] {
        let h = self.rnn.config().hidden[layer];
        &self.tape.states(layer)[(position + offset * size) * h..][..h]
    }
}

/// The positions of the true steps of a pass.
fn positions(pass: &Pass<'_>) -> impl Iterator<Item = usize> {
    (0..pass.steps).flat_map(move |t| {
        (0..pass.size)
            .filter(move |&b| t < pass.lengths[b])
            .map(move |b| t * pass.size + b)
    })
}

/// Records a network on examples. Padding does not count; a text is read as one sequence.
///
/// # Errors
/// The examples do not fit the network, or [`Error::Cancelled`].
pub fn record(
    rnn: &Rnn,
    examples: &Examples,
    config: &RecordConfig,
    progress: &dyn Progress,
) -> Result<Calibration> {
    let shape = rnn.config();
    let mut input = MomentsSum::new(shape.input.width());
    let mut layers: Vec<(MomentsSum, MomentsSum)> = shape
        .hidden
        .iter()
        .map(|&h| (MomentsSum::new(h), MomentsSum::new(h)))
        .collect();
    let top = shape.hidden[shape.hidden.len() - 1];
    let mut read_out = MomentsSum::new(top);
    let mut runner = Runner::new(rnn);
    let mut one_hot = vec![0.0; shape.input.width()];
    passes(examples, config, progress, |pass| {
        runner.run(pass)?;
        for at in positions(pass) {
            match (pass.input, shape.input) {
                (Input::Vectors(x), _) => input.push(&[&x[at * one_hot.len()..][..one_hot.len()]]),
                (Input::Symbols(_), InputKind::Embedding { dim, .. }) => {
                    input.push(&[&runner.tape.embedded()[at * dim..][..dim]]);
                }
                (Input::Symbols(s), _) => {
                    one_hot[s[at] as usize] = 1.0;
                    input.push(&[&one_hot]);
                    one_hot[s[at] as usize] = 0.0;
                }
            }
            for (l, (before, after)) in layers.iter_mut().enumerate() {
                before.push(&[runner.state(l, at, pass.size, 0)]);
                after.push(&[runner.state(l, at, pass.size, 1)]);
            }
        }
        let seen = runner.tape.read_out_input(rnn, pass.rows);
        seen.chunks_exact(top).for_each(|row| read_out.push(&[row]));
        Ok(())
    })?;
    Ok(Calibration::new(
        input.finish(),
        layers.into_iter().map(|(b, a)| (b.finish(), a.finish())),
        read_out.finish(),
    ))
}

/// Joint moments of two networks that read the same examples, as vectors (state of the first, state of the second): for every
/// layer of `h_t`, and of what the read-outs see.
///
/// # Errors
/// As [`record`]; networks of different depth.
pub fn record_joint(
    first: &Rnn,
    second: &Rnn,
    examples: &Examples,
    config: &RecordConfig,
    progress: &dyn Progress,
) -> Result<(Vec<Moments>, Moments)> {
    let (a, b) = (&first.config().hidden, &second.config().hidden);
    if a.len() != b.len() {
        return Err(Error::Setting {
            setting: "calibration",
            reason: format!("networks of {} and {} layers", a.len(), b.len()),
        });
    }
    let mut layers: Vec<MomentsSum> = a
        .iter()
        .zip(b)
        .map(|(a, b)| MomentsSum::new(a + b))
        .collect();
    let (top_a, top_b) = (a[a.len() - 1], b[b.len() - 1]);
    let mut read_out = MomentsSum::new(top_a + top_b);
    let mut runners = [Runner::new(first), Runner::new(second)];
    passes(examples, config, progress, |pass| {
        for runner in &mut runners {
            runner.run(pass)?;
        }
        for at in positions(pass) {
            for (l, sum) in layers.iter_mut().enumerate() {
                let states = [0, 1].map(|k: usize| runners[k].state(l, at, pass.size, 1));
                sum.push(&states);
            }
        }
        let seen = [0, 1].map(|k: usize| runners[k].tape.read_out_input(runners[k].rnn, pass.rows));
        let rows = seen[0].chunks_exact(top_a).zip(seen[1].chunks_exact(top_b));
        rows.for_each(|(a, b)| read_out.push(&[a, b]));
        Ok(())
    })?;
    Ok((
        layers.into_iter().map(MomentsSum::finish).collect(),
        read_out.finish(),
    ))
}
