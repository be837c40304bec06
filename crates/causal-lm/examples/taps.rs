//! The mean square of the inputs of every linear, over windows of text, with one block in memory at a time.
//!
//!     cargo run --release --features testing --example taps -- MODEL TEXT
//!
//! MODEL is a checkpoint folder in the layout of Hugging Face. Without arguments a small random model and random tokens are
//! used.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use causal_lm::testing::{TestModel, config};
use causal_lm::{Decoder, NoProgress, Site, Tap, TapResult, TextTokenizer, Windows, run_blocks};
use tensor_io::Checkpoint;

/// Sum of squares and number of elements by layer and site.
#[derive(Default)]
struct MeanSquares(BTreeMap<(usize, String), (f64, usize)>);

impl Tap for MeanSquares {
    fn observe(&mut self, layer: usize, site: Site, x: &Tensor) -> TapResult {
        let sum = f64::from(
            x.sqr()?
                .sum_all()?
                .to_dtype(DType::F32)?
                .to_scalar::<f32>()?,
        );
        let entry = self.0.entry((layer, format!("{site:?}"))).or_default();
        entry.0 += sum;
        entry.1 += x.elem_count();
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args[..] {
        [] => {
            let model = TestModel::new(&config("llama", serde_json::json!({})));
            let tokens: Vec<u32> = (0..512).map(|i| i * i % 50).collect();
            report(&model.decoder(), &Windows::cut(&tokens, 32, None)?)
        }
        [model, text] => {
            let checkpoint = Checkpoint::open(model)?;
            let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
            let tokenizer = TextTokenizer::open(model)?;
            let tokens = tokenizer.encode_file(text)?;
            report(&decoder, &Windows::cut(&tokens, 256, tokenizer.bos())?)
        }
        _ => Err("expected MODEL TEXT".into()),
    }
}

fn report(decoder: &Decoder<'_>, windows: &Windows) -> Result<(), Box<dyn std::error::Error>> {
    let mut squares = MeanSquares::default();
    run_blocks(decoder, windows, &mut squares, &NoProgress)?;
    for ((layer, site), (sum, count)) in squares.0 {
        println!("layer {layer} {site:7} {:.4}", sum / count as f64);
    }
    Ok(())
}
