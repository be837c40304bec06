//! The order core against hand-made lattices, a brute-force oracle that builds the completion, and its invariants.

use proptest::prelude::*;
use prune_lattice::{
    Error,
    influence::{Aggregate, Influence, StackEdges, StackLayer},
    order::{
        Connected, Criterion, Cut, OrderMode, Poset, RankBy, Verdict, bits::BitMatrix,
        context::irreducible_rows, persistence, thresholds, verdicts,
    },
};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;

fn digraph(n: usize, edges: &[(usize, usize)]) -> BitMatrix {
    let mut g = BitMatrix::new(n, n);
    edges.iter().for_each(|&(a, b)| g.set(a, b, true));
    g
}

/// Meet-irreducible neurons of an acyclic digraph.
fn meet(n: usize, edges: &[(usize, usize)]) -> Vec<usize> {
    let poset = Poset::of_digraph(&digraph(n, edges));
    ones(&poset.per_neuron(&poset.meet_irreducible()))
}

fn ones(flags: &[bool]) -> Vec<usize> {
    (0..flags.len()).filter(|&x| flags[x]).collect()
}

#[test]
fn a_chain_has_all_but_its_greatest_element_meet_irreducible() {
    for n in 1..20 {
        let edges: Vec<_> = (1..n).map(|k| (k - 1, k)).collect();
        assert_eq!(meet(n, &edges), (0..n - 1).collect::<Vec<_>>());
    }
}

#[test]
fn a_single_point_has_none_and_an_antichain_all() {
    assert!(meet(1, &[]).is_empty());
    for n in 2..10 {
        assert_eq!(meet(n, &[]).len(), n);
    }
}

#[test]
fn small_posets_have_the_known_irreducibles() {
    // V: x below y and z; and its dual.
    assert_eq!(meet(3, &[(0, 1), (0, 2)]), [1, 2]);
    assert_eq!(meet(3, &[(0, 2), (1, 2)]), [0, 1]);
    // Bowtie: the lower two have two covers each and are irreducible all the same.
    assert_eq!(meet(4, &[(0, 2), (0, 3), (1, 2), (1, 3)]), [0, 1, 2, 3]);
    // N: a < c, b < c, b < d.
    assert_eq!(meet(4, &[(0, 2), (1, 2), (1, 3)]), [0, 2, 3]);
    // M3 and N5.
    assert_eq!(
        meet(5, &[(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4)]),
        [1, 2, 3]
    );
    assert_eq!(
        meet(5, &[(0, 1), (1, 2), (2, 4), (0, 3), (3, 4)]),
        [1, 2, 3]
    );
}

#[test]
fn a_boolean_lattice_has_its_coatoms() {
    for k in 1..7 {
        let n = 1 << k;
        let edges: Vec<_> = (0..n)
            .flat_map(|s| {
                (0..k)
                    .filter(move |b| s >> b & 1 == 0)
                    .map(move |b| (s, s | 1 << b))
            })
            .collect();
        let expected: Vec<_> = (0..n)
            .filter(|s: &usize| s.count_ones() as usize == k - 1)
            .collect();
        assert_eq!(meet(n, &edges), expected);
    }
}

#[test]
fn a_cycle_is_one_element() {
    let p = Poset::of_digraph(&digraph(4, &[(0, 1), (1, 2), (2, 0), (2, 3)]));
    assert_eq!(p.len(), 2);
    assert_eq!(ones(&p.per_neuron(&p.meet_irreducible())), [0, 1, 2]);
}

/// A random acyclic digraph on `n` vertices, with the vertices in random order.
fn random_dag(rng: &mut ChaCha8Rng, n: usize) -> BitMatrix {
    let density = rng.random_range(0.0..0.9);
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(rng);
    let mut g = BitMatrix::new(n, n);
    for a in 0..n {
        for b in a + 1..n {
            if rng.random_bool(density) {
                g.set(order[a], order[b], true);
            }
        }
    }
    g
}

/// Down-sets by repeated squaring of the relation, as plain u64 sets.
fn down_sets(g: &BitMatrix) -> Vec<u64> {
    let n = g.rows();
    let mut down: Vec<u64> = (0..n).map(|x| 1 << x).collect();
    for _ in 0..n {
        for x in 0..n {
            for y in 0..n {
                if g.get(x, y) {
                    down[y] |= down[x];
                }
            }
        }
    }
    down
}

