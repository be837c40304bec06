//! ONNX files as a user meets them: real exports, small files made by hand, and files that must be refused.

mod damaged;
mod file;
mod refused;
mod shared;
mod silero;

use file::*;
use prune_lattice::{Cell, rnn::ReadOut};

#[test]
fn a_gru_comes_out_in_pytorch_order_and_goes_back_byte_for_byte() {
    let bytes = gru(&[
        attribute_int("linear_before_reset", 1),
        attribute_int("hidden_size", 2),
    ]);
    let file = read(bytes.clone()).unwrap();
    let node = file.node(None).unwrap();
    assert_eq!((node.cell, node.hidden, node.width), (Cell::Gru, H, IN));
    // ONNX z, r, h becomes r, z, n.
    let w = ramp(18, 1.0);
    assert_eq!(
        flat(&file, "weight_ih_l0"),
        [&w[6..12], &w[..6], &w[12..]].concat()
    );
    let b = ramp(12, 3.0);
    assert_eq!(
        flat(&file, "bias_hh_l0"),
        [&b[8..10], &b[6..8], &b[10..]].concat()
    );
    let mut rnn = network(&file);
    assert_eq!(file.with_layer(node, &rnn, 0).unwrap(), bytes);
    // A changed weight and a changed bias are found again in the written file.
    let params: Vec<String> = rnn.params().iter().map(|p| p.name.clone()).collect();
    for p in rnn.params_mut().iter_mut() {
        if p.name.contains("weight_hh") {
            p.data[5] = -7.5;
        }
        if p.name == "rnn.bias_l0" {
            p.data[1] += 0.25;
        }
    }
    assert!(params.contains(&"rnn.bias_hn_l0".to_owned()));
    let written = file.with_layer(node, &rnn, 0).unwrap();
    assert_eq!(written.len(), bytes.len());
    // Two floats of four bytes.
    let changed = written.iter().zip(&bytes).filter(|(a, b)| a != b).count();
    assert!((1..=8).contains(&changed), "{changed}");
    let again = network(&read(written).unwrap());
    for (a, b) in again.params().iter().zip(rnn.params().iter()) {
        let far = a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs());
        assert!(far.fold(0.0, f32::max) < 1e-6, "{}", a.name);
    }
}

#[test]
fn weights_behind_slices_concatenations_and_transpositions_are_found_and_written_back() {
    // A framework's own [6, 3] in the order r, z, n, cut and put together into ONNX's order, with an axis of directions.
    let part = |name: &str, from: i64, to: i64, out: &str| {
        node(
            "Slice",
            &[name],
            out,
            &[
                attribute_ints("starts", &[from]),
                attribute_ints("ends", &[to]),
                attribute_ints("axes", &[0]),
            ],
        )
    };
    let nodes = [
        node(
            "Transpose",
            &["wt"],
            "w0",
            &[attribute_ints("perm", &[1, 0])],
        ),
        part("w0", 0, 2, "wr"),
        part("w0", 2, 4, "wz"),
        part("w0", -2, i64::MAX, "wn"),
        node(
            "Concat",
            &["wz", "wr", "wn"],
            "w1",
            &[attribute_int("axis", 0)],
        ),
        node("Unsqueeze", &["w1"], "w", &[attribute_ints("axes", &[0])]),
        node("Identity", &["r0"], "r", &[]),
        node(
            "GRU",
            &["x", "w", "r"],
            "y",
            &[attribute_int("linear_before_reset", 1)],
        ),
    ];
    let bytes = model(
        &nodes,
        &[
            tensor("wt", &[3, 6], &ramp(18, 1.0)),
            tensor("r0", &[1, 6, 2], &ramp(12, 2.0)),
        ],
    );
    let file = read(bytes.clone()).unwrap();
    let own: Vec<f32> = (0..18).map(|k| ramp(18, 1.0)[k % 3 * 6 + k / 3]).collect();
    assert_eq!(flat(&file, "weight_ih_l0"), own);
    assert_eq!(flat(&file, "bias_ih_l0"), [0.0; 6]);
    let mut rnn = network(&file);
    let node = file.node(None).unwrap();
    assert_eq!(file.with_layer(node, &rnn, 0).unwrap(), bytes);
    rnn.params_mut().iter_mut().next().unwrap().data[4] = 9.0;
    let written = file.with_layer(node, &rnn, 0).unwrap();
    assert_eq!(network(&read(written).unwrap()), rnn);
    // A bias that the file does not have cannot be written.
    assert!(!node.has_bias());
    for p in rnn
        .params_mut()
        .iter_mut()
        .filter(|p| p.name == "rnn.bias_l0")
    {
        p.data[0] = 1.0;
    }
    let error = file.with_layer(node, &rnn, 0).unwrap_err().to_string();
    assert!(error.contains("refit without a constant"), "{error}");
}

#[test]
fn the_read_out_of_a_node_inside_a_branch_is_found_there_and_not_in_the_other_branch() {
    let lstm = |name: &str| named(node("LSTM", &["x", "w", "r"], "y", &[]), name);
    let branch = |attribute: &str, name: &str, from: f32| {
        let read_out = [
            tensor("head.weight", &[1, 2, 1], &ramp(2, from)),
            tensor("head.bias", &[1], &[from]),
            tensor("r", &[1, 8, 2], &ramp(16, from)),
        ];
        attribute_graph(attribute, &[lstm(name)], &read_out)
    };
    let both = node(
        "If",
        &["c"],
        "out",
        &[
            branch("then_branch", "first", 0.5),
            branch("else_branch", "second", 0.7),
        ],
    );
    // W stands in the graph around both branches.
    let file = read(model(&[both], &[tensor("w", &[1, 8, 3], &ramp(24, 0.0))])).unwrap();
    for (name, from) in [("first", 0.5), ("second", 0.7)] {
        let node = file.node(Some(name)).unwrap();
        let rnn = file.network(node, Some("head"), ReadOut::Relu).unwrap();
        assert_eq!(rnn.params().get("out.weight").unwrap().data, ramp(2, from));
        assert_eq!(rnn.config().read_out, ReadOut::Relu);
        assert_eq!(file.constant(node, "w").unwrap().1, ramp(24, 0.0));
        let error = file.network(node, Some("tail"), ReadOut::Linear);
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains(FILE) && text.contains("`tail.weight`"),
            "{text}"
        );
    }
}
