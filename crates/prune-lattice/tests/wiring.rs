//! Networks with fixed connections: layers with top-down feedback, and random graphs.

use prune_lattice::{
    Cell, Error, NoProgress,
    data::{Dataset, Examples, Inputs, Sequences, Targets},
    experiment::{
        ExperimentConfig, Repair, Stage, Structure, StructureConfig, correlations, run,
        run_structures, train_dense,
    },
    prune::{Method, PruneConfig, PruneContext, prune_in},
    rnn::{Input, InputKind, Rnn, RnnConfig, State, Tape, TrainConfig},
    tasks::{Sizes, Task},
    wiring::{Wiring, WiringKind},
};

const SMALL: Sizes = Sizes {
    train: 200,
    valid: 50,
    test: 60,
};

#[test]
fn an_input_reaches_the_read_out_after_the_extra_steps_and_not_before() {
    for &cell in Cell::ALL {
        let wiring = Wiring::feedback(&[4, 3, 3]).unwrap();
        let shape = RnnConfig::new(cell, InputKind::Dense { dim: 2 }, [10], 2);
        let mut rnn = Rnn::new(shape, 3).unwrap();
        // Positive weights: no neuron is cut at zero.
        let weights = rnn.params_mut().iter_mut().flat_map(|p| &mut p.data);
        weights.for_each(|w| *w = w.abs());
        wiring.masks(&rnn).unwrap().apply(rnn.params_mut()).unwrap();
        let steps = 6;
        let run = |first: f32| {
            let mut x = vec![0.3; steps * 2];
            x[0] = first;
            x[1] = 0.9;
            let (mut tape, mut logits) = (Tape::new(), Vec::new());
            let mut state = State::zeros(&rnn, 1);
            tape.forward(&rnn, Input::Vectors(&x), steps, &mut state)
                .unwrap();
            tape.read_out(&rnn, None, &mut logits);
            logits
        };
        let (a, b) = (run(0.9), run(0.1));
        let same: Vec<bool> = a.chunks(2).zip(b.chunks(2)).map(|(a, b)| a == b).collect();
        let late = wiring.extra_steps();
        assert!(
            same[..late].iter().all(|&s| s) && !same[late],
            "{cell} {same:?}"
        );
    }
}

#[test]
fn masks_of_every_method_lie_within_the_wiring_and_budgets_count_only_what_it_has() {
    let wiring = Wiring::feedback(&[6, 6]).unwrap();
    let shape = RnnConfig::new(Cell::Gru, InputKind::Dense { dim: 2 }, [12], 2);
    let rnn = Rnn::new(shape, 3).unwrap();
    let wired = wiring.masks(&rnn).unwrap();
    let context = PruneContext::default().within(&wired);
    for method in [
        Method::Magnitude,
        Method::Random,
        Method::Threshold,
        Method::Strength,
        Method::LatticeContext,
    ] {
        let (masks, report) = prune_in(&rnn, &context, &PruneConfig::new(method, 0.5)).unwrap();
        assert!((report.sparsity.recurrent - 0.5).abs() < 0.01, "{method}");
        for (name, allowed) in wired.iter() {
            let mask = masks.get(name).unwrap();
            for i in 0..mask.keep().rows() {
                assert!(
                    mask.keep().row_ones(i).all(|j| allowed.keep().get(i, j)),
                    "{method}"
                );
            }
        }
    }
    let other = Rnn::new(
        RnnConfig::new(Cell::Gru, InputKind::Dense { dim: 2 }, [6, 6], 2),
        3,
    );
    assert!(matches!(
        wiring.masks(&other.unwrap()),
        Err(Error::Shape { .. })
    ));
}

#[test]
fn extra_steps_delay_what_is_asked_for_and_texts_are_refused() {
    let data = Task::Mod(2).generate(SMALL, 0).unwrap();
    let wider = data.clone().with_extra_steps(2).unwrap();
    assert_eq!(
        data.input.vocab().unwrap() + 1,
        wider.input.vocab().unwrap()
    );
    assert_eq!(data.clone().with_extra_steps(0).unwrap(), data);
    let text = Task::CharGrammar.generate(SMALL, 0).unwrap();
    assert!(matches!(
        text.with_extra_steps(1),
        Err(Error::Setting { .. })
    ));
    // A network that remembers one step: the read-out after one extra step sees the state before it.
    let vectors = Inputs::Vectors {
        dim: 1,
        values: vec![1.0, 0.0, 0.0, 1.0],
    };
    let examples = || {
        let targets = Targets::Classes(vec![0, 1]);
        Examples::Sequences(Sequences::new(vectors.clone(), &[2, 2], targets).unwrap())
    };
    let data = Dataset {
        train: examples(),
        valid: examples(),
        test: examples(),
        input: InputKind::Dense { dim: 1 },
        outputs: 2,
    };
    let mut rnn = Rnn::new(RnnConfig::new(Cell::Relu, data.input, [2], 2), 0).unwrap();
    for p in rnn.params_mut().iter_mut() {
        let data: &[f32] = match p.name.as_str() {
            // Neuron 0 is the input, neuron 1 what neuron 0 was.
            "rnn.weight_ih_l0" => &[1.0, 0.0],
            "rnn.weight_hh_l0" => &[0.0, 0.0, 1.0, 0.0],
            // Class 1 where the input one step ago was above a half.
            "out.weight" => &[0.0, 0.0, 0.0, 1.0],
            "out.bias" => &[0.5, 0.0],
            _ => &[0.0, 0.0],
        };
        p.data.copy_from_slice(data);
    }
    let delayed = data.with_extra_steps(1).unwrap();
    let found = prune_lattice::rnn::evaluate(&rnn, &delayed.test).unwrap();
    assert_eq!(found.accuracy, Some(1.0));
}

