//! Perplexity of a model on a text by three protocols.
//!
//!     cargo run --release --example perplexity -- MODEL TEXT [WINDOW]
//!
//! MODEL is a checkpoint folder in the layout of Hugging Face, TEXT a file. Without arguments a small random model is made.

use std::path::Path;

use causal_lm::testing::{TestModel, config};
use causal_lm::{Decoder, TextTokenizer, read_text};
use lm_eval::candle_core::{DType, Device};
use lm_eval::{NoProgress, Perplexity, Protocol, ProtocolKind};
use tensor_io::Checkpoint;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args[..] {
        [] => {
            let words = ["<s>", "the", "cat", "sat", "on", "a", "mat", "."];
            let vocab = serde_json::json!({"vocab_size": words.len()});
            let model = TestModel::new(&config("llama", vocab)).with_words(&words);
            let text: Vec<&str> = (0..200).map(|i| words[1 + i * i % 7]).collect();
            report(model.dir(), &text.join(" "), 32)
        }
        [model, text] => report(Path::new(model), &read_text(text)?, 512),
        [model, text, window] => report(Path::new(model), &read_text(text)?, window.parse()?),
        _ => Err("expected MODEL TEXT [WINDOW]".into()),
    }
}

fn report(model: &Path, text: &str, window: usize) -> Result<()> {
    let checkpoint = Checkpoint::open(model)?;
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
    let tokenizer = TextTokenizer::open(model)?;
    for kind in [
        ProtocolKind::Windows,
        ProtocolKind::Gptq,
        ProtocolKind::Rolling,
    ] {
        let protocol = Protocol::new(kind, window, decoder.config().max_positions)?;
        let windows = protocol.evaluation(&tokenizer, text)?;
        let result = Perplexity::measure(&decoder, &windows, &NoProgress)?;
        print!(
            "{kind:8} {} windows, {} targets, perplexity {:.4}",
            windows.count(),
            windows.targets(),
            result.perplexity()
        );
        if let (Some(words), Some(bits)) = (result.word_perplexity(), result.bits_per_byte()) {
            print!(", per word {words:.4}, {bits:.4} bits per byte");
        }
        println!();
    }
    Ok(())
}