/// All intersections of the given sets, the empty one included, and which of them are meet-irreducible (one upper cover).
fn irreducible_closed_sets(n: usize, sets: &[u64]) -> BTreeSet<u64> {
    let mut closed: BTreeSet<u64> = [(1u64 << n) - 1].into();
    for &s in sets {
        let more: Vec<u64> = closed.iter().map(|c| c & s).collect();
        closed.extend(more);
    }
    closed
        .iter()
        .copied()
        .filter(|&s| {
            let above: Vec<u64> = closed
                .iter()
                .copied()
                .filter(|&t| t != s && s & t == s)
                .collect();
            above
                .iter()
                .filter(|&&t| above.iter().all(|&u| u == t || u & t != u))
                .count()
                == 1
        })
        .collect()
}

#[test]
fn verdicts_agree_with_the_completion_on_3000_random_posets() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (mut two_covers, mut two_covers_irreducible) = (0, 0);
    for _ in 0..3000 {
        let n = rng.random_range(1..=8);
        let g = random_dag(&mut rng, n);
        let poset = Poset::of_digraph(&g);
        let down = down_sets(&g);
        let oracle = irreducible_closed_sets(n, &down);
        let mine = poset.per_neuron(&poset.meet_irreducible());
        for x in 0..n {
            assert_eq!(mine[x], oracle.contains(&down[x]), "{g:?}");
        }
        // Every meet-irreducible cut is the down-set of some element.
        assert!(oracle.iter().all(|s| down.contains(s)));
        // Meet-density: each down-set is the intersection of those of the irreducibles above.
        for x in 0..n {
            let meet = (0..n)
                .filter(|&m| mine[m] && down[m] & down[x] == down[x])
                .fold((1u64 << n) - 1, |s, m| s & down[m]);
            assert_eq!(meet, down[x]);
        }
        // One cover implies irreducible, not the other way round.
        let of = &poset.classes().of;
        let covers = poset.covers();
        for x in 0..n {
            match covers.iter().filter(|(a, _)| *a == of[x]).count() {
                1 => assert!(mine[x]),
                2.. => {
                    two_covers += 1;
                    two_covers_irreducible += usize::from(mine[x]);
                }
                _ => {}
            }
        }
        // Join-irreducibles are the meet-irreducibles of the reversed order.
        let reversed = Poset::of_digraph(&g.transpose());
        assert_eq!(
            poset.per_neuron(&poset.join_irreducible()),
            reversed.per_neuron(&reversed.meet_irreducible())
        );
        assert_eq!(
            poset.per_neuron(&poset.meet_irreducible()),
            reversed.per_neuron(&reversed.join_irreducible())
        );
    }
    // About a fifth of the elements with several covers are irreducible: counting covers would miss them.
    assert!(two_covers_irreducible * 10 > two_covers && two_covers_irreducible * 3 < two_covers);
}

#[test]
fn row_verdicts_agree_with_the_concept_lattice_on_2000_random_contexts() {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    for _ in 0..2000 {
        let n = rng.random_range(1..=7);
        let density = rng.random_range(0.1..0.95);
        let a = BitMatrix::from_fn(n, n, |_, _| rng.random_bool(density));
        let rows: Vec<u64> = (0..n).map(|x| a.row(x)[0]).collect();
        let oracle = irreducible_closed_sets(n, &rows);
        let mine = irreducible_rows(&a);
        for x in 0..n {
            assert_eq!(mine[x], oracle.contains(&rows[x]), "{a:?}");
        }
        // Doubling a row leaves the verdicts alone.
        let twice = rng.random_range(0..n);
        let wider = BitMatrix::from_fn(n + 1, n, |i, j| a.get(if i == n { twice } else { i }, j));
        let more = irreducible_rows(&wider);
        assert_eq!(&more[..n], &mine[..]);
        assert_eq!(more[n], mine[twice]);
    }
}

