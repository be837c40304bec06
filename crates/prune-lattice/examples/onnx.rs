//! Prunes the recurrent node of an ONNX file without training and writes the file back, so that any runtime runs it.
//!
//! `cargo run --release -p prune-lattice --example onnx --features experiment,onnx -- IN.onnx OUT.onnx CLIPS [METHOD [SPARSITY
//! [READ_OUT [NODE [linear|relu]]]]]`
//!
//! CLIPS is a folder of the task `vad`: recorded inputs of the node, and labels. READ_OUT is the prefix of the constants of the
//! read-out, which sees max(0, h) or (`linear`) h; NODE is the recurrent node of a file that has several. The weights under the mask
//! are solved again; where that is worse on the validation clips, they stay as they are.

use prune_lattice::{
    NoProgress,
    calibration::{RecordConfig, record},
    onnx::OnnxFile,
    prune::{Method, PruneConfig, PruneContext, prune_in},
    repair::{RefitConfig, refit},
    rnn::{ReadOut, evaluate},
    tasks::Task,
};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [from, to, clips, rest @ ..] = args.as_slice() else {
        return Err(
            "usage: onnx IN.onnx OUT.onnx CLIPS [METHOD [SPARSITY [READ_OUT [NODE [linear|relu]]]]]"
                .into(),
        );
    };
    let method: Method = rest.first().map_or(Ok(Method::Magnitude), |m| m.parse())?;
    let sparsity: f64 = rest.get(1).map_or(Ok(0.75), |s| s.parse())?;
    let read_out = rest.get(2).map_or("output", String::as_str);

    let file = OnnxFile::open(Path::new(from))?;
    let node = file.node(rest.get(3).map(String::as_str))?;
    let activation: ReadOut = rest.get(4).map_or(Ok(ReadOut::Relu), |a| a.parse())?;
    println!(
        "{}: {} of {} inputs, {} neurons",
        node.name, node.cell, node.width, node.hidden
    );
    let rnn = file.network(node, Some(read_out), activation)?;
    let task = Task::Vad(clips.into());
    let data = task.generate(task.default_sizes(), 0)?;
    let calibration = record(&rnn, &data.train, &RecordConfig::default(), &NoProgress)?;
    let context = PruneContext::default().calibrated(&calibration);
    let (masks, report) = prune_in(&rnn, &context, &PruneConfig::new(method, sparsity))?;
    let (mut plain, mut fitted) = (rnn.clone(), rnn.clone());
    masks.apply(plain.params_mut())?;
    // What a file without biases cannot hold is not solved for.
    let fit = RefitConfig::default().with(|c| c.constant = node.has_bias());
    refit(&mut fitted, &masks, &calibration, &fit)?;
    let better = evaluate(&fitted, &data.valid)?.loss <= evaluate(&plain, &data.valid)?.loss;
    let chosen = if better { &fitted } else { &plain };
    println!(
        "{method}, {:.1} % of W_hh removed",
        100.0 * report.sparsity.recurrent
    );
    for (name, network) in [("dense", &rnn), ("masked", &plain), ("refitted", &fitted)] {
        let test = evaluate(network, &data.test)?;
        println!(
            "{name:<9} loss {:.4}, AUC {:.5}",
            test.loss,
            test.auc.unwrap_or(f64::NAN)
        );
    }
    file.write(node, chosen, 0, Path::new(to))?;
    println!(
        "wrote {to} ({})",
        if better { "refitted" } else { "masked" }
    );
    Ok(())
}
