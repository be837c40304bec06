//! Log-likelihoods of continuations, beside logits of transformers and beside whole sequences run one by one.

mod common;

use candle_core::{DType, Device};
use causal_lm::{Continuations, Decoder, Error, Likelihoods, Model, NoProgress};
use common::{Golden, for_each};
use tensor_io::Checkpoint;

fn scores(decoder: &Decoder<'_>, items: &[Continuations], max: usize) -> Vec<Vec<f64>> {
    Likelihoods::measure(decoder, items, max, &NoProgress)
        .unwrap()
        .log_likelihoods
}

/// Σ log softmax(logits)[token] over `tokens[from..]`, predicted by the rows before them.
fn sum(logits: &[Vec<f32>], tokens: &[u32], from: usize) -> f64 {
    (from..tokens.len())
        .map(|i| {
            let row: Vec<f64> = logits[i - 1].iter().map(|&x| f64::from(x)).collect();
            let log_sum = row.iter().map(|x| x.exp()).sum::<f64>().ln();
            row[tokens[i] as usize] - log_sum
        })
        .sum()
}

/// The same by running the one sequence through a cache.
fn alone(model: &Model<'_>, context: &[u32], continuation: &[u32]) -> f64 {
    let tokens = [context, continuation].concat();
    let mut cache = model.full_cache(1).unwrap();
    let logits = model.forward_all(&[&tokens], &mut cache).unwrap();
    sum(
        &logits.squeeze(0).unwrap().to_vec2().unwrap(),
        &tokens,
        context.len(),
    )
}

#[test]
fn scores_agree_with_the_logits_of_transformers() {
    for_each(|name, golden, decoder| {
        let (tokens, logits) = (golden.tokens(), golden.logits());
        let end = tokens.len();
        assert!((sum(&logits, &tokens, 1) / (end - 1) as f64 + golden.mean_nll()).abs() < 1e-5);
        let cut = |at: usize| Continuations {
            context: tokens[..at].to_vec(),
            continuations: vec![
                tokens[at..end].to_vec(),
                tokens[at..at + 1].to_vec(),
                tokens[at..at + 2].to_vec(),
            ],
        };
        let cuts = [1, 3, end - 2];
        let found = scores(decoder, &cuts.map(cut), 64);
        for (at, found) in cuts.into_iter().zip(found) {
            for (found, to) in found.into_iter().zip([end, at + 1, at + 2]) {
                let expected = sum(&logits, &tokens[..to], at);
                assert!(
                    (found - expected).abs() < 1e-4,
                    "{name}: {found} is not {expected}"
                );
            }
        }
    });
}

#[test]
fn sharing_the_context_and_packing_change_nothing() {
    for_each(|name, _, decoder| {
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
                    "{name}, {i}, {c}: {} is not {expected}",
                    found[i][c]
                );
            }
        }
    });
}

#[test]
fn a_context_too_long_is_cut_on_the_left() {
    let (_, golden) = Golden::all().remove(0);
    let dir = tempfile::tempdir().unwrap();
    golden.write(&dir.path().join("model"));
    let checkpoint = Checkpoint::open(dir.path().join("model")).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let model = Model::load(&decoder).unwrap();
    let tokens = golden.tokens();
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
    let (_, golden) = Golden::all().remove(0);
    let dir = tempfile::tempdir().unwrap();
    golden.write(&dir.path().join("model"));
    let checkpoint = Checkpoint::open(dir.path().join("model")).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
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
            Error::TokenOutOfRange { token, .. } if token == outside
        ));
    }
}

#[test]
fn scores_of_all_continuations_of_one_token_are_a_distribution() {
    for_each(|name, golden, decoder| {
        let item = Continuations {
            context: golden.tokens(),
            continuations: (0..decoder.config().vocab as u32)
                .map(|t| vec![t])
                .collect(),
        };
        let scored = Likelihoods::measure(decoder, &[item], 64, &NoProgress).unwrap();
        assert_eq!(scored.tokens, golden.tokens().len(), "the context alone");
        let total: f64 = scored.log_likelihoods[0].iter().map(|x| x.exp()).sum();
        assert!((total - 1.0).abs() < 1e-5, "{name}: {total}");
    });
}
