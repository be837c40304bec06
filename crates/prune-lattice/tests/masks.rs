//! What methods keep: budgets, scopes, rules, blocks, wirings.

mod common;

use candle_core::Tensor;
use common::{INPUTS, network};
use prune_lattice::{
    Cell, Error, NoProgress,
    calibration::{Calibration, RecordConfig, record},
    centrality::Centrality,
    data::Examples,
    influence::{Aggregate, StackEdges},
    mask::{Block, Mask, MaskRule, MaskSet, neuron_masks},
    order::{Connected, RankBy, Verdict, bits::BitMatrix},
    prune::{
        Compete, LatticeConfig, Method, PruneConfig, PruneContext, Scope, prune, prune_in,
        prune_matrix, rank_neurons,
    },
    rnn::Rnn,
};

fn calibrated(rnn: &Rnn) -> Calibration {
    let text = Examples::Text((0..400).map(|k| k * (k + 3) % 5).collect());
    record(rnn, &text, &RecordConfig::default(), &NoProgress).unwrap()
}

/// Every gate of layers of 24 and 17 neurons keeps its share of the blocks, each of them whole.
fn assert_whole_blocks(masks: &MaskSet, block: Block, cell: Cell, s: f64) {
    for (layer, n) in [24usize, 17].into_iter().enumerate() {
        let Some(mask) = masks.get(&format!("rnn.weight_hh_l{layer}")) else {
            assert_eq!(s, 0.0);
            continue;
        };
        let (down, across) = block.grid(n, n);
        for g in 0..cell.gates() {
            let mut kept = 0;
            for a in 0..down {
                for b in 0..across {
                    let rows = a * block.rows..n.min((a + 1) * block.rows);
                    let cols = b * block.cols..n.min((b + 1) * block.cols);
                    let inside: Vec<bool> = rows
                        .flat_map(|i| cols.clone().map(move |j| (i, j)))
                        .map(|(i, j)| mask.keep().get(g * n + i, j))
                        .collect();
                    assert!(inside.iter().all(|&k| k == inside[0]));
                    kept += usize::from(inside[0]);
                }
            }
            let expected = ((1.0 - s) * (down * across) as f64).round() as usize;
            assert_eq!(kept, expected, "{cell} {block:?} {s}");
        }
    }
}

#[test]
fn blocks_keep_the_diagonal_and_a_density_for_each_gate_where_they_are_asked_to() {
    let rnn = network(Cell::Gru, INPUTS[0], &[24], 5);
    let densities = vec![0.25, 0.5, 0.75];
    let config = PruneConfig::new(Method::Block8x4, 0.0).with(|c| {
        c.keep_diagonal = true;
        c.densities = Some(densities.clone());
    });
    let (masks, report) = prune(&rnn, &config).unwrap();
    let keep = masks.get("rnn.weight_hh_l0").unwrap().keep();
    for (g, density) in densities.iter().enumerate() {
        assert!((0..24).all(|i| keep.get(g * 24 + i, i)));
        let whole = (0..3 * 6)
            .filter(|b| {
                let (top, left) = (8 * (b / 6), 4 * (b % 6));
                let mut entries = (0..32).map(|e| (g * 24 + top + e / 4, left + e % 4));
                entries.all(|(i, j)| keep.get(i, j))
            })
            .count();
        assert_eq!(whole, (density * 18.0_f64).round() as usize);
        // What is reported counts the diagonal too.
        let kept = (0..24)
            .map(|i| keep.row_ones(g * 24 + i).count())
            .sum::<usize>();
        assert!((report.layers[0].gates[g] - (1.0 - kept as f64 / 576.0)).abs() < 1e-12);
    }
    for wrong in [vec![0.5], vec![0.5, 0.5, 1.5]] {
        let config = config.clone().with(|c| c.densities = Some(wrong));
        assert!(matches!(
            prune(&rnn, &config),
            Err(Error::Setting {
                setting: "densities",
                ..
            })
        ));
    }
}

