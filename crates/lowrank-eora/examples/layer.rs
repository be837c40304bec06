//! Repairs a single linear, without a model: the loss that each method leaves at each rank.
//!
//! ```sh
//! cargo run --release -p lowrank-eora --example layer -- rtn-int3-g64
//! ```
//!
//! The weight is random and the inputs have channels of very different size that depend on each other, which is what the
//! methods differ in.

use candle_core::{DType, Device, Tensor};
use lowrank_eora::compress::{Compressor, Inputs};
use lowrank_eora::repair::layer::{Accumulation, InputCollector, Method, Options, Rows};

const OUTPUTS: usize = 192;
const INPUTS: usize = 256;
const TOKENS: usize = 4096;

/// Numbers in [−1, 1).
fn random(rows: usize, cols: usize, seed: u64) -> candle_core::Result<Tensor> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..rows * cols).map(|_| next()).collect();
    Tensor::from_vec(values, (rows, cols), &Device::Cpu)
}

/// Activations `[tokens, inputs]` of a few strong directions and noise.
fn activations(seed: u64) -> candle_core::Result<Tensor> {
    let scales = (0..INPUTS).map(|j| 4.0 / (1 + j) as f32);
    let scales = Tensor::from_iter(scales, &Device::Cpu)?;
    let mixed = random(TOKENS, INPUTS, seed)?.broadcast_mul(&scales)?;
    mixed.matmul(&random(INPUTS, INPUTS, 9)?)
}

/// ‖(W − W_c − B A) X‖ / ‖W X‖ on tokens.
fn loss(weight: &Tensor, repaired: &Tensor, x: &Tensor) -> candle_core::Result<f64> {
    let square = |w: &Tensor| x.matmul(&w.t()?)?.sqr()?.sum_all()?.to_scalar::<f32>();
    let error = square(&(weight - repaired)?)?;
    Ok((f64::from(error) / f64::from(square(weight)?)).sqrt())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = std::env::args().nth(1);
    let compressor: Compressor = name.as_deref().unwrap_or("rtn-int3-g64").parse()?;
    let weight = random(OUTPUTS, INPUTS, 1)?;
    let (seen, unseen) = (activations(2)?, activations(3)?);

    let needs = Method::Eora.needs();
    let mut collector = InputCollector::new(INPUTS, needs, Accumulation::Sum)?;
    for batch in seen.chunk(8, 0)? {
        collector.update(&Rows::from_tensor(&batch)?, None)?;
    }
    let inputs = collector.finish();
    let known = inputs.gram.as_ref().map(|gram| Inputs::Gram(gram.matrix()));
    let compressed = compressor.compress_tensor(&weight, known)?;
    let compressed = compressed.to_tensor(DType::F32, &Device::Cpu)?;
    println!(
        "{compressor}: {:.4} on unseen tokens",
        loss(&weight, &compressed, &unseen)?
    );
    for rank in [4, 16, 64] {
        for name in ["svd", "act-scale", "diag", "eora"] {
            let method: Method = name.parse()?;
            let options = Options::default();
            let found = method.solve_tensors(&weight, &compressed, &inputs, rank, &options)?;
            let (a, b) = found.factors.to_tensors(DType::F32, &Device::Cpu)?;
            let repaired = (&compressed + b.matmul(&a)?)?;
            println!(
                "rank {rank:3}, {name:9}: {:.4}",
                loss(&weight, &repaired, &unseen)?
            );
        }
    }
    Ok(())
}
