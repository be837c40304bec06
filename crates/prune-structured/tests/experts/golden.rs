//! Agreement with scores that were computed independently, and with transformers on pruned models.

use super::common::{Mixture, logits_of, options};
use candle_core::{Device, Tensor};
use causal_lm::names::ExpertLayout;
use causal_lm::testing::golden_weights;
use causal_lm::{Windows, cross_entropy};
use prune_structured::NoProgress;
use prune_structured::experts::compensation::{ExpertScale, Novice};
use prune_structured::experts::{FewerExperts, Keep, LayerOutcome, fewer, fewer_with_terms, plan};
use serde_json::Value;
use tensor_io::{Checkpoint, Config};

/// Models, tokens and scores.
fn golden() -> Vec<Value> {
    serde_json::from_str(include_str!("../golden/experts.json")).unwrap()
}

fn floats(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap().iter();
    list.map(|x| x.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<usize> {
    let list = value.as_array().unwrap().iter();
    list.map(|x| x.as_u64().unwrap() as usize).collect()
}

fn entries(name: &str, shape: &[usize]) -> Tensor {
    Tensor::from_vec(golden_weights(name, shape), shape, &Device::Cpu).unwrap()
}

struct Case {
    name: String,
    model: Mixture,
    windows: Windows,
    tokens: Vec<u32>,
    golden: Value,
    keep: Keep,
}

fn each(test: impl Fn(&Case)) {
    for golden in golden() {
        let config = Config::new(golden["config"].as_object().unwrap().clone());
        let layout = match golden["layout"].as_str().unwrap() {
            "fused" => ExpertLayout::Fused,
            _ => ExpertLayout::Alone,
        };
        let tokens: Vec<u32> = ids(&golden["tokens"])
            .into_iter()
            .map(|t| t as u32)
            .collect();
        test(&Case {
            name: golden["model"].as_str().unwrap().into(),
            model: Mixture::made(&config, layout, entries),
            windows: Windows::cut(&tokens, tokens.len(), None).unwrap(),
            keep: Keep::Experts(golden["reap_pruned"]["experts"].as_u64().unwrap() as usize),
            tokens,
            golden,
        });
    }
}

impl Case {
    fn layers(&self, method: &str, measure: bool) -> Vec<LayerOutcome> {
        let options = options(method, self.keep).measure_errors(measure);
        plan(&self.model.decoder(), &self.windows, &options, &NoProgress)
            .unwrap()
            .layers
    }

    /// Golden values of the layers that have experts.
    fn expected(&self) -> &[Value] {
        self.golden["layers"].as_array().unwrap()
    }

    fn close(&self, what: &str, found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len(), "{} {what}", self.name);
        for (found, expected) in found.iter().zip(expected) {
            let gap = (found - expected).abs();
            let bar = 2e-5 * expected.abs() + 2e-7;
            assert!(gap < bar, "{} {what}: {found} is not {expected}", self.name);
        }
    }
}

#[test]
fn scores_are_those_computed_independently() {
    each(|case| {
        for (method, field) in [
            ("frequency", "count"),
            ("gate-sum", "gate_sum"),
            ("prob-sum", "prob_sum"),
            ("ean", "ean"),
            ("man", "man"),
            ("msan", "msan"),
            ("reap", "reap"),
            ("mone", "mone"),
            ("drop", "drop"),
        ] {
            let layers = case.layers(method, false);
            assert_eq!(layers.len(), case.expected().len());
            for (layer, expected) in layers.iter().zip(case.expected()) {
                assert_eq!(layer.layer as u64, expected["layer"].as_u64().unwrap());
                case.close(method, &layer.scores, &floats(&expected[field]));
            }
        }
    });
}

#[test]
fn experts_that_are_chosen_together_are_counted() {
    each(|case| {
        for (layer, expected) in case.layers("reap", false).iter().zip(case.expected()) {
            let rows = expected["coactivation"].as_array().unwrap();
            let expected: Vec<f64> = rows.iter().flat_map(floats).collect();
            let together = layer.statistics.together.iter();
            let found: Vec<f64> = together.map(|&tokens| tokens as f64).collect();
            case.close("co-activation", &found, &expected);
        }
    });
}

#[test]
fn clusters_of_router_rows_are_those_computed_independently() {
    each(|case| {
        for (layer, expected) in case.layers("stun", false).iter().zip(case.expected()) {
            let clusters = expected["router_clusters"].as_array().unwrap();
            let clusters: Vec<Vec<usize>> = clusters.iter().map(ids).collect();
            assert_eq!(layer.clusters, clusters, "{}", case.name);
        }
    });
}

#[test]
fn the_best_subsets_are_those_computed_independently() {
    each(|case| {
        let options = options("naee", case.keep).measure_errors(true);
        let decoder = case.model.decoder();
        let found = plan(&decoder, &case.windows, &options, &NoProgress).unwrap();
        let kept = found.plan.layers.iter().flatten().map(|layer| &layer.kept);
        for ((kept, layer), expected) in kept.zip(&found.layers).zip(case.expected()) {
            let naee = &expected["naee"];
            assert_eq!(*kept, ids(&naee["kept"]), "{}", case.name);
            let error = layer.error.unwrap();
            let found = [error.dropped, error.output];
            let squares = [&naee["squared_error"], &naee["squared_output"]];
            case.close("naee", &found, &squares.map(|x| x.as_f64().unwrap()));
        }
    });
}

#[test]
fn factors_of_experts_and_their_errors_are_those_computed_independently() {
    each(|case| {
        let options = options("reap", case.keep)
            .compensation(ExpertScale::default())
            .measure_errors(true);
        let decoder = case.model.decoder();
        let found = plan(&decoder, &case.windows, &options, &NoProgress).unwrap();
        let plans = found.plan.layers.iter().flatten();
        for ((plan, layer), expected) in plans.zip(&found.layers).zip(case.expected()) {
            assert_eq!(plan.kept, ids(&expected["reap_kept"]), "{}", case.name);
            let scales: Vec<f64> = plan.factors.iter().map(|factors| factors[0]).collect();
            case.close("scales", &scales, &floats(&expected["expert_scales"]));
            let error = layer.error.unwrap();
            let squares = ["reap_squared_error", "expert_scales_squared_error"];
            let squares = squares.map(|field| expected[field].as_f64().unwrap());
            case.close("errors", &[error.dropped, error.compensated], &squares);
        }
    });
}

#[test]
fn errors_of_constants_in_the_place_of_experts_are_those_computed_independently() {
    each(|case| {
        let options = options("reap", case.keep)
            .compensation(Novice)
            .measure_errors(true);
        let decoder = case.model.decoder();
        let found = plan(&decoder, &case.windows, &options, &NoProgress).unwrap();
        for (layer, expected) in found.layers.iter().zip(case.expected()) {
            let error = layer.error.unwrap();
            let squares = ["reap_squared_error", "novices_squared_error"];
            let squares = squares.map(|field| expected[field].as_f64().unwrap());
            case.close("novices", &[error.dropped, error.compensated], &squares);
        }
    });
}

#[test]
fn the_factor_of_fewer_experts_is_that_computed_independently() {
    each(|case| {
        let expected = case.expected();
        let Some(chosen) = expected[0]["fewer_k"]["k"].as_u64() else {
            return;
        };
        let found = fewer(
            &case.model.decoder(),
            &case.windows,
            chosen as usize,
            FewerExperts::Scale,
            &NoProgress,
        )
        .unwrap();
        for (layer, expected) in found.layers.iter().flatten().zip(expected) {
            let scale = expected["fewer_k"]["scale"].as_f64().unwrap();
            case.close("scale", &layer.factors[0], &[scale]);
        }
        // What a linear term is fitted to is what that factor leaves.
        let decoder = case.model.decoder();
        let chosen = chosen as usize;
        let found = fewer_with_terms(&decoder, &case.windows, chosen, 2, &NoProgress).unwrap();
        let plans = found.0.layers.iter().flatten();
        for ((layer, term), expected) in plans.zip(found.1.iter().flatten()).zip(expected) {
            let expected = |field: &str| expected["fewer_k"][field].as_f64().unwrap();
            let squares = [layer.factors[0][0], term.scaled];
            let golden = [expected("scale"), expected("squared_error_scaled")];
            case.close("residual", &squares, &golden);
            assert!(term.left < term.scaled);
        }
    });
}

#[test]
fn pruned_models_give_what_stock_transformers_gives() {
    each(|case| {
        let options = options("reap", case.keep);
        let decoder = case.model.decoder();
        let found = plan(&decoder, &case.windows, &options, &NoProgress).unwrap();
        let folder = case.model.written(&found.plan, "pruned");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let pruned = super::common::decoder(&checkpoint);
        let logits = logits_of(&pruned, &case.tokens);
        let vocab = pruned.config().vocab;
        let expected = floats(&case.golden["reap_pruned"]["logits_last"]);
        for (found, expected) in logits[logits.len() - vocab..].iter().zip(expected) {
            let gap = (f64::from(*found) - expected).abs();
            assert!(gap < 2e-5, "{}: {found} is not {expected}", case.name);
        }
        let rows = Tensor::from_vec(logits, (case.tokens.len(), vocab), &Device::Cpu).unwrap();
        let rows = rows.narrow(0, 0, case.tokens.len() - 1).unwrap();
        let losses = cross_entropy(&rows, &case.tokens[1..]).unwrap();
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        let expected = case.golden["reap_pruned"]["mean_nll"].as_f64().unwrap();
        assert!((mean - expected).abs() < 1e-5, "{}: {mean}", case.name);
    });
}
