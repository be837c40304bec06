//! The model that this project carries, and the text it was trained on: nothing has to be downloaded to see what
//! compression does.
//!
//! Text comes from a generator (`tale`) that knows how likely each document is, so the model's cross-entropy can be held
//! against the best possible one. A document belongs to training, calibration or evaluation by its own hash, so that no
//! two of them share a document, whatever the seeds.

mod tale;
mod teller;
mod train;
mod vocabulary;
mod words;

use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use teller::Teller;

pub use train::{Config, run};

/// What a text is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Training: seven eighths of all documents.
    Training,
    /// Calibration: a sixteenth.
    Calibration,
    /// Evaluation: a sixteenth.
    Evaluation,
}

impl Split {
    /// Where a document belongs.
    fn of(document: &str) -> Self {
        // FNV-1a: stable across versions and machines.
        let hash = document
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        match hash >> 60 {
            0 => Split::Evaluation,
            1 => Split::Calibration,
            _ => Split::Training,
        }
    }
}

/// Documents one after the other.
pub struct Tales {
    rng: ChaCha8Rng,
    split: Split,
}

/// A piece of text.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Told {
    /// Whole documents.
    pub text: String,
    /// Minus the logarithm of the probability of the text, given how many documents it has.
    pub nats: f64,
    /// How many documents.
    pub documents: usize,
}

impl Tales {
    /// Documents of one split, always the same for a seed.
    pub fn new(split: Split, seed: u64) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            split,
        }
    }

    /// The next documents, until there are at least `bytes` of them.
    pub fn take(&mut self, bytes: usize) -> Told {
        let mut told = Told::default();
        while told.text.len() < bytes {
            let mut teller = Teller::new(&mut self.rng);
            tale::tell(&mut teller);
            let (text, nats) = teller.finish();
            if Split::of(&text) == self.split {
                told.text += &text;
                told.nats += nats;
                told.documents += 1;
            }
        }
        told
    }
}

/// The folder of the model in this checkout, with its texts; seen from the current folder where it lies below it.
pub fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    let current = std::env::current_dir().ok();
    match current.and_then(|current| Some(folder.strip_prefix(current).ok()?.to_owned())) {
        Some(below) => below,
        None => folder,
    }
}

/// Name of the text to evaluate on in the model's folder.
pub const EVALUATION: &str = "evaluation.txt";
/// Name of the text to calibrate on in the model's folder.
pub const CALIBRATION: &str = "calibration.txt";

/// Bytes of either text.
const TEXT: usize = 96 << 10;

/// The text to evaluate on, as it lies in the model's folder.
pub fn evaluation() -> Told {
    Tales::new(Split::Evaluation, 0).take(TEXT)
}

/// The text to calibrate on, as it lies in the model's folder.
pub fn calibration() -> Told {
    Tales::new(Split::Calibration, 0).take(TEXT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn splits_share_no_document_and_have_their_shares() {
        let mut texts = Vec::new();
        for split in [Split::Training, Split::Calibration, Split::Evaluation] {
            let told = Tales::new(split, 0).take(200_000);
            let documents: HashSet<String> = told.text.split("\n\n").map(String::from).collect();
            texts.push(documents);
        }
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            assert_eq!(
                texts[a]
                    .intersection(&texts[b])
                    .filter(|d| !d.is_empty())
                    .count(),
                0
            );
        }
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut counts = [0; 3];
        for _ in 0..4000 {
            let mut teller = Teller::new(&mut rng);
            tale::tell(&mut teller);
            counts[Split::of(&teller.finish().0) as usize] += 1;
        }
        assert!((3400..3600).contains(&counts[0]), "{counts:?}");
        assert!(
            (200..300).contains(&counts[1]) && (200..300).contains(&counts[2]),
            "{counts:?}"
        );
    }

    #[test]
    fn a_seed_tells_the_same_and_another_seed_something_else() {
        let tell = |seed| Tales::new(Split::Evaluation, seed).take(10_000);
        assert_eq!(tell(1), tell(1));
        assert_ne!(tell(1), tell(2));
    }

    #[test]
    fn the_mean_information_is_the_entropy_of_the_choices() {
        // A generator of one choice among three, whose entropy is known: weights 1/2, 1/3, 1/4.
        let p = [6.0 / 13.0, 4.0 / 13.0, 3.0 / 13.0];
        let entropy: f64 = -p.iter().map(|p: &f64| p * p.ln()).sum::<f64>();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let draws = 20_000;
        let mut nats = 0.0;
        for _ in 0..draws {
            let mut teller = Teller::new(&mut rng);
            teller.word(&["a", "b", "c"], " ");
            nats += teller.finish().1;
        }
        assert!((nats / f64::from(draws) - entropy).abs() < 0.01);
    }
}
