//! Statistics that are computed in parts.

use causal_lm::Windows;
use causal_lm::testing::{self, TestModel};
use prune_structured::stats::{Needs, Part};
use prune_structured::{Calibration, Collect, Error, NoProgress, Plan, Recipe};
use std::path::Path;

fn windows(count: u32) -> Windows {
    let text: Vec<u32> = (0..count * 16).map(|i| (i * i + i / 7) % 50).collect();
    Windows::cut(&text, 16, None).unwrap()
}

fn model(model_type: &str) -> TestModel {
    TestModel::new(&testing::config(model_type, serde_json::json!({})))
}

fn calibrate(model: &TestModel, windows: &Windows, needs: Needs, dir: &Path) -> Calibration {
    std::fs::create_dir_all(dir).unwrap();
    let collect = Collect::new(needs, dir);
    Calibration::run(&model.decoder(), windows, &collect, &NoProgress).unwrap()
}

const GRAM: Needs = Needs {
    fluctuation: false,
    gram: true,
};

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-5 * a.abs().max(b.abs()).max(1e-9)
}

#[test]
fn merged_parts_are_the_statistics_of_all_windows_up_to_rounding() {
    for config in testing::configs() {
        let kind = config.get("model_type").unwrap().to_string();
        let model = TestModel::new(&config);
        let all = windows(12);
        let whole = calibrate(&model, &all, GRAM, &model.path("whole"));
        for count in [2, 3, 5] {
            let mut parts = Vec::new();
            for part in 0..count {
                let places: Vec<usize> = (part * 12 / count..(part + 1) * 12 / count).collect();
                let dir = model.path(&format!("{count}-{part}"));
                let made = calibrate(&model, &all.pick(&places), GRAM, &dir);
                made.save(&dir).unwrap();
                // As another process has them.
                let read = Calibration::load(&dir).unwrap();
                assert_eq!(read.layers, made.layers);
                parts.push(read);
            }
            let dir = model.path(&format!("merged-{count}"));
            std::fs::create_dir_all(&dir).unwrap();
            let merged = Calibration::merge(&parts, &dir).unwrap();
            for (layer, (found, expected)) in merged.layers.iter().zip(&whole.layers).enumerate() {
                assert!(close(found.hidden_square, expected.hidden_square));
                for part in Part::ALL {
                    let (Some(found), Some(expected)) = (found.part(part), expected.part(part))
                    else {
                        assert!(found.part(part).is_none() && expected.part(part).is_none());
                        continue;
                    };
                    assert_eq!(found.samples, expected.samples);
                    assert_eq!(found.moments.count, expected.moments.count);
                    let pairs = found.moments.centred.iter().zip(&expected.moments.centred);
                    assert!(
                        pairs.into_iter().all(|(a, b)| close(*a, *b)),
                        "{kind} {layer}"
                    );
                    let gram =
                        |of: &Calibration| of.gram(layer, part).unwrap().to_vec2::<f32>().unwrap();
                    let largest = gram(&whole)
                        .concat()
                        .into_iter()
                        .fold(0f32, |m, x| m.max(x.abs()));
                    for (a, b) in gram(&merged).concat().iter().zip(gram(&whole).concat()) {
                        assert!((a - b).abs() <= 1e-5 * largest, "{kind} {layer}: {a} {b}");
                    }
                }
            }
            let again = model.path("again");
            std::fs::create_dir_all(&again).unwrap();
            assert_eq!(
                Calibration::merge(&parts, &again).unwrap().layers,
                merged.layers
            );
            if !prunes_heads(&kind) {
                continue;
            }
            let recipe = Recipe::named("flap", 3).unwrap();
            let plan = |of: &Calibration| {
                Plan::make(&model.decoder(), of, &recipe, 0.3, &NoProgress).unwrap()
            };
            assert_eq!(
                plan(&merged).widths(),
                plan(&whole).widths(),
                "{kind} {count}"
            );
        }
    }
}

/// Mixtures have other methods, and OLMo 2 normalises all heads together.
fn prunes_heads(kind: &str) -> bool {
    !["qwen2_moe", "mixtral", "olmo2"]
        .iter()
        .any(|other| kind.contains(other))
}

#[test]
fn what_does_not_go_together_is_refused() {
    let model = model("llama");
    let all = windows(4);
    let part = |name: &str, needs| calibrate(&model, &all, needs, &model.path(name));
    let (plain, gram) = (part("plain", Needs::default()), part("gram", GRAM));
    let other = self::model("qwen3");
    let other = calibrate(&other, &all, Needs::default(), &model.path("other"));
    let dir = model.path("merged");
    let refused = |parts: &[Calibration]| match Calibration::merge(parts, &dir) {
        Err(Error::Parts(reason)) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(&[]).contains("no parts"));
    assert!(refused(&[plain.clone(), gram.clone()]).contains("kinds"));
    assert!(refused(&[plain.clone(), other]).contains("models"));
    let fluctuation = Needs {
        fluctuation: true,
        gram: false,
    };
    let ordered = part("ordered", fluctuation);
    assert!(refused(&[ordered.clone(), ordered]).contains("order of windows"));
    assert!(matches!(
        gram.save(model.path("elsewhere")),
        Err(Error::Parts(_))
    ));
    assert!(matches!(
        Calibration::load(model.path("plain")),
        Err(Error::Parts(_))
    ));
}

#[test]
fn a_changed_byte_of_saved_statistics_is_noticed() {
    let model = model("llama");
    let dir = model.path("part");
    calibrate(&model, &windows(4), GRAM, &dir)
        .save(&dir)
        .unwrap();
    let path = dir.join("calibration.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let changed = text.replacen("\"samples\":4", "\"samples\":5", 1);
    assert_ne!(text, changed);
    std::fs::write(&path, changed).unwrap();
    let error = Calibration::load(&dir).unwrap_err().to_string();
    assert!(
        error.contains("calibration.json") && error.contains("checksum"),
        "{error}"
    );
}