#[test]
fn weighed_inputs_change_which_weights_are_kept_and_need_a_calibration() {
    let rnn = network(Cell::Lstm, INPUTS[0], &[24], 5);
    let calibration = calibrated(&rnn);
    let config = PruneConfig::new(Method::Magnitude, 0.5).with(|c| c.weigh_inputs = true);
    assert!(matches!(
        prune(&rnn, &config),
        Err(Error::Setting {
            setting: "calibration",
            ..
        })
    ));
    let context = PruneContext::default().calibrated(&calibration);
    let (masks, _) = prune_in(&rnn, &context, &config).unwrap();
    let keep = masks.get("rnn.weight_hh_l0").unwrap().keep();
    let w = &rnn.params().get("rnn.weight_hh_l0").unwrap().data;
    let before = &calibration.layers[0].before;
    let score = |e: usize| f64::from(w[e]).abs() * before.second(e % 24, e % 24).sqrt();
    for g in 0..4 {
        let range = g * 576..(g + 1) * 576;
        let (kept, pruned): (Vec<usize>, Vec<usize>) =
            range.partition(|e| keep.get(e / 24, e % 24));
        let smallest = kept.iter().map(|&e| score(e)).fold(f64::INFINITY, f64::min);
        let largest = pruned.iter().map(|&e| score(e)).fold(0.0, f64::max);
        assert!(smallest >= largest && kept.len() == 288);
    }
    let (plain, _) = prune(&rnn, &PruneConfig::new(Method::Magnitude, 0.5)).unwrap();
    assert_ne!(plain, masks);
}

#[test]
fn masks_stay_within_the_entries_that_exist_and_budgets_count_only_those() {
    let rnn = network(Cell::Lstm, INPUTS[0], &[20], 5);
    let calibration = calibrated(&rnn);
    // A band of the same width in every gate.
    let mut within = MaskSet::default();
    let band = BitMatrix::from_fn(80, 20, |i, j| (i % 20).abs_diff(j) < 6);
    let exist = band.count();
    within.insert("rnn.weight_hh_l0", Mask::of_matrix(band.clone()));
    let context = PruneContext::default()
        .calibrated(&calibration)
        .within(&within);
    for &method in Method::ALL {
        for compete in [Compete::Global, Compete::PerMatrix, Compete::PerGate] {
            let config = PruneConfig::new(method, 0.5).with(|c| c.compete = compete);
            let found = prune_in(&rnn, &context, &config);
            let drawn = matches!(method, Method::Ws | Method::Ba | Method::Er);
            if drawn || method.block().is_some() {
                assert!(matches!(
                    found,
                    Err(Error::Setting {
                        setting: "wiring",
                        ..
                    })
                ));
                continue;
            }
            let (masks, report) = found.unwrap();
            let keep = masks.get("rnn.weight_hh_l0").unwrap().keep();
            assert!((0..80).all(|i| keep.row_ones(i).all(|j| band.get(i, j))));
            let expected = match method {
                Method::Dense => exist,
                Method::ZeroWhh => 0,
                _ => 4 * ((exist / 4) as f64 * 0.5).round() as usize,
            };
            assert_eq!(keep.count(), expected, "{method}");
            let sparsity = 1.0 - expected as f64 / exist as f64;
            assert!((report.sparsity.recurrent - sparsity).abs() < 1e-12);
        }
    }
}

#[test]
fn every_method_meets_its_budget_exactly() {
    for &cell in Cell::ALL {
        let rnn = network(cell, INPUTS[0], &[24, 17], 5);
        let calibration = calibrated(&rnn);
        let context = PruneContext::default().calibrated(&calibration);
        for &method in Method::ALL {
            for s in [0.0, 0.3, 0.5, 0.75, 0.9, 0.99] {
                let config = PruneConfig::new(method, s).with(|c| c.seed = 3);
                let (masks, report) = prune_in(&rnn, &context, &config).unwrap();
                if let Some(block) = method.block() {
                    assert_whole_blocks(&masks, block, cell, s);
                    continue;
                }
                let mut expected = 0;
                for n in [24usize, 17] {
                    let kept = ((1.0 - s) * (n * n) as f64).round() as usize;
                    expected += match method {
                        Method::Dense => 0,
                        Method::ZeroWhh => cell.gates() * n * n,
                        _ => cell.gates() * (n * n - kept),
                    };
                }
                assert_eq!(masks.pruned(), expected, "{cell} {method} {s}");
                let all = cell.gates() * (24 * 24 + 17 * 17);
                assert!((report.sparsity.recurrent - expected as f64 / all as f64).abs() < 1e-12);
                assert!(
                    report.sparsity.total < report.sparsity.recurrent_and_input || expected == 0
                );
            }
        }
    }
}