#[test]
fn a_network_with_feedback_is_trained_and_pruned_within_its_wiring_and_reports_its_connectivity() {
    let config = ExperimentConfig::default().with(|c| {
        c.tasks = vec![Task::Mod(2)];
        c.methods = Method::ALL.to_vec();
        c.sparsities = vec![0.5];
        c.seeds = vec![0];
        c.sizes = Some(SMALL);
        c.wiring = "feedback:6+6".parse().unwrap();
        c.training = Some(TrainConfig::default().with(|c| c.epochs = 2));
    });
    let trained = train_dense(&config, &config.tasks[0], Cell::Lstm, 0, &NoProgress).unwrap();
    assert_eq!(trained.rnn.config().hidden, [12]);
    for (name, mask) in trained.wired.iter() {
        let p = trained.rnn.params().get(name).unwrap();
        let cols = p.shape[1];
        let outside = p
            .data
            .iter()
            .enumerate()
            .filter(|(e, _)| !mask.keep().get(e / cols, e % cols));
        assert!(outside.into_iter().all(|(_, w)| *w == 0.0), "{name}");
    }
    let rows = run(&config, &NoProgress).unwrap();
    assert!(
        rows.iter()
            .all(|r| r.task == "mod2, feedback:6+6" && r.hidden == [12])
    );
    assert!(
        !rows
            .iter()
            .any(|r| r.method.block().is_some() || r.method == Method::Ws)
    );
    let one_shot = |method: Method, repair: Repair| {
        let same = |r: &&prune_lattice::experiment::Row| {
            (r.method, r.repair, r.stage) == (method, repair, Stage::OneShot)
        };
        rows.iter().find(same).unwrap().connectivity.unwrap()
    };
    let dense = one_shot(Method::Dense, Repair::None);
    assert!(dense.functional.unwrap() > 0.999_999);
    assert_eq!((dense.reach, dense.reach_2), (Some(1.0), Some(1.0)));
    let span = one_shot(Method::Span, Repair::None);
    assert!(span.functional.unwrap() < 0.999_999 && span.functional_kept.is_some());
    let merged = one_shot(Method::Span, Repair::Merge);
    assert!(merged.reach.is_none() && merged.functional_kept.is_some());
    // Budgets and parameters count what exists: 3 of 4 blocks of 6 x 6 in each gate, half of W_ih and of the read-out.
    for row in rows.iter().filter(|r| r.method == Method::Dense) {
        assert_eq!(row.params, Some(row.params_dense));
    }
    // A merged network has no connection that its wiring lacks, before and after fine-tuning.
    for row in rows.iter().filter(|r| r.repair == Repair::Merge) {
        let neurons = row.neurons.as_ref().unwrap();
        assert_eq!((neurons.len(), neurons.iter().sum::<usize>()), (2, 8));
        let sparsity = row.reached.unwrap();
        assert!(sparsity.total > 0.0 && row.params.unwrap() < row.params_dense);
    }
    let zero = one_shot(Method::ZeroWhh, Repair::None);
    assert_eq!(zero.reach, Some(0.0));
    assert_eq!(config.wiring, WiringKind::Feedback(vec![6, 6]));
}

#[test]
fn random_structures_are_trained_and_their_properties_correlated_with_accuracy() {
    let config = StructureConfig::new(Task::Reber, Cell::Gru).with(|c| {
        c.graphs = 3;
        c.neurons = (10, 24);
        c.sizes = Some(SMALL);
        c.training = Some(TrainConfig::default().with(|c| c.epochs = 2));
    });
    let rows = run_structures(&config, &NoProgress).unwrap();
    assert_eq!(rows, run_structures(&config, &NoProgress).unwrap());
    assert_eq!(rows.len(), 4 * 3);
    for row in &rows {
        assert_eq!(row.properties.is_none(), row.structure == Structure::Stack);
        assert!(row.accuracy.is_some() && row.connections > 0);
        // Erdős–Rényi graphs have as many edges as Barabási–Albert graphs of the same number.
        if let (Structure::ErdosRenyi, Some(own)) = (row.structure, &row.properties) {
            let twin = rows
                .iter()
                .find(|r| (r.structure, r.graph) == (Structure::BarabasiAlbert, row.graph));
            assert_eq!(own.edges, twin.unwrap().properties.as_ref().unwrap().edges);
        }
    }
    let found = correlations(&rows);
    assert!(found.iter().all(|p| p.networks == 9));
    assert!(
        found
            .iter()
            .filter_map(|p| p.r)
            .all(|r| (-1.0..=1.0).contains(&r))
    );
    let bad = config.with(|c| c.neurons = (2, 1));
    assert!(matches!(
        run_structures(&bad, &NoProgress),
        Err(Error::Setting { .. })
    ));
}