#[test]
fn closure_agrees_with_warshall_on_cyclic_digraphs_beyond_one_word() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    for case in 0..40 {
        let n = rng.random_range(60..200);
        let degree = [0.5, 1.0, 1.3, 2.5][case % 4];
        let g = BitMatrix::from_fn(n, n, |_, _| rng.random_bool(degree / n as f64));
        let p = Poset::of_digraph(&g);
        let mut reach = BitMatrix::from_fn(n, n, |i, j| i == j || g.get(i, j));
        for k in 0..n {
            for i in 0..n {
                if reach.get(i, k) {
                    (0..n)
                        .filter(|&j| reach.get(k, j))
                        .collect::<Vec<_>>()
                        .iter()
                        .for_each(|&j| reach.set(i, j, true));
                }
            }
        }
        let of = &p.classes().of;
        for i in 0..n {
            for j in 0..n {
                assert_eq!(p.up().get(of[i], of[j]), reach.get(i, j));
                assert_eq!(p.down().get(of[j], of[i]), reach.get(i, j));
            }
        }
        // The plain intersection over everything above, without covers and early exit.
        let k = p.len();
        let naive: Vec<bool> = (0..k)
            .map(|x| {
                let mut meet: Vec<bool> = vec![true; k];
                for y in (0..k).filter(|&y| y != x && p.up().get(x, y)) {
                    (0..k).for_each(|z| meet[z] &= p.down().get(y, z));
                }
                (0..k).any(|z| meet[z] != p.down().get(x, z))
            })
            .collect();
        assert_eq!(p.meet_irreducible(), naive);
        // Covers generate the order and none is implied by others.
        let covers = p.covers();
        assert!(covers.iter().all(|&(a, b)| {
            (0..k).all(|z| z == a || z == b || !(p.up().get(a, z) && p.up().get(z, b)))
        }));
        let again = Poset::of_digraph(&digraph(k, &covers));
        assert_eq!(again.up().count(), p.up().count());
    }
}

#[test]
fn cutting_and_max_min_closure_commute() {
    let mut rng = ChaCha8Rng::seed_from_u64(14);
    for _ in 0..300 {
        let n = rng.random_range(2..9);
        let values: Vec<f32> = (0..n * n)
            .map(|_| f32::from(rng.random_range(0u8..6)))
            .collect();
        let a = Influence::from_dense(n, &values).unwrap();
        // Strongest path by its weakest edge.
        let mut r: Vec<f32> = (0..n * n)
            .map(|e| {
                if e / n == e % n {
                    f32::MAX
                } else {
                    a.get(e / n, e % n)
                }
            })
            .collect();
        for k in 0..n {
            for i in 0..n {
                for j in 0..n {
                    r[i * n + j] = r[i * n + j].max(r[i * n + k].min(r[k * n + j]));
                }
            }
        }
        for alpha in 1..6 {
            let p = Poset::of_digraph(&a.digraph(alpha as f32));
            let of = &p.classes().of;
            for i in 0..n {
                for j in 0..n {
                    assert_eq!(p.up().get(of[i], of[j]), r[i * n + j] >= alpha as f32);
                }
            }
        }
    }
}

fn random_influence(seed: u64, n: usize) -> Influence {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // A skewed distribution, so that thresholds matter.
    let values: Vec<f32> = (0..n * n).map(|_| rng.random::<f32>().powi(4)).collect();
    Influence::from_dense(n, &values).unwrap()
}

const MODES: [OrderMode; 5] = [
    OrderMode::Reachability,
    OrderMode::Context,
    OrderMode::Oriented(RankBy::Strength),
    OrderMode::Oriented(RankBy::PageRank),
    OrderMode::Oriented(RankBy::FeedbackArc),
];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn verdicts_move_with_the_neurons(seed in 0u64..10_000, n in 2usize..80, degree in 0.25f64..3.0, mode in 0usize..4) {
        let a = random_influence(seed, n);
        let mut order: Vec<usize> = (0..n).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed ^ 1));
        for verdict in [Verdict::Meet, Verdict::Join, Verdict::Both] {
            let criterion = Criterion { verdict, ..Criterion::new(MODES[mode]) };
            let here = verdicts(&a, Cut::Degree(degree), criterion).unwrap();
            let there = verdicts(&a.permuted(&order), Cut::Degree(degree), criterion).unwrap();
            for (place, &x) in order.iter().enumerate() {
                prop_assert_eq!(there.kept[place], here.kept[x]);
            }
            prop_assert_eq!(here.report.order, there.report.order);
        }
    }

    #[test]
    fn implied_edges_do_not_change_the_reachability_verdicts(seed in 0u64..10_000, n in 2usize..60) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let g = random_dag(&mut rng, n);
        let p = Poset::of_digraph(&g);
        let of = p.classes().of.clone();
        // Some or all of the implied edges added.
        let more = BitMatrix::from_fn(n, n, |i, j| g.get(i, j) || (i != j && p.up().get(of[i], of[j]) && rng.random_bool(0.6)));
        let q = Poset::of_digraph(&more);
        prop_assert_eq!(p.per_neuron(&p.meet_irreducible()), q.per_neuron(&q.meet_irreducible()));
    }

    #[test]
    fn a_degree_cut_lets_in_that_many_edges(seed in 0u64..10_000, n in 3usize..60, degree in 0.1f64..2.0) {
        let a = random_influence(seed, n);
        let report = verdicts(&a, Cut::Degree(degree), Criterion::new(OrderMode::Context)).unwrap().report;
        let wanted = ((degree * n as f64).round() as usize).clamp(1, n * (n - 1));
        prop_assert_eq!(report.edges, wanted);
    }
}

