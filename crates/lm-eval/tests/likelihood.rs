//! Log-likelihoods of continuations, compared with whole sequences that run one by one.

use causal_lm::testing::{TestModel, config, configs};
use causal_lm::{Decoder, Model};
use lm_eval::{Continuations, Error, Likelihoods, NoProgress};
use serde_json::json;

fn scores(decoder: &Decoder<'_>, items: &[Continuations], max: usize) -> Vec<Vec<f64>> {
    Likelihoods::measure(decoder, items, max, &NoProgress)
        .unwrap()
        .log_likelihoods
}

/// Σ log softmax(logits)[token] over the continuation, from the logits of the whole sequence but its last token, which
/// nothing follows.
fn alone(model: &Model<'_>, context: &[u32], continuation: &[u32]) -> f64 {
    let tokens = [context, continuation].concat();
    let mut cache = model.full_cache(1).unwrap();
    let logits = model
        .forward_all(&[&tokens[..tokens.len() - 1]], &mut cache)
        .unwrap();
    let logits: Vec<Vec<f32>> = logits.squeeze(0).unwrap().to_vec2().unwrap();
    (context.len()..tokens.len())
        .map(|i| {
            let row: Vec<f64> = logits[i - 1].iter().map(|&x| f64::from(x)).collect();
            let log_sum = row.iter().map(|x| x.exp()).sum::<f64>().ln();
            row[tokens[i] as usize] - log_sum
        })
        .sum()
}

/// Calls `test` with a model of every kind.
fn for_each(test: impl Fn(&Decoder<'_>)) {
    for config in configs() {
        test(&TestModel::new(&config).decoder());
    }
}

fn small() -> TestModel {
    TestModel::new(&config("llama", json!({})))
}

/// A sequence of twelve tokens.
const TOKENS: [u32; 12] = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32];

#[test]
fn sharing_the_context_and_packing_change_nothing() {
    for_each(|decoder| {
        let model = Model::load(decoder).unwrap();
        let vocab = decoder.config().vocab as u32;
        let token = |i: usize| (i * i * 7 + i * 3 + 1) as u32 % vocab;
        // More tokens than one batch holds.
        let items: Vec<Continuations> = (0..60)
            .map(|i| Continuations {
                context: (0..3 + i % 11).map(|t| token(t + i)).collect(),
                continuations: (0..4)
                    .map(|c| {
                        (0..1 + (c * 5 + i) % 17)
                            .map(|t| token(t * c + i))
                            .collect()
                    })
                    .collect(),
            })
            .collect();
        let found = scores(decoder, &items, 64);
        for i in [0, 1, 17, 58, 59] {
            for (c, continuation) in items[i].continuations.iter().enumerate() {
                let expected = alone(&model, &items[i].context, continuation);
                assert!(
                    (found[i][c] - expected).abs() < 1e-4,
                    "{i}, {c}: {} is not {expected}",
                    found[i][c]
                );
            }
        }
    });
}

#[test]
fn a_context_too_long_is_cut_on_the_left() {
    let small = small();
    let decoder = small.decoder();
    let model = Model::load(&decoder).unwrap();
    let tokens = TOKENS;
    let item = Continuations {
        context: tokens[..5].to_vec(),
        continuations: vec![tokens[5..7].to_vec(), tokens[5..8].to_vec()],
    };
    let scored = Likelihoods::measure(&decoder, &[item], 6, &NoProgress).unwrap();
    assert_eq!(scored.truncated, 1);
    let expected = [
        alone(&model, &tokens[..5], &tokens[5..7]),
        alone(&model, &tokens[1..5], &tokens[5..8]),
    ];
    for (found, expected) in scored.log_likelihoods[0].iter().zip(expected) {
        assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
    }
    assert_eq!(scored.tokens, 5 + 1 + 4 + 2);
}

#[test]
fn what_cannot_be_scored_is_named() {
    let small = small();
    let decoder = small.decoder();
    let error = |context: &[u32], continuations: &[&[u32]]| {
        let item = Continuations {
            context: context.to_vec(),
            continuations: continuations.iter().map(|c| c.to_vec()).collect(),
        };
        let items = [
            Continuations {
                context: vec![1],
                continuations: vec![vec![1]],
            },
            item,
        ];
        Likelihoods::measure(&decoder, &items, 4, &NoProgress).unwrap_err()
    };
    for (context, continuations) in [
        (&[][..], &[&[1u32][..]][..]),
        (&[1], &[&[1], &[]]),
        (&[1], &[&[1, 1, 1, 1, 1]]),
    ] {
        let last = continuations.len() - 1;
        assert!(matches!(
            error(context, continuations),
            Error::Continuation { item: 1, continuation, .. } if continuation == last
        ));
    }
    let outside = decoder.config().vocab as u32;
    for (context, continuation) in [([1], [outside]), ([outside], [1])] {
        assert!(matches!(
            error(&context, &[&continuation]),
            Error::Model(error) if matches!(
                *error,
                causal_lm::Error::TokenOutOfRange { token, .. } if token == outside
            )
        ));
    }
}

#[test]
fn scores_of_all_continuations_of_one_token_are_a_distribution() {
    for_each(|decoder| {
        let item = Continuations {
            context: TOKENS.to_vec(),
            continuations: (0..decoder.config().vocab as u32)
                .map(|t| vec![t])
                .collect(),
        };
        let scored = Likelihoods::measure(decoder, &[item], 64, &NoProgress).unwrap();
        assert_eq!(scored.tokens, TOKENS.len(), "the context alone");
        let total: f64 = scored.log_likelihoods[0].iter().map(|x| x.exp()).sum();
        assert!((total - 1.0).abs() < 1e-5, "{total}");
    });
}
