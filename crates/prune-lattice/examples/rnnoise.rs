//! Prunes RNNoise's three GRUs to blocks of 8x4, without training, and writes a weight file for the original library.
//!
//! `cargo run --release -p prune-lattice --example rnnoise -- BLOB FOLDER OUT [SPARSITY [none|refit|merge [floats|int8]]]`
//!
//! BLOB is a weight file of the library; FOLDER holds `train.safetensors` and `test.safetensors` with `features`
//! `[clips, frames, 65]`, `gains` and `labels`. SPARSITY is one share, or one for each of the gates r, z and n, separated by commas.
//! With `merge`, neurons are removed by `span` so that the recurrent matrices lose that share.

use prune_lattice::{
    NoProgress,
    calibration::{RecordConfig, record},
    mask::{Block, MaskSet},
    prune::{Method, PruneConfig, PruneContext, Scope, prune_in, rank_neurons_in},
    repair::{MergeConfig, refit},
    rnn::{BlockRnn, BlockWork, Input, Rnn, State},
    rnnoise::{Clips, HIDDEN, Stored, WeightFile, refit_config},
};
use std::{path::Path, time::Instant};

type Error = Box<dyn std::error::Error>;

/// Milliseconds of a step of the three GRUs by this crate's kernels.
fn step_time(network: &BlockRnn) -> Result<f64, Error> {
    let x: Vec<f32> = (0..HIDDEN).map(|k| (k as f32 * 0.3).sin()).collect();
    let (mut state, mut work) = (State::zeros(network.network(), 1), BlockWork::new());
    let mut best = f64::INFINITY;
    for _ in 0..300 {
        let start = Instant::now();
        network.step(Input::Vectors(&x), &mut state, &mut work)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(1e3 * best)
}

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [blob, folder, out, rest @ ..] = args.as_slice() else {
        return Err(
            "usage: rnnoise BLOB FOLDER OUT [SPARSITY [none|refit|merge [floats|int8]]]".into(),
        );
    };
    let shares = rest.first().map_or("0.5", String::as_str).split(',');
    let shares: Vec<f64> = shares.map(str::parse).collect::<Result<_, _>>()?;
    let repair = rest.get(1).map_or("refit", String::as_str);
    let stored: Stored = rest.get(2).map_or(Ok(Stored::Floats), |s| s.parse())?;
    let mut file = WeightFile::open(Path::new(blob))?;
    let rnn = file.network()?;
    let train = Clips::load(&Path::new(folder).join("train.safetensors"))?;
    let held_out = Clips::load(&Path::new(folder).join("test.safetensors"))?;

    let start = Instant::now();
    let examples = train.examples(&file)?;
    let calibration = record(&rnn, &examples, &RecordConfig::default(), &NoProgress)?;
    println!("states recorded in {:.1} s", start.elapsed().as_secs_f64());
    let show = |what: &str, file: &WeightFile, rnn: &Rnn| -> Result<(), Error> {
        let found = held_out.quality(file, rnn)?;
        println!(
            "{what}: gains differ by {:.4} from the library's (RMS), voice AUC {:.4}",
            found.loss.sqrt(),
            found.auc.unwrap_or(f64::NAN)
        );
        Ok(())
    };
    show("whole network", &file, &rnn)?;

    let sparsity = shares.iter().sum::<f64>() / shares.len() as f64;
    let readers = file.readers()?;
    let context = PruneContext::default()
        .calibrated(&calibration)
        .read_by(&readers);
    if repair == "merge" {
        let keep = rank_neurons_in(&rnn, &context, &PruneConfig::new(Method::Span, sparsity))?;
        let config = MergeConfig::default();
        let (merged, padded) = file.merged(&keep, &calibration, &config, stored)?;
        let left = keep[0].iter().filter(|k| **k).count();
        show(&format!("{left} of {HIDDEN} neurons"), &merged, &padded)?;
        merged.write(Path::new(out))?;
        println!("wrote {out}");
        return Ok(());
    }
    let config = PruneConfig::new(Method::Block8x4, sparsity).with(|c| {
        c.scope = Scope::Both;
        c.keep_diagonal = true;
        c.weigh_inputs = true;
        if shares.len() > 1 {
            c.densities = Some(shares.iter().map(|s| 1.0 - s).collect());
        }
    });
    let (masks, report) = prune_in(&rnn, &context, &config)?;
    let mut pruned = rnn.clone();
    match repair {
        "none" => masks.apply(pruned.params_mut())?,
        "refit" => {
            let report = refit(&mut pruned, &masks, &calibration, &refit_config())?;
            println!(
                "{} matrices refitted in {:.1} s",
                report.matrices.len(),
                report.seconds
            );
        }
        other => return Err(format!("{other}: none, refit or merge is expected").into()),
    }
    let removed = 100.0 * report.sparsity.recurrent_and_input;
    show(
        &format!("{removed:.1} % of the weights removed"),
        &file,
        &pruned,
    )?;
    let block = Block { rows: 8, cols: 4 };
    let dense = BlockRnn::new(&rnn, &MaskSet::default(), block)?;
    let blocks = BlockRnn::new(&pruned, &masks, block)?;
    println!(
        "a step of the GRUs here: dense {:.3} ms, blocks {:.3} ms, blocks of 8 bits {:.3} ms",
        step_time(&dense)?,
        step_time(&blocks)?,
        step_time(&blocks.clone().quantised())?
    );
    file.set_network(&pruned, &masks, stored)?;
    file.write(Path::new(out))?;
    println!("wrote {out}");
    Ok(())
}
