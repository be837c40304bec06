//! Prunes RNNoise's three GRUs to blocks of 8x4, without training, and writes a weight file for the original library.
//!
//! `cargo run --release -p prune-lattice --example rnnoise -- BLOB FOLDER OUT [SPARSITY [none|refit [int8]]]`
//!
//! BLOB is a weight file of the library; FOLDER holds `train.safetensors` and `test.safetensors` with `features`
//! `[clips, frames, 65]` and, for testing, `gains`, `vad` and `labels`. SPARSITY is one share, or one for each of the gates r, z and
//! n, separated by commas.

use prune_lattice::{
    NoProgress,
    calibration::{RecordConfig, record},
    data::{Examples, Inputs, Sequences, Targets},
    mask::{Block, MaskSet},
    prune::{Method, PruneConfig, PruneContext, Scope, prune_in},
    repair::{RefitConfig, refit},
    rnn::{BlockRnn, BlockWork, Input, Rnn, State},
    rnnoise::{FEATURES, HIDDEN, Stored, WeightFile},
};
use std::{path::Path, time::Instant};

type Error = Box<dyn std::error::Error>;

/// Clips of features, and the values of another tensor of the same file.
struct Clips {
    features: Vec<Vec<f32>>,
    tensors: std::collections::HashMap<String, prune_lattice::candle_core::Tensor>,
}

impl Clips {
    fn load(file: &Path) -> Result<Self, Error> {
        let tensors = prune_lattice::io::load(file)?;
        let features = tensors.get("features").ok_or("no tensor `features`")?;
        let clips = features.flatten_from(1)?.to_vec2::<f32>()?;
        Ok(Self {
            features: clips,
            tensors,
        })
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, Error> {
        use prune_lattice::candle_core::DType;
        let t = self
            .tensors
            .get(name)
            .ok_or(format!("no tensor `{name}`"))?;
        Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}

/// Root mean square of the difference of gains, and area under the ROC curve of the voice probability.
fn test(file: &WeightFile, rnn: &Rnn, clips: &Clips) -> Result<(f64, f64), Error> {
    let (dense, labels) = (clips.values("gains")?, clips.values("labels")?);
    let (mut gains, mut voice) = (Vec::new(), Vec::new());
    for features in &clips.features {
        let (g, v) = file.run(rnn, features)?;
        gains.extend(g);
        voice.extend(v);
    }
    let squares = gains
        .iter()
        .zip(&dense)
        .map(|(a, b)| f64::from(a - b).powi(2));
    let rms = (squares.sum::<f64>() / gains.len() as f64).sqrt();
    let of = |label: f32| {
        let pairs = voice.iter().zip(&labels).filter(move |(_, l)| **l == label);
        pairs.map(|(v, _)| *v).collect::<Vec<f32>>()
    };
    let (yes, mut no) = (of(1.0), of(0.0));
    no.sort_by(f32::total_cmp);
    let below = |v: &f32| {
        let (less, not_more) = (
            no.partition_point(|n| n < v),
            no.partition_point(|n| n <= v),
        );
        (less + not_more) as f64 / 2.0
    };
    let pairs = (yes.len() * no.len()).max(1) as f64;
    Ok((rms, yes.iter().map(below).sum::<f64>() / pairs))
}

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
        return Err("usage: rnnoise BLOB FOLDER OUT [SPARSITY [none|refit [int8]]]".into());
    };
    let shares = rest.first().map_or("0.5", String::as_str).split(',');
    let shares: Vec<f64> = shares.map(str::parse).collect::<Result<_, _>>()?;
    let stored = match rest.get(2).map(String::as_str) {
        Some("int8") => Stored::Integers,
        _ => Stored::Floats,
    };
    let mut file = WeightFile::from_bytes(&std::fs::read(blob)?, Path::new(blob))?;
    let rnn = file.network()?;
    let train = Clips::load(&Path::new(folder).join("train.safetensors"))?;
    let held_out = Clips::load(&Path::new(folder).join("test.safetensors"))?;

    // What the GRUs read.
    let (mut values, mut lengths) = (Vec::new(), Vec::new());
    for features in &train.features {
        values.extend(file.convolutions(features)?);
        lengths.push(features.len() / FEATURES);
    }
    let inputs = Inputs::Vectors {
        dim: HIDDEN,
        values,
    };
    // The read-out is never trained here; its targets do not matter.
    let targets = Targets::Classes(vec![0; lengths.len()]);
    let examples = Examples::Sequences(Sequences::new(inputs, &lengths, targets)?);
    let start = Instant::now();
    let calibration = record(&rnn, &examples, &RecordConfig::default(), &NoProgress)?;
    println!("states recorded in {:.1} s", start.elapsed().as_secs_f64());

    let sparsity = shares.iter().sum::<f64>() / shares.len() as f64;
    let config = PruneConfig::new(Method::Block8x4, sparsity).with(|c| {
        c.scope = Scope::Both;
        c.keep_diagonal = true;
        c.weigh_inputs = true;
        if shares.len() > 1 {
            c.densities = Some(shares.iter().map(|s| 1.0 - s).collect());
        }
    });
    let context = PruneContext::default().calibrated(&calibration);
    let (masks, report) = prune_in(&rnn, &context, &config)?;
    let mut pruned = rnn.clone();
    if rest.get(1).is_some_and(|r| r == "none") {
        masks.apply(pruned.params_mut())?;
    } else {
        let fit = RefitConfig::default().with(|c| {
            c.ridge = 1e-2;
            c.constant = false;
        });
        let report = refit(&mut pruned, &masks, &calibration, &fit)?;
        println!(
            "{} matrices refitted in {:.1} s",
            report.matrices.len(),
            report.seconds
        );
    }
    let (rms, auc) = test(&file, &rnn, &held_out)?;
    println!("whole network: gains differ by {rms:.4} from the library's, AUC {auc:.4}");
    let (rms, auc) = test(&file, &pruned, &held_out)?;
    println!(
        "{:.1} % of the weights removed: gains differ by {rms:.4}, AUC {auc:.4}",
        100.0 * report.sparsity.recurrent_and_input
    );
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
    std::fs::write(out, file.to_bytes()?)?;
    println!("wrote {out}");
    Ok(())
}
