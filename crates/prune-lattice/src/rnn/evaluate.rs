//! Quality of networks on examples.

use super::{
    block_sparse::{BlockRnn, BlockWork},
    compact::CompactRnn,
    input::Input,
    loss::{Evaluation, Sums, cross_entropy},
    model::Rnn,
    tape::{State, Tape},
    train::{check_classes, loss},
};
use crate::{
    data::{Batch, Examples},
    error::Result,
    mask::MaskSet,
};

/// Sequences per forward pass, and steps of a text, in evaluation.
const EVALUATION_BATCH: usize = 256;

/// Quality of a network on examples. A text is read once from its start to its end, in one sequence.
///
/// # Errors
/// The examples do not fit the network, or are not finite.
pub fn evaluate(rnn: &Rnn, examples: &Examples) -> Result<Evaluation> {
    let mut total = Sums::default();
    let (mut tape, mut logits) = (Tape::new(), Vec::new());
    let outputs = rnn.config().outputs;
    match examples {
        Examples::Sequences(data) => {
            let mut order: Vec<usize> = (0..data.len()).collect();
            order.sort_by_key(|&k| data.length(k));
            let mut batch = Batch::new(data.inputs());
            for chosen in order.chunks(EVALUATION_BATCH) {
                data.batch(chosen, None, &mut batch);
                let mut state = State::zeros(rnn, chosen.len());
                tape.forward(rnn, batch.view(0, batch.steps), batch.steps, &mut state)?;
                tape.read_out(rnn, Some(&batch.rows), &mut logits);
                total.add(loss(
                    data.targets(),
                    &batch.targets,
                    outputs,
                    1.0,
                    &mut logits,
                )?);
            }
        }
        Examples::Text(text) => {
            check_classes(text, outputs)?;
            // Laid out once for the many short passes.
            let network = CompactRnn::new(rnn, &MaskSet::default())?;
            let mut state = State::zeros(rnn, 1);
            let last = text.len().saturating_sub(1);
            for start in (0..last).step_by(EVALUATION_BATCH) {
                let end = (start + EVALUATION_BATCH).min(last);
                network.forward(
                    &mut tape,
                    Input::Symbols(&text[start..end]),
                    end - start,
                    &mut state,
                )?;
                network.read_out(&tape, None, &mut logits);
                total.add(cross_entropy(
                    &mut logits,
                    outputs,
                    &text[start + 1..=end],
                    1.0,
                ));
            }
        }
    }
    Ok(total.mean(examples.classes()))
}

/// Quality of a network of blocks, step by step: what weights of 8 bits cost.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_blocks(network: &BlockRnn, examples: &Examples) -> Result<Evaluation> {
    let rnn = network.network();
    let outputs = rnn.config().outputs;
    let mut work = BlockWork::new();
    let mut total = Sums::default();
    match examples {
        Examples::Sequences(data) => {
            let mut batch = Batch::new(data.inputs());
            let mut logits = Vec::new();
            for k in 0..data.len() {
                data.batch(&[k], None, &mut batch);
                let mut state = State::zeros(rnn, 1);
                logits.clear();
                // Of one sequence, positions are steps, in order.
                let mut asked = batch.rows.iter().peekable();
                for t in 0..batch.steps {
                    network.step(batch.view(t, t + 1), &mut state, &mut work)?;
                    if asked.next_if_eq(&&t).is_some() {
                        logits.extend_from_slice(work.logits());
                    }
                }
                let targets = data.targets();
                total.add(loss(targets, &batch.targets, outputs, 1.0, &mut logits)?);
            }
        }
        Examples::Text(text) => {
            check_classes(text, outputs)?;
            let mut state = State::zeros(rnn, 1);
            for pair in text.windows(2) {
                network.step(Input::Symbols(&pair[..1]), &mut state, &mut work)?;
                let mut logits = work.logits().to_vec();
                total.add(cross_entropy(&mut logits, outputs, &pair[1..], 1.0));
            }
        }
    }
    Ok(total.mean(examples.classes()))
}
