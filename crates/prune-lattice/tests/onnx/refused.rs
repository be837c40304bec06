//! What is refused: operators, cells, sizes and values, each by name.

use crate::file::*;
use prune_lattice::rnn::ReadOut;

#[test]
fn a_node_that_is_not_supported_leaves_the_others_of_its_file_usable() {
    let plain = named(node("LSTM", &["x", "w", "r"], "y", &[]), "plain");
    let clipped = node("LSTM", &["x", "w", "r"], "z", &[attribute_int("clip", 1)]);
    let weights = [
        tensor("w", &[1, 8, 3], &ramp(24, 0.0)),
        tensor("r", &[1, 8, 2], &ramp(16, 0.0)),
    ];
    let file = read(model(&[plain, named(clipped, "clipped")], &weights)).unwrap();
    assert_eq!(file.nodes().len(), 1);
    assert_eq!(file.node(Some("plain")).unwrap().hidden, 2);
    let [other] = file.unsupported() else {
        panic!("{:?}", file.unsupported())
    };
    assert_eq!((&*other.name, &*other.operator), ("clipped", "LSTM"));
    for (asked, words) in [
        (
            Some("clipped"),
            "LSTM node `clipped`: clip is not supported",
        ),
        (
            None,
            "plain, clipped (not supported: clip is not supported)",
        ),
        (Some("third"), "plain, clipped (not supported"),
    ] {
        let text = file.node(asked).unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn a_weight_that_is_not_finite_names_its_file_and_node() {
    let mut w = ramp(24, 0.0);
    w[7] = f32::NAN;
    let lstm = named(node("LSTM", &["x", "w", "r"], "y", &[]), "cell");
    let weights = [
        tensor("w", &[1, 8, 3], &w),
        tensor("r", &[1, 8, 2], &ramp(16, 0.0)),
    ];
    let file = read(model(&[lstm], &weights)).unwrap();
    let node = file.node(None).unwrap();
    let text = file
        .network(node, None, ReadOut::Linear)
        .unwrap_err()
        .to_string();
    for words in [FILE, "`cell`", "weight_ih_l0", "NaN"] {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn operators_that_ask_for_more_than_their_file_holds_are_refused() {
    let refused = |operators: &[Vec<u8>], initializers: &[Vec<u8>], words: &str| {
        let lstm = node("LSTM", &["x", "w", "w"], "y", &[]);
        let nodes = [operators, &[lstm]].concat();
        let text = read(model(&nodes, initializers)).unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    };
    // Each doubles what the one before made: 2^40 elements of a file of 3 KB.
    let names: Vec<String> = (0..=40).map(|k| format!("v{k}")).collect();
    let double = |k: usize| {
        let (from, to) = (names[k].as_str(), names[k + 1].as_str());
        let to = if k == 39 { "w" } else { to };
        node("Concat", &[from, from], to, &[attribute_int("axis", 0)])
    };
    let chain: Vec<Vec<u8>> = (0..40).map(double).collect();
    let start = [tensor("v0", &[4], &ramp(4, 0.0))];
    refused(&chain, &start, "for each byte of the file");
    let many = vec![0i64; 40];
    let unsqueeze = node("Unsqueeze", &["v0"], "w", &[attribute_ints("axes", &many)]);
    refused(&[unsqueeze], &start, "41 axes are more than 32");
    for shape in [&[-1, -1][..], &[3, -5], &[i64::MAX, i64::MAX, -1]] {
        let reshape = node("Reshape", &["v0"], "w", &[attribute_ints("shape", shape)]);
        refused(&[reshape], &start, "of 4 elements");
    }
}

#[test]
fn what_the_cells_do_not_compute_is_refused_by_name() {
    let refused = |bytes: Vec<u8>, words: &str| match read(bytes) {
        Err(e) => {
            let text = e.to_string();
            assert!(text.contains(FILE) && text.contains(words), "{text}");
        }
        Ok(_) => panic!("{words}: accepted"),
    };
    let before = || attribute_int("linear_before_reset", 1);
    refused(gru(&[]), "linear_before_reset = 0");
    refused(
        gru(&[attribute_int("linear_before_reset", 0)]),
        "linear_before_reset = 0",
    );
    refused(
        gru(&[before(), attribute_text("direction", "bidirectional")]),
        "direction `bidirectional`",
    );
    refused(gru(&[before(), attribute_int("clip", 1)]), "clip");
    refused(
        gru(&[before(), attribute_int("hidden_size", 3)]),
        "hidden_size",
    );
    let lstm = |inputs: &[&str], attributes: &[Vec<u8>]| {
        model(
            &[node("LSTM", inputs, "y", attributes)],
            &[
                tensor("w", &[1, 8, 3], &ramp(24, 0.0)),
                tensor("r", &[1, 8, 2], &ramp(16, 0.0)),
            ],
        )
    };
    refused(
        lstm(&["x", "w", "r", "", "", "", "", "p"], &[]),
        "peepholes",
    );
    refused(
        lstm(&["x", "w", "r"], &[attribute_int("input_forget", 1)]),
        "input_forget",
    );
    refused(lstm(&["x", "w", "w"], &[]), "do not fit");
    refused(lstm(&["x", "absent", "r"], &[]), "`absent` is no constant");
    refused(model(&[node("Gemm", &["x"], "y", &[])], &[]), "unrolled");
    refused(b"no protobuf".to_vec(), "not an ONNX model");
    refused(Vec::new(), "without a graph");
    let external = [tensor("w", &[1, 8, 3], &[]), int(14, 1)].concat();
    let one = node("LSTM", &["x", "w", "r"], "y", &[]);
    refused(
        model(std::slice::from_ref(&one), &[external]),
        "external data",
    );
    refused(
        model(
            std::slice::from_ref(&one),
            &[tensor("w", &[1, 8, 3], &ramp(5, 0.0))],
        ),
        "has 5 elements",
    );
    refused(
        model(&[one], &[tensor("w", &[1 << 40, 1 << 40], &[])]),
        "too large",
    );
    let computed = node("Mul", &["a", "b"], "w", &[]);
    let lstm = node("LSTM", &["x", "w", "w"], "y", &[]);
    refused(model(&[computed, lstm], &[]), "not among the operators");
}

#[test]
fn constants_with_an_empty_axis_leave_only_their_node_unusable() {
    let huge = 1i64 << 40;
    let plain = named(node("LSTM", &["x", "w0", "r0"], "y", &[]), "plain");
    let other = named(node("LSTM", &["x", "w", "r0"], "z", &[]), "other");
    let weights = [
        tensor("w0", &[1, 8, 3], &ramp(24, 0.0)),
        tensor("r0", &[1, 8, 2], &ramp(16, 0.0)),
    ];
    let refused = |operator: Vec<u8>, dims: &[i64], words: &str| {
        let initializers = [&weights[..], &[tensor("e", dims, &[])]].concat();
        let nodes = [operator, plain.clone(), other.clone()];
        let file = read(model(&nodes, &initializers)).unwrap();
        assert_eq!(file.node(Some("plain")).unwrap().hidden, 2);
        let [found] = file.unsupported() else {
            panic!("{:?}", file.unsupported())
        };
        assert_eq!(found.name, "other");
        assert!(found.reason.contains(words), "{}", found.reason);
    };
    let perm = attribute_ints("perm", &[1, 0]);
    let cut = |axis: i64, to: i64| {
        [
            attribute_ints("starts", &[0]),
            attribute_ints("ends", &[to]),
            attribute_ints("axes", &[axis]),
        ]
    };
    let axis = attribute_int("axis", 1);
    let shape = attribute_ints("shape", &[huge, -1]);
    let empty = "empty axis";
    refused(node("Transpose", &["e"], "w", &[perm]), &[huge, 0], empty);
    refused(node("Slice", &["e"], "w", &cut(1, 5)), &[huge, 0], empty);
    refused(node("Concat", &["e", "e"], "w", &[axis]), &[huge, 0], empty);
    refused(node("Squeeze", &["e"], "w", &[]), &[0, huge, huge], empty);
    refused(node("Reshape", &["e"], "w", &[shape]), &[0], empty);
    refused(node("Slice", &["w0"], "w", &cut(1, 0)), &[0], empty);
    // Exporters give an operator an empty list where it has no use for an input.
    let resize = node("Resize", &["w0", "e", "w0"], "w", &[]);
    refused(resize, &[0], "not among the operators");
}

#[test]
fn an_empty_list_is_the_shape_of_a_scalar() {
    let nodes = [
        node("Reshape", &["v", "shape"], "s", &[]),
        node(
            "Unsqueeze",
            &["s"],
            "w",
            &[attribute_ints("axes", &[0, 1, 2])],
        ),
        node("RNN", &["x", "w", "w"], "y", &[]),
    ];
    let weights = [tensor("v", &[1], &[0.5]), ints("shape", &[])];
    let file = read(model(&nodes, &weights)).unwrap();
    assert_eq!(file.node(None).unwrap().hidden, 1);
    assert_eq!(flat(&file, "weight_hh_l0"), [0.5]);
}