#[test]
fn ties_at_the_threshold_all_come_in() {
    let a = Influence::from_dense(4, &[1.0; 16]).unwrap();
    let v = verdicts(&a, Cut::Degree(0.5), Criterion::new(OrderMode::Context)).unwrap();
    assert_eq!(v.report.edges, 12);
    assert_eq!(
        thresholds(&a, &[Cut::Quantile(0.5), Cut::Value(0.25)]).unwrap(),
        [1.0, 0.25]
    );
}

#[test]
fn isolated_neurons_count_only_when_asked() {
    // 0 → 1, and 2 alone.
    let mut w = vec![0f32; 9];
    w[1] = 1.0;
    let a = Influence::from_dense(3, &w).unwrap();
    let kept = |connected| {
        let criterion = Criterion {
            mode: OrderMode::Reachability,
            verdict: Verdict::Meet,
            connected,
        };
        verdicts(&a, Cut::Value(0.5), criterion).unwrap().kept
    };
    assert_eq!(kept(Connected::No), [true, true, true]);
    assert_eq!(kept(Connected::InOrOut), [true, true, false]);
    assert_eq!(kept(Connected::InAndOut), [false, false, false]);
}

#[test]
fn a_dense_recurrent_matrix_is_a_degenerate_reachability_order_and_not_a_degenerate_context() {
    let a = random_influence(5, 48);
    let half = Cut::Quantile(0.5);
    let v = verdicts(&a, half, Criterion::new(OrderMode::Reachability)).unwrap();
    assert_eq!(
        (v.report.order.classes, v.report.order.irreducible_neurons),
        (1, 0)
    );
    match v.discriminating() {
        Err(Error::DegenerateOrder {
            neurons: 48,
            classes: 1,
            largest: 48,
            irreducible: 0,
        }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        persistence(&a, &[half], Criterion::new(OrderMode::Reachability)),
        Err(Error::DegenerateOrder { .. })
    ));
    assert!(
        persistence(
            &a,
            &prune_lattice::order::default_cuts(),
            Criterion::new(OrderMode::Context)
        )
        .is_ok()
    );
    // All influences equal: no order of any kind.
    let flat = Influence::from_dense(8, &[1.0; 64]).unwrap();
    for mode in MODES {
        assert!(
            matches!(
                persistence(&flat, &[Cut::Degree(1.0)], Criterion::new(mode)),
                Err(Error::DegenerateOrder { .. })
            ) || matches!(mode, OrderMode::Oriented(_) | OrderMode::Context)
        );
    }
}

