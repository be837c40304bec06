//! A generator of short documents that knows how likely each of them is, so that the cross-entropy of a model can be
//! compared with the lowest possible one.
//!
//! A document belongs to training, calibration or evaluation by its own hash: no document is in two of them, whatever
//! the seeds.

mod kinds;
mod words;
mod writer;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use writer::Writer;

/// What a text is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// Training: seven eighths of all documents.
    Training,
    /// Calibration: a sixteenth.
    Calibration,
    /// Evaluation: a sixteenth.
    Evaluation,
}

impl Split {
    /// The split of a document.
    pub fn of(document: &str) -> Self {
        // FNV-1a: the same in every version and on every machine, so that splits never change.
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

/// One document of the generator.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Its text, which ends in an empty line.
    pub text: String,
    /// Each random choice: the byte of `text` where it ends, and minus the logarithm of its probability.
    choices: Vec<(usize, f64)>,
}

impl Document {
    /// Minus the logarithm of the document's probability among the documents of all splits.
    pub fn nats(&self) -> f64 {
        self.choices.iter().map(|(_, nats)| nats).sum()
    }
}

/// Documents of one split without end, the same for the same seed.
#[derive(Debug, Clone)]
pub struct Generator {
    rng: ChaCha8Rng,
    split: Split,
}

impl Generator {
    /// The documents of `split` that `seed` gives.
    pub fn new(split: Split, seed: u64) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            split,
        }
    }

    /// The next documents, as few as have `bytes` bytes or more.
    pub fn corpus(&mut self, bytes: usize) -> Corpus {
        let mut corpus = Corpus::default();
        while corpus.text.len() < bytes {
            corpus.push(&self.document());
        }
        corpus
    }

    /// The next document.
    pub fn document(&mut self) -> Document {
        loop {
            let document = document(&mut self.rng);
            if Split::of(&document.text) == self.split {
                return document;
            }
        }
    }
}

impl Iterator for Generator {
    type Item = Document;

    fn next(&mut self) -> Option<Document> {
        Some(self.document())
    }
}

/// A document of any split.
fn document(rng: &mut ChaCha8Rng) -> Document {
    let mut writer = Writer::new(rng);
    kinds::write(&mut writer);
    writer.finish()
}

/// Documents one after the other.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Corpus {
    /// The documents' texts.
    pub text: String,
    /// How many documents there are.
    pub documents: usize,
    /// Each random choice: the byte of `text` where it ends, and the nats of all choices up to it.
    choices: Vec<(usize, f64)>,
}

impl Corpus {
    /// Appends a document.
    pub fn push(&mut self, document: &Document) {
        let (start, before) = (self.text.len(), self.nats());
        let mut sum = 0.0;
        self.choices
            .extend(document.choices.iter().map(|(end, nats)| {
                sum += nats;
                (start + end, before + sum)
            }));
        self.text += &document.text;
        self.documents += 1;
    }

    /// Minus the logarithm of the probability of the text, given how many documents it has.
    ///
    /// The mean over many texts is the generator's entropy. Documents are drawn until one falls into the split, which
    /// only the hash decides: a model that does not compute the hash cannot gain from it.
    pub fn nats(&self) -> f64 {
        self.choices.last().map_or(0.0, |(_, nats)| *nats)
    }

    /// The same of the first `bytes` bytes: the choices that can be read off them.
    pub fn nats_of_prefix(&self, bytes: usize) -> f64 {
        let within = self.choices.partition_point(|(end, _)| *end <= bytes);
        within
            .checked_sub(1)
            .map_or(0.0, |last| self.choices[last].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn splits_share_no_document_and_have_their_shares() {
        let mut texts = Vec::new();
        for split in [Split::Training, Split::Calibration, Split::Evaluation] {
            let documents: HashSet<String> =
                Generator::new(split, 0).take(800).map(|d| d.text).collect();
            texts.push(documents);
        }
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            assert_eq!(texts[a].intersection(&texts[b]).count(), 0);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut counts = [0; 3];
        for _ in 0..4000 {
            counts[Split::of(&document(&mut rng).text) as usize] += 1;
        }
        assert!((3400..3600).contains(&counts[0]), "{counts:?}");
        assert!(
            (200..300).contains(&counts[1]) && (200..300).contains(&counts[2]),
            "{counts:?}"
        );
    }

    #[test]
    fn a_seed_gives_the_same_text_and_another_seed_another() {
        let text = |seed| Generator::new(Split::Evaluation, seed).corpus(10_000);
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }

    #[test]
    fn the_mean_information_is_the_entropy_of_the_choices() {
        // One choice among three, whose entropy is known: weights 1/2, 1/3, 1/4.
        let p = [6.0 / 13.0, 4.0 / 13.0, 3.0 / 13.0];
        let entropy: f64 = -p.iter().map(|p: &f64| p * p.ln()).sum::<f64>();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let draws = 20_000;
        let mut nats = 0.0;
        for _ in 0..draws {
            let mut writer = Writer::new(&mut rng);
            writer.word(&["a", "b", "c"], " ");
            nats += writer.finish().nats();
        }
        assert!((nats / f64::from(draws) - entropy).abs() < 0.01);
    }

    #[test]
    fn the_nats_of_a_prefix_are_those_of_its_documents() {
        let mut generator = Generator::new(Split::Training, 5);
        let documents: Vec<Document> = generator.by_ref().take(20).collect();
        let mut corpus = Corpus::default();
        documents.iter().for_each(|document| corpus.push(document));
        let (mut bytes, mut nats) = (0, 0.0);
        for document in &documents {
            assert!((corpus.nats_of_prefix(bytes) - nats).abs() < 1e-9);
            bytes += document.text.len();
            nats += document.nats();
        }
        assert!((corpus.nats() - nats).abs() < 1e-9);
        assert_eq!(corpus.nats_of_prefix(bytes), corpus.nats());
        // Within a document the nats grow with the prefix.
        let first = documents[0].text.len();
        let grows = (0..first)
            .map(|bytes| corpus.nats_of_prefix(bytes))
            .collect::<Vec<_>>();
        assert!(grows.is_sorted() && grows[0] == 0.0 && grows[first - 1] > 0.0);
    }
}