#[test]
fn scopes_rules_and_competition_do_what_they_say() {
    let rnn = network(Cell::Gru, INPUTS[0], &[16, 12], 5);
    let base = PruneConfig::new(Method::Magnitude, 0.6);
    let pruned = |config: &PruneConfig| {
        let (masks, _) = prune(&rnn, config).unwrap();
        masks
            .iter()
            .map(|(name, m)| (name.to_owned(), m.pruned() as f64 / m.len() as f64))
            .collect::<Vec<_>>()
    };
    let names = |config: &PruneConfig| pruned(config).into_iter().map(|p| p.0).collect::<Vec<_>>();
    assert_eq!(
        names(&base.clone().with(|c| c.scope = Scope::I2h)),
        ["rnn.weight_ih_l0", "rnn.weight_ih_l1"]
    );
    let both = base.clone().with(|c| c.scope = Scope::Both);
    assert_eq!(names(&both).len(), 4);
    // Global competition: one threshold, different shares, the same total.
    let global = both.clone().with(|c| c.compete = Compete::Global);
    assert!(pruned(&global).iter().any(|(_, s)| (s - 0.6).abs() > 0.02));
    assert_eq!(
        prune(&rnn, &global).unwrap().0.pruned(),
        prune(&rnn, &both).unwrap().0.pruned()
    );
    let (masks, _) = prune(&rnn, &global).unwrap();
    let (mut smallest_kept, mut largest_pruned) = (f32::MAX, 0f32);
    for (name, m) in masks.iter() {
        for (e, w) in rnn.params().get(name).unwrap().data.iter().enumerate() {
            let cols = m.dims()[1];
            if m.keep().get(e / cols, e % cols) {
                smallest_kept = smallest_kept.min(w.abs())
            } else {
                largest_pruned = largest_pruned.max(w.abs())
            }
        }
    }
    assert!(smallest_kept >= largest_pruned);
    // Per gate: the same share in each.
    let (_, report) = prune(&rnn, &base.clone().with(|c| c.compete = Compete::PerGate)).unwrap();
    assert!(
        report.layers[0]
            .gates
            .iter()
            .all(|g| (g - report.layers[0].gates[0]).abs() < 1e-12)
    );
    // Neuron rules apply to input matrices too; lambda 0 is magnitude.
    for method in [Method::LatticeContext, Method::Strength] {
        for rule in [
            MaskRule::Both,
            MaskRule::Either,
            MaskRule::WeightedMagnitude { lambda: 1.0 },
        ] {
            let shares = pruned(&both.clone().with(|c| {
                c.method = method;
                c.rule = rule;
            }));
            assert!(shares.len() == 4 && shares.iter().all(|(_, s)| (s - 0.6).abs() < 0.01));
        }
    }
    let base = base.with(|c| c.compete = Compete::PerMatrix);
    let plain = base.clone().with(|c| {
        c.method = Method::Strength;
        c.rule = MaskRule::WeightedMagnitude { lambda: 0.0 };
    });
    assert_eq!(
        prune(&rnn, &plain).unwrap().0,
        prune(&rnn, &base).unwrap().0
    );
    assert!(matches!(
        prune(&rnn, &both.with(|c| c.method = Method::Ws)),
        Err(Error::Setting {
            setting: "scope",
            ..
        })
    ));
}

#[test]
fn the_rule_both_keeps_connections_among_the_best_neurons_and_either_all_that_touch_one() {
    let rnn = network(Cell::Lstm, INPUTS[0], &[20], 5);
    let config = PruneConfig::new(Method::Strength, 1.0 - 0.25);
    let keep = rank_neurons(&rnn, &config).unwrap().remove(0);
    assert_eq!(keep.iter().filter(|&&k| k).count(), 10);
    let mask = |rule, sparsity| {
        let (masks, _) = prune(
            &rnn,
            &config.clone().with(|c| {
                c.rule = rule;
                c.sparsity = sparsity;
            }),
        )
        .unwrap();
        masks.get("rnn.weight_hh_l0").unwrap().keep().clone()
    };
    let (both, either) = (mask(MaskRule::Both, 0.75), mask(MaskRule::Either, 0.25));
    for g in 0..4 {
        for i in 0..20 {
            for j in 0..20 {
                assert_eq!(both.get(g * 20 + i, j), keep[i] && keep[j]);
                assert_eq!(either.get(g * 20 + i, j), keep[i] || keep[j]);
            }
        }
    }
}

#[test]
fn a_mask_of_a_matrix_comes_back_in_the_layout_of_its_framework() {
    let rnn = network(Cell::Lstm, INPUTS[0], &[10], 5);
    let w = rnn
        .params()
        .to_tensors()
        .unwrap()
        .remove("rnn.weight_hh_l0")
        .unwrap();
    let config = PruneConfig::new(Method::Threshold, 0.7);
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let torch = prune_matrix(&w, Cell::Lstm, prune_lattice::GateLayout::PyTorch, &config).unwrap();
    let keras = prune_matrix(
        &w.t().unwrap(),
        Cell::Lstm,
        prune_lattice::GateLayout::Keras,
        &config,
    )
    .unwrap();
    assert_eq!(
        flat(&keras.t().unwrap().contiguous().unwrap()),
        flat(&torch)
    );
    let block = |k: usize| w.narrow(0, k * 10, 10).unwrap();
    let onnx = Tensor::cat(&[block(0), block(3), block(1), block(2)], 0)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let mask = prune_matrix(&onnx, Cell::Lstm, prune_lattice::GateLayout::Onnx, &config).unwrap();
    assert_eq!(mask.dims(), [1, 40, 10]);
    // Tiled over the gates, so the same in every order.
    assert_eq!(flat(&mask), flat(&torch));
    assert_eq!(flat(&torch).iter().filter(|&&v| v == 1.0).count(), 4 * 30);
    for s in [1.0, -0.1, f64::NAN] {
        assert!(matches!(
            prune_matrix(
                &w,
                Cell::Lstm,
                prune_lattice::GateLayout::PyTorch,
                &PruneConfig::new(Method::Random, s)
            ),
            Err(Error::Sparsity(_))
        ));
    }
    assert!(matches!(
        prune_matrix(&w, Cell::Tanh, prune_lattice::GateLayout::PyTorch, &config),
        Err(Error::Shape { .. })
    ));
}