#[test]
fn bad_influences_and_cuts_are_typed_errors() {
    assert!(matches!(
        Influence::from_dense(3, &[0.0; 8]),
        Err(Error::Shape { .. })
    ));
    let nan = [0.0, f32::NAN, 0.0, 0.0];
    assert!(matches!(
        Influence::from_dense(2, &nan),
        Err(Error::NonFinite { index: 1, .. })
    ));
    assert!(matches!(
        Influence::from_gates(&[0.0; 12], 4, 2, Aggregate::L2),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(
        Influence::from_gates(&[0.0; 16], 4, 2, Aggregate::Gate(4)),
        Err(Error::Setting { .. })
    ));
    let a = random_influence(1, 4);
    for cut in [
        Cut::Degree(0.0),
        Cut::Degree(f64::NAN),
        Cut::Quantile(1.0),
        Cut::Value(f32::INFINITY),
        Cut::Value(-1.0),
    ] {
        assert!(
            matches!(
                thresholds(&a, &[cut]),
                Err(Error::Setting { setting: "cut", .. })
            ),
            "{cut:?}"
        );
    }
}

#[test]
fn gates_join_by_the_norm_asked_for_and_the_edge_runs_from_column_to_row() {
    // Two gates, two neurons; only W[1, 0] is off-diagonal and nonzero: the edge 0 → 1.
    let w = [9.0, 0.0, 3.0, 9.0, 9.0, 0.0, -4.0, 9.0];
    for (how, value) in [
        (Aggregate::L2, 5.0),
        (Aggregate::Max, 4.0),
        (Aggregate::Sum, 7.0),
        (Aggregate::Gate(0), 3.0),
    ] {
        let a = Influence::from_gates(&w, 2, 2, how).unwrap();
        assert_eq!(a.get(0, 1), value);
        assert_eq!((a.get(1, 0), a.get(0, 0), a.get(1, 1)), (0.0, 0.0, 0.0));
    }
}

#[test]
fn a_stack_places_blocks_by_layer_and_scales_each_by_its_own_size() {
    let (hh0, hh1) = (vec![0.5f32; 4], vec![100f32; 9]);
    let (up, down) = (vec![2f32; 6], vec![7f32; 6]);
    let layers = [
        StackLayer {
            recurrent: &hh0,
            from_below: None,
            from_above: Some(&down),
            hidden: 2,
        },
        StackLayer {
            recurrent: &hh1,
            from_below: Some(&up),
            from_above: None,
            hidden: 3,
        },
    ];
    let all = Influence::of_stack(&layers, 1, Aggregate::L2, StackEdges::All).unwrap();
    for j in 0..5 {
        for i in 0..5 {
            assert!((all.get(j, i) - if i == j { 0.0 } else { 1.0 }).abs() < 1e-6);
        }
    }
    let graded = Influence::of_stack(&layers, 1, Aggregate::L2, StackEdges::LayerGraded).unwrap();
    let p = Poset::of_digraph(&graded.digraph(0.5));
    assert_eq!(p.len(), 5);
    assert_eq!(graded.digraph(0.5).count(), 6);
}

#[test]
fn persistence_is_the_share_of_discriminating_cuts_at_which_a_neuron_counts() {
    let cuts = [
        Cut::Degree(0.5),
        Cut::Degree(1.0),
        Cut::Degree(2.0),
        Cut::Quantile(0.5),
        Cut::Value(0.9),
    ];
    for n in [20, 90] {
        let a = random_influence(n as u64, n);
        for mode in MODES {
            let p = persistence(&a, &cuts, Criterion::new(mode)).unwrap();
            let single: Vec<_> = cuts
                .iter()
                .map(|&c| verdicts(&a, c, Criterion::new(mode)).unwrap())
                .collect();
            let counted: Vec<_> = single
                .iter()
                .filter(|v| !v.report.order.degenerate)
                .collect();
            assert_eq!(p.discriminating_cuts(), counted.len());
            for x in 0..n {
                let share =
                    counted.iter().filter(|v| v.kept[x]).count() as f64 / counted.len() as f64;
                assert!((p.share[x] - share).abs() < 1e-12);
            }
            assert!(p.cuts.iter().zip(&single).all(|(c, v)| *c == v.report));
        }
    }
}

#[test]
fn an_influence_is_read_from_a_safetensors_file_by_name() {
    use prune_lattice::{Cell, GateLayout, io};
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("weights.safetensors");
    let w = candle_core::Tensor::from_slice(&[9f32, 2., 3., 9.], (2, 2), &candle_core::Device::Cpu)
        .unwrap();
    io::save(&[("cell.weight_hh".to_owned(), w)].into(), &file).unwrap();
    let load = |name| Influence::load(&file, name, Cell::Tanh, GateLayout::PyTorch, Aggregate::L2);
    let a = load("cell.weight_hh").unwrap();
    assert_eq!((a.get(0, 1), a.get(1, 0), a.get(0, 0)), (3.0, 2.0, 0.0));
    assert!(matches!(load("weight_hh"), Err(Error::MissingTensor { name }) if name == "weight_hh"));
    let absent = Influence::load(
        &dir.path().join("no"),
        "w",
        Cell::Tanh,
        GateLayout::PyTorch,
        Aggregate::L2,
    );
    assert!(matches!(absent, Err(Error::Tensors(_))));
    let lstm = Influence::load(
        &file,
        "cell.weight_hh",
        Cell::Lstm,
        GateLayout::PyTorch,
        Aggregate::L2,
    );
    assert!(matches!(lstm, Err(Error::Shape { .. })));
}
