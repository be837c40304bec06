//! Training windows cut from running text.

use std::collections::VecDeque;

use tokenizers::Tokenizer;

use super::vocabulary;
use crate::Result;

/// Windows of BOS and text that goes on from window to window, across documents, as models are evaluated.
pub(super) struct TokenStream<'a, T> {
    /// The text, in pieces.
    pieces: T,
    tokenizer: &'a Tokenizer,
    bos: u32,
    /// Tokens of the pieces read that no window has used, the next one in front.
    rest: VecDeque<u32>,
}

impl<'a, T: FnMut() -> String> TokenStream<'a, T> {
    pub(super) fn new(pieces: T, tokenizer: &'a Tokenizer, bos: u32) -> Self {
        Self {
            pieces,
            tokenizer,
            bos,
            rest: VecDeque::new(),
        }
    }

    /// The next window: BOS and `length - 1` tokens of text.
    pub(super) fn window(&mut self, length: usize) -> Result<Vec<u32>> {
        let text = length - 1;
        while self.rest.len() < text {
            let encoding = self.tokenizer.encode_fast((self.pieces)(), false);
            let encoding = encoding.map_err(vocabulary::error)?;
            self.rest.extend(encoding.get_ids());
        }
        let mut window = Vec::with_capacity(length);
        window.push(self.bos);
        window.extend(self.rest.drain(..text));
        Ok(window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Generator, Split};

    #[test]
    fn windows_follow_the_text_across_pieces() {
        let mut generator = Generator::new(Split::Training, 0);
        let pieces: Vec<String> = (0..6).map(|_| generator.corpus(2_000).text).collect();
        let tokenizer = vocabulary::train(&pieces.concat()).unwrap();
        let tokens: Vec<u32> = pieces
            .iter()
            .flat_map(|piece| {
                let encoding = tokenizer.encode_fast(piece.as_str(), false).unwrap();
                encoding.get_ids().to_vec()
            })
            .collect();
        let mut next = pieces.into_iter();
        let mut stream = TokenStream::new(|| next.next().unwrap(), &tokenizer, 0);
        // Lengths change over a run, and none divides a piece.
        let lengths = (0..tokens.len() / 160).map(|i| if i % 3 == 0 { 60 } else { 97 });
        let mut at = 0;
        for length in lengths {
            let window = stream.window(length).unwrap();
            assert_eq!(window[0], 0);
            assert_eq!(window[1..], tokens[at..at + length - 1], "from token {at}");
            at += length - 1;
        }
        assert!(at > tokens.len() / 3, "the windows cross pieces");
    }
}