#[test]
fn masks_apply_to_tensors_and_survive_saving() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("masks.safetensors");
    let rnn = network(Cell::Lstm, INPUTS[1], &[70], 5);
    let (masks, _) = prune(&rnn, &PruneConfig::new(Method::Random, 0.5)).unwrap();
    let masks =
        masks.intersection(&neuron_masks(&rnn, &[(0..70).map(|x| x % 3 != 0).collect()]).unwrap());
    masks.save(&file).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(MaskSet::load(&file).unwrap(), masks);
    let mut tensors = rnn.params().to_tensors().unwrap();
    masks.apply_to_tensors(&mut tensors).unwrap();
    let mut flat = rnn.clone();
    masks.apply(flat.params_mut()).unwrap();
    for p in flat.params().iter() {
        assert_eq!(
            tensors[&p.name]
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap(),
            p.data
        );
    }
    let mut wrong = MaskSet::default();
    wrong.insert("rnn.weight_hh_l0", Mask::of_matrix(BitMatrix::ones(3, 3)));
    assert!(matches!(
        wrong.apply(flat.params_mut()),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(
        MaskSet::load(&dir.path().join("absent")),
        Err(Error::Tensors(_))
    ));
    std::fs::write(&file, b"not a checkpoint").unwrap();
    assert!(matches!(MaskSet::load(&file), Err(Error::Tensors(_))));
}

#[test]
fn every_setting_of_the_lattice_meets_its_budget_on_a_stack() {
    let rnn = network(Cell::Gru, INPUTS[0], &[20, 14], 5);
    let base = LatticeConfig::default();
    let mut settings = Vec::new();
    for centrality in [
        Centrality::Strength,
        Centrality::PageRank,
        Centrality::Reach,
        Centrality::Betweenness,
    ] {
        settings.push(base.clone().with(|c| c.centrality = centrality));
    }
    for verdict in [Verdict::Meet, Verdict::Join, Verdict::Both] {
        for connected in [Connected::No, Connected::InOrOut, Connected::InAndOut] {
            settings.push(base.clone().with(|c| {
                c.verdict = verdict;
                c.connected = connected;
                c.beta = 0.0;
            }));
        }
    }
    for orientation in [RankBy::Strength, RankBy::PageRank, RankBy::FeedbackArc] {
        settings.push(base.clone().with(|c| c.orientation = orientation));
    }
    for connected in [Connected::InAndOut, Connected::InOrOut] {
        settings.push(base.clone().with(|c| {
            c.edges = StackEdges::LayerGraded;
            c.connected = connected;
        }));
    }
    settings.push(base.with(|c| c.aggregate = Aggregate::Gate(2)));
    let kept = 3 * (100 + 49);
    for lattice in settings {
        for method in [
            Method::LatticeContext,
            Method::LatticeReachability,
            Method::LatticeOriented,
        ] {
            let config = PruneConfig::new(method, 0.75).with(|c| c.lattice = lattice.clone());
            match prune(&rnn, &config) {
                Ok((masks, report)) => {
                    assert_eq!(
                        masks.pruned(),
                        3 * (400 + 196) - kept,
                        "{method} {lattice:?}"
                    );
                    assert_eq!(report.cuts.len(), 16);
                    assert!(
                        report
                            .layers
                            .iter()
                            .all(|l| l.spectral_radius < l.spectral_radius_before)
                    );
                }
                // Without recurrent edges no neuron of two layers has edges both in and out.
                Err(Error::DegenerateOrder { .. }) => {
                    let graded = lattice.edges == StackEdges::LayerGraded;
                    assert!(
                        graded && lattice.connected == Connected::InAndOut,
                        "{method} {lattice:?}"
                    );
                }
                Err(e) => panic!("{e}"),
            }
        }
    }
}
