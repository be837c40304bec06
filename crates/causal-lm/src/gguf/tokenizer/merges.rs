//! The merges of a SentencePiece vocabulary, which its files leave out.

use super::{TokenKind, Vocabulary};

/// Pairs of tokens in the order in which they merge: those of the token with the highest score first.
///
/// SentencePiece merges two neighbours wherever the result is a token, the best score first. As a list of merges that is
/// every split of every token into two tokens. Among tokens of one score, and among the splits of one token, those of
/// smaller ids come first.
pub(super) fn merges(vocabulary: &Vocabulary<'_>, scores: &[f32]) -> Vec<(String, String)> {
    let ids = vocabulary.ids();
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for ((&token, &kind), &score) in vocabulary.tokens.iter().zip(&vocabulary.kinds).zip(scores) {
        if !matches!(kind, TokenKind::Normal | TokenKind::UserDefined) {
            continue;
        }
        let splits = token
            .char_indices()
            .skip(1)
            .map(|(at, _)| token.split_at(at));
        let both = |(left, right): (&'_ str, &'_ str)| Some((*ids.get(left)?, *ids.get(right)?));
        let mut of_token: Vec<(u32, u32)> = splits.filter_map(both).collect();
        of_token.sort_unstable();
        let texts = |(left, right): (u32, u32)| {
            let [left, right] = [left, right].map(|id| vocabulary.tokens[id as usize]);
            (score, left, right)
        };
        merges.extend(of_token.into_iter().map(texts));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    let owned = |(_, left, right): (f32, &str, &str)| (left.to_string(), right.to_string());
    merges.into_iter().map(owned).collect()
}
