//! Windows of tokens: how a text becomes calibration or evaluation data.
//!
//! A text is cut into consecutive, non-overlapping windows of `len` positions. With a BOS token
//! each window is BOS followed by `len - 1` tokens of text, without it `len` tokens of text; a last
//! partial window is dropped.

use crate::{Error, Result};
use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;

/// Windows of one length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    tokens: Vec<u32>,
    len: usize,
}

impl Windows {
    /// Cuts a tokenised text.
    ///
    /// # Errors
    /// [`Error::Windows`] when `len` leaves no position to predict, or the text is shorter than
    /// one window.
    pub fn cut(text: &[u32], len: usize, bos: Option<u32>) -> Result<Self> {
        if len < 2 {
            return Err(Error::Windows(format!(
                "a window of {len} has no token to predict; at least 2 are needed"
            )));
        }
        let of_text = len - usize::from(bos.is_some());
        let tokens: Vec<u32> = text
            .chunks_exact(of_text)
            .flat_map(|part| bos.into_iter().chain(part.iter().copied()))
            .collect();
        if tokens.is_empty() {
            return Err(Error::Windows(format!(
                "tokens of the text: {}, less than one window of {of_text}",
                text.len()
            )));
        }
        Ok(Self { tokens, len })
    }

    /// Windows of `len` tokens that are already cut, one after the other in `tokens`.
    ///
    /// # Errors
    /// [`Error::Windows`] when there is none, or `len` does not divide the number of tokens.
    pub fn of_length(tokens: Vec<u32>, len: usize) -> Result<Self> {
        if len == 0 || tokens.is_empty() || !tokens.len().is_multiple_of(len) {
            return Err(Error::Windows(format!(
                "the number of tokens, {}, is no multiple of the window, {len}",
                tokens.len()
            )));
        }
        Ok(Self { tokens, len })
    }

    /// Positions in a window.
    pub fn window_len(&self) -> usize {
        self.len
    }

    /// Number of windows.
    pub fn count(&self) -> usize {
        self.tokens.len() / self.len
    }

    /// Positions that have a target: all but the first of each window.
    pub fn targets(&self) -> usize {
        self.count() * (self.len - 1)
    }

    /// The windows in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.tokens.chunks_exact(self.len)
    }

    /// The first `count` windows, or all when there are fewer.
    pub fn first(&self, count: usize) -> Self {
        let end = self.tokens.len().min(count.saturating_mul(self.len));
        Self {
            tokens: self.tokens[..end].to_vec(),
            len: self.len,
        }
    }

    /// `count` windows drawn without replacement, in the order of the text; all when there are
    /// fewer.
    pub fn sample(&self, count: usize, seed: u64) -> Self {
        if count >= self.count() {
            return self.clone();
        }
        let mut drawn =
            index::sample(&mut ChaCha8Rng::seed_from_u64(seed), self.count(), count).into_vec();
        drawn.sort_unstable();
        self.pick(&drawn)
    }

    /// The windows at these places, counted from 0, in their order.
    ///
    /// # Panics
    /// A place behind the last window.
    pub fn pick(&self, places: &[usize]) -> Self {
        let window = |&place: &usize| &self.tokens[place * self.len..][..self.len];
        Self {
            tokens: places.iter().flat_map(window).copied().collect(),
            len: self.len,
        }
    }

    /// The windows that are not among `others`, by their tokens.
    pub fn without(&self, others: &Self) -> Self {
        let others: HashSet<&[u32]> = others.iter().collect();
        let left = self.iter().filter(|window| !others.contains(window));
        Self {
            tokens: left.flatten().copied().collect(),
            len: self.len,
        }
    }

    /// Consecutive groups of at most `count` windows.
    pub fn groups(&self, count: usize) -> impl Iterator<Item = Self> {
        let len = self.len;
        self.tokens
            .chunks(count.max(1).saturating_mul(len))
            .map(move |tokens| Self {
                tokens: tokens.to_vec(),
                len,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_windows_beyond_all_integers_of_tokens_is_all_of_them() {
        let text: Vec<u32> = (0..40).collect();
        let windows = Windows::cut(&text, 32, None).unwrap();
        for count in [1 << 59, (1 << 59) + 1, 1 << 63, usize::MAX] {
            assert_eq!(windows.first(count), windows, "{count}");
            assert_eq!(windows.groups(count).count(), 1, "{count}");
        }
    }

    #[test]
    fn a_window_is_bos_and_text_or_text_alone_and_the_rest_is_dropped() {
        let text: Vec<u32> = (10..20).collect();
        let with_bos = Windows::cut(&text, 4, Some(1)).unwrap();
        assert_eq!(
            with_bos.iter().collect::<Vec<_>>(),
            [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]
        );
        let without = Windows::cut(&text, 4, None).unwrap();
        assert_eq!(
            without.iter().collect::<Vec<_>>(),
            [[10, 11, 12, 13], [14, 15, 16, 17]]
        );
        assert_eq!((with_bos.targets(), without.targets()), (9, 6));
    }

    #[test]
    fn too_short_windows_and_texts_are_refused() {
        assert!(matches!(
            Windows::cut(&[1, 2, 3], 1, None),
            Err(Error::Windows(_))
        ));
        assert!(matches!(
            Windows::cut(&[1, 2, 3], 4, None),
            Err(Error::Windows(_))
        ));
        assert!(Windows::cut(&[1, 2, 3], 4, Some(0)).is_ok());
    }

    #[test]
    fn a_sample_has_distinct_windows_in_text_order_and_depends_on_the_seed_alone() {
        let text: Vec<u32> = (0..1000).collect();
        let windows = Windows::cut(&text, 10, None).unwrap();
        let sample = windows.sample(20, 7);
        let starts: Vec<u32> = sample.iter().map(|w| w[0]).collect();
        assert_eq!(sample.count(), 20);
        assert!(starts.is_sorted_by(|a, b| a < b));
        assert_eq!(sample, windows.sample(20, 7));
        assert_ne!(sample, windows.sample(20, 8));
        assert_eq!(windows.sample(100, 0), windows);
    }

    #[test]
    fn windows_are_picked_by_place_and_left_out_by_their_tokens() {
        let windows = Windows::cut(&[0, 1, 2, 3, 0, 1, 4, 5], 2, None).unwrap();
        let picked = windows.pick(&[3, 0]);
        assert_eq!(picked.iter().collect::<Vec<_>>(), [[4, 5], [0, 1]]);
        let left = windows.without(&picked);
        assert_eq!(left.iter().collect::<Vec<_>>(), [[2, 3]]);
        assert_eq!(windows.without(&windows).count(), 0);
    }

    #[test]
    fn groups_are_a_partition() {
        let windows = Windows::cut(&(0..70).collect::<Vec<_>>(), 10, None).unwrap();
        let groups: Vec<_> = windows.groups(3).collect();
        assert_eq!(
            groups.iter().map(Windows::count).collect::<Vec<_>>(),
            [3, 3, 1]
        );
        assert!(groups.iter().flat_map(Windows::iter).eq(windows.iter()));
    }
}
