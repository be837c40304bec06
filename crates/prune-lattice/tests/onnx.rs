//! ONNX files as a user meets them: real exports, small files made by hand, and files that must be refused.

use proptest::prelude::*;
use prune_lattice::{
    Cell, Error,
    onnx::OnnxFile,
    rnn::{CheckpointNames, ReadOut, Rnn},
};
use std::path::Path;

const FILE: &str = "model.onnx";

fn varint(mut v: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while v >= 128 {
        out.push(v as u8 | 128);
        v >>= 7;
    }
    out.push(v as u8);
    out
}

/// A field of bytes: text, message, raw data.
fn bytes(tag: u64, content: &[u8]) -> Vec<u8> {
    [
        varint(tag << 3 | 2),
        varint(content.len() as u64),
        content.to_vec(),
    ]
    .concat()
}

fn int(tag: u64, v: i64) -> Vec<u8> {
    [varint(tag << 3), varint(v as u64)].concat()
}

fn tensor(name: &str, dims: &[i64], values: &[f32]) -> Vec<u8> {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let dims: Vec<u8> = dims.iter().flat_map(|&d| int(1, d)).collect();
    [dims, int(2, 1), bytes(8, name.as_bytes()), bytes(9, &raw)].concat()
}

fn attribute_int(name: &str, v: i64) -> Vec<u8> {
    bytes(5, &[bytes(1, name.as_bytes()), int(3, v)].concat())
}

fn attribute_ints(name: &str, v: &[i64]) -> Vec<u8> {
    let ints: Vec<u8> = v.iter().flat_map(|&v| int(8, v)).collect();
    bytes(5, &[bytes(1, name.as_bytes()), ints].concat())
}

fn attribute_text(name: &str, v: &str) -> Vec<u8> {
    bytes(
        5,
        &[bytes(1, name.as_bytes()), bytes(4, v.as_bytes())].concat(),
    )
}

fn node(op: &str, inputs: &[&str], output: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    let inputs: Vec<u8> = inputs.iter().flat_map(|i| bytes(1, i.as_bytes())).collect();
    let parts = [inputs, bytes(2, output.as_bytes()), bytes(4, op.as_bytes())].concat();
    [parts, attributes.concat()].concat()
}

fn model(nodes: &[Vec<u8>], initializers: &[Vec<u8>]) -> Vec<u8> {
    let nodes: Vec<u8> = nodes.iter().flat_map(|n| bytes(1, n)).collect();
    let tensors: Vec<u8> = initializers.iter().flat_map(|t| bytes(5, t)).collect();
    // An unknown field before the graph.
    [
        bytes(2, b"a producer"),
        bytes(7, &[nodes, tensors].concat()),
    ]
    .concat()
}

fn ramp(n: usize, from: f32) -> Vec<f32> {
    (0..n).map(|k| from + k as f32 * 0.01).collect()
}

const H: usize = 2;
const IN: usize = 3;

/// A GRU with its weights as initializers in ONNX's gate order z, r, h.
fn gru(attributes: &[Vec<u8>]) -> Vec<u8> {
    model(
        &[node("GRU", &["x", "w", "r", "b"], "y", attributes)],
        &[
            tensor("w", &[1, 6, 3], &ramp(18, 1.0)),
            tensor("r", &[1, 6, 2], &ramp(12, 2.0)),
            tensor("b", &[1, 12], &ramp(12, 3.0)),
        ],
    )
}

fn read(bytes: Vec<u8>) -> Result<OnnxFile, Error> {
    OnnxFile::from_bytes(bytes, Path::new(FILE))
}

fn flat(file: &OnnxFile, name: &str) -> Vec<f32> {
    let tensors = file.node(None).unwrap().tensors("rnn").unwrap();
    tensors[&format!("rnn.{name}")]
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// A network of the file's node with a read-out of one output.
fn network(file: &OnnxFile) -> Rnn {
    use candle_core::{DType, Device, Tensor};
    let node = file.node(None).unwrap();
    let mut tensors = node.tensors("rnn").unwrap();
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
    tensors.insert("out.weight".into(), zeros(&[1, node.hidden]));
    tensors.insert("out.bias".into(), zeros(&[1]));
    let names = CheckpointNames::default().with(|c| {
        c.dense_input = true;
        c.cell = Some(node.cell);
    });
    Rnn::from_tensors(&tensors, &names).unwrap()
}

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

/// A graph as an attribute of a node.
fn attribute_graph(name: &str, nodes: &[Vec<u8>], initializers: &[Vec<u8>]) -> Vec<u8> {
    let nodes: Vec<u8> = nodes.iter().flat_map(|n| bytes(1, n)).collect();
    let tensors: Vec<u8> = initializers.iter().flat_map(|t| bytes(5, t)).collect();
    let graph = bytes(6, &[nodes, tensors].concat());
    bytes(5, &[bytes(1, name.as_bytes()), graph].concat())
}

fn named(node: Vec<u8>, name: &str) -> Vec<u8> {
    [node, bytes(3, name.as_bytes())].concat()
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
fn several_nodes_are_told_apart_by_name() {
    let named = |name: &str| named(node("LSTM", &["x", "w", "r"], "y", &[]), name);
    let weights = [
        tensor("w", &[1, 8, 3], &ramp(24, 0.0)),
        tensor("r", &[1, 8, 2], &ramp(16, 0.0)),
    ];
    let file = read(model(&[named("first"), named("second")], &weights)).unwrap();
    assert_eq!(file.nodes().len(), 2);
    assert_eq!(file.node(Some("second")).unwrap().name, "second");
    assert!(
        file.node(None)
            .unwrap_err()
            .to_string()
            .contains("first, second")
    );
    assert!(matches!(
        file.node(Some("third")),
        Err(Error::UnknownName { .. })
    ));
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

#[test]
fn nodes_without_names_get_names_of_their_own_over_the_whole_file() {
    let lstm = || node("LSTM", &["x", "w", "r"], "y", &[]);
    let branch = |attribute: &str, from: f32| {
        let r = tensor("r", &[1, 8, 2], &ramp(16, from));
        attribute_graph(attribute, &[lstm()], &[r])
    };
    let branches = [branch("then_branch", 0.5), branch("else_branch", 0.7)];
    let nodes = [
        node("If", &["c"], "out", &branches),
        lstm(),
        named(lstm(), "LSTM 3"),
        lstm(),
    ];
    let weights = [
        tensor("w", &[1, 8, 3], &ramp(24, 0.0)),
        tensor("r", &[1, 8, 2], &ramp(16, 0.9)),
    ];
    let file = read(model(&nodes, &weights)).unwrap();
    let names: Vec<&str> = file.nodes().iter().map(|n| n.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "LSTM 0.then_branch.0",
            "LSTM 0.else_branch.0",
            "LSTM 1",
            "LSTM 3",
            "LSTM 3_"
        ]
    );
    for (name, from) in names.into_iter().zip([0.5, 0.7, 0.9]) {
        let node = file.node(Some(name)).unwrap();
        assert_eq!(file.constant(node, "r").unwrap().1, ramp(16, from));
    }
}

/// The file with one weight of a node changed.
fn changed(file: &OnnxFile, name: &str, matrix: &str) -> Result<Vec<u8>, Error> {
    let node = file.node(Some(name)).unwrap();
    let mut rnn = file.network(node, None, ReadOut::Linear).unwrap();
    let params = rnn.params_mut().iter_mut();
    params
        .filter(|p| p.name.contains(matrix))
        .for_each(|p| p.data[1] += 1.0);
    file.with_layer(node, &rnn, 0)
}

/// The recurrent weights of a node.
fn recurrent(file: &OnnxFile, name: &str) -> Vec<f32> {
    let tensors = file.node(Some(name)).unwrap().tensors("rnn").unwrap();
    let r = tensors["rnn.weight_hh_l0"].flatten_all().unwrap();
    r.to_vec1().unwrap()
}

#[test]
fn a_weight_that_another_part_of_the_file_reads_is_not_changed() {
    let lstm = |name: &str, r: &str| named(node("LSTM", &["x", "w", r], "y", &[]), name);
    let weights = [
        tensor("w", &[1, 8, 3], &ramp(24, 0.0)),
        tensor("r", &[1, 8, 2], &ramp(16, 0.0)),
        tensor("s", &[1, 8, 2], &ramp(16, 1.0)),
    ];
    let refused = |bytes: Vec<u8>, matrix: &str, what: (&str, &str)| {
        let file = read(bytes.clone()).unwrap();
        match changed(&file, "first", matrix) {
            Err(Error::SharedTensor {
                file,
                tensor,
                reader,
            }) => {
                assert_eq!((&*tensor, &*reader), what);
                assert_eq!(file, Path::new(FILE));
            }
            found => panic!("{:?}", found.map(|b| b.len())),
        }
        // What does not change may be read by anybody.
        let node = file.node(Some("first")).unwrap();
        let same = file.network(node, None, ReadOut::Linear).unwrap();
        assert_eq!(file.with_layer(node, &same, 0).unwrap(), bytes);
    };
    let two = model(&[lstm("first", "r"), lstm("second", "s")], &weights);
    refused(two.clone(), "weight_ih", ("w", "LSTM node `second`"));
    let file = read(two).unwrap();
    let written = read(changed(&file, "first", "weight_hh").unwrap()).unwrap();
    assert_ne!(recurrent(&written, "first"), recurrent(&file, "first"));
    assert_eq!(recurrent(&written, "second"), recurrent(&file, "second"));

    let equal = model(&[lstm("first", "r"), lstm("second", "r")], &weights);
    refused(equal, "weight_hh", ("r", "LSTM node `second`"));
    // Behind operators that move elements, and those that read a shape alone.
    let moved = [
        lstm("first", "r"),
        node("Shape", &["r"], "n", &[]),
        node("Transpose", &["r"], "t", &[]),
        node("MatMul", &["a", "t"], "m", &[]),
    ];
    let reader = "MatMul node of output `m`";
    refused(model(&moved, &weights), "weight_hh", ("r", reader));
    let shape_alone = read(model(&moved[..3], &weights)).unwrap();
    assert!(changed(&shape_alone, "first", "weight_hh").is_ok());
    // Behind one that makes other numbers of them.
    let cast = [
        lstm("first", "r"),
        node("Cast", &["r"], "half", &[attribute_int("to", 10)]),
        named(node("Add", &["a", "half"], "m", &[]), "sum"),
    ];
    refused(
        model(&cast, &weights),
        "weight_hh",
        ("half", "Add node `sum`"),
    );
    // In a graph inside.
    let inner = attribute_graph("then_branch", &[node("Relu", &["r"], "m", &[])], &[]);
    let nodes = [lstm("first", "r"), node("If", &["c"], "z", &[inner])];
    let reader = "Relu node of output `m`";
    refused(model(&nodes, &weights), "weight_hh", ("r", reader));
    // As an output of the graph.
    let output = bytes(7, &bytes(12, &bytes(1, b"r")));
    let whole = [model(&[lstm("first", "r")], &weights), output].concat();
    refused(whole, "weight_hh", ("r", "the output `r` of its graph"));
}

#[test]
fn two_nodes_may_have_parts_of_one_tensor() {
    let part = |from: i64, out: &str| {
        let list = |name: &str, v: i64| attribute_ints(name, &[v]);
        let range = [list("starts", from), list("ends", from + 1)];
        node("Slice", &["both"], out, &range)
    };
    let lstm = |name: &str, r: &str| named(node("LSTM", &["x", "w", r], "y", &[]), name);
    let nodes = [
        part(0, "r0"),
        part(1, "r1"),
        lstm("first", "r0"),
        lstm("second", "r1"),
    ];
    let weights = [
        tensor("w", &[1, 8, 3], &ramp(24, 0.0)),
        tensor("both", &[2, 8, 2], &ramp(32, 0.0)),
    ];
    let file = read(model(&nodes, &weights)).unwrap();
    let written = read(changed(&file, "second", "weight_hh").unwrap()).unwrap();
    assert_eq!(recurrent(&written, "first"), recurrent(&file, "first"));
    assert_ne!(recurrent(&written, "second"), recurrent(&file, "second"));
}

#[test]
fn a_layer_that_both_branches_of_an_if_run_changes_in_both() {
    let lstm = |name: &str, r: &str| named(node("LSTM", &["x", "w", r], "y", &[]), name);
    let both = |r: &str| {
        let branches = [
            attribute_graph("then_branch", &[lstm("first", "r")], &[]),
            attribute_graph("else_branch", &[lstm("second", r)], &[]),
        ];
        let weights = [
            tensor("w", &[1, 8, 3], &ramp(24, 0.0)),
            tensor("r", &[1, 8, 2], &ramp(16, 0.0)),
            tensor("s", &[1, 8, 2], &ramp(16, 1.0)),
        ];
        read(model(&[node("If", &["c"], "out", &branches)], &weights)).unwrap()
    };
    let file = both("r");
    let written = read(changed(&file, "first", "weight_hh").unwrap()).unwrap();
    assert_ne!(recurrent(&written, "first"), recurrent(&file, "first"));
    assert_eq!(recurrent(&written, "first"), recurrent(&written, "second"));
    // Two layers that share a matrix are not one.
    assert!(matches!(
        changed(&both("s"), "first", "weight_ih"),
        Err(Error::SharedTensor { .. })
    ));
}

/// A file with most of what is read: weights behind operators, constants of both kinds, graphs inside a graph.
fn rich() -> Vec<u8> {
    let before = attribute_int("linear_before_reset", 1);
    let inner = attribute_graph(
        "then_branch",
        &[
            node("Slice", &["w0", "zero", "six", "zero"], "w1", &[]),
            node("Unsqueeze", &["w1", "zero"], "w", &[]),
            node("Reshape", &["r0", "shape"], "r", &[]),
            node("GRU", &["x", "w", "r"], "y", std::slice::from_ref(&before)),
        ],
        &[ints("shape", &[1, 6, -1])],
    );
    let nodes = [
        node(
            "Transpose",
            &["wt"],
            "w0",
            &[attribute_ints("perm", &[1, 0])],
        ),
        node("Concat", &["ra", "rb"], "r0", &[attribute_int("axis", -1)]),
        node("If", &["c"], "z", &[inner]),
    ];
    let initializers = [
        tensor("wt", &[3, 6], &ramp(18, 1.0)),
        tensor("ra", &[6, 1], &ramp(6, 2.0)),
        tensor("rb", &[6, 1], &ramp(6, 3.0)),
        ints("zero", &[0]),
        ints("six", &[6]),
    ];
    model(&nodes, &initializers)
}

fn ints(name: &str, values: &[i64]) -> Vec<u8> {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let dims = int(1, values.len() as i64);
    [dims, int(2, 7), bytes(8, name.as_bytes()), bytes(9, &raw)].concat()
}

/// Whatever is read is also used: a network, and its weights written back.
fn use_all(file: &OnnxFile) {
    for node in file.nodes() {
        if let Ok(rnn) = file.network(node, None, ReadOut::Linear) {
            let _ = file.with_layer(node, &rnn, 0);
        }
    }
}

#[test]
fn the_file_that_is_damaged_below_is_read_when_it_is_whole() {
    let file = read(rich()).unwrap();
    assert_eq!((file.nodes().len(), file.nodes()[0].width), (1, 3));
    use_all(&file);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_files_never_panic(
        changes in proptest::collection::vec((0usize..4000, any::<u8>()), 1..6),
        cut in 0usize..4000,
        moved in (0usize..4000, 0usize..4000, 0usize..60),
    ) {
        for whole in [gru(&[attribute_int("linear_before_reset", 1)]), rich()] {
            let len = whole.len();
            let mut bytes = whole.clone();
            for &(at, value) in &changes {
                bytes[at % len] = value;
            }
            if let Ok(file) = read(bytes.clone()) {
                use_all(&file);
            }
            bytes.truncate(cut % len);
            let _ = read(bytes);
            // A piece of the file copied to another place.
            let (from, to) = (moved.0 % len, moved.1 % len);
            let piece = whole[from..(from + moved.2).min(len)].to_vec();
            let mut bytes = whole;
            bytes.splice(to..to, piece);
            if let Ok(file) = read(bytes) {
                use_all(&file);
            }
        }
    }
}

#[shared_data::needed("models/silero_vad")]
#[test]
fn the_three_exports_of_silero_vad_give_the_same_network_and_go_back_byte_for_byte() {
    let folder = Path::new(shared_data::path!("models/silero_vad"));
    let names = CheckpointNames::default().with(|c| c.dense_input = true);
    let expected = Rnn::load(&folder.join("model.safetensors"), &names).unwrap();
    for name in [
        "silero_vad_16k_sequence.onnx",
        "silero_vad_16k_op15.onnx",
        "silero_vad.onnx",
    ] {
        let path = folder.join(name);
        let file = OnnxFile::open(&path).unwrap();
        // The whole export holds a network for 16 and one for 8 kHz.
        let rows: Vec<&prune_lattice::onnx::RecurrentNode> = file.nodes().iter().collect();
        let equal = |node: &&&prune_lattice::onnx::RecurrentNode| {
            let tensors = node.tensors("lstm").unwrap();
            let w: Vec<f32> = tensors["lstm.weight_hh_l0"]
                .flatten_all()
                .unwrap()
                .to_vec1()
                .unwrap();
            w == expected.params().get("lstm.weight_hh_l0").unwrap().data
        };
        let node = rows
            .iter()
            .find(equal)
            .unwrap_or_else(|| panic!("{name}: no node has the weights"));
        let mut tensors = node.tensors("lstm").unwrap();
        for p in expected
            .params()
            .iter()
            .filter(|p| p.name.starts_with("out."))
        {
            let t = candle_core::Tensor::from_slice(
                &p.data,
                p.shape.as_slice(),
                &candle_core::Device::Cpu,
            );
            tensors.insert(p.name.clone(), t.unwrap());
        }
        let rnn = Rnn::from_tensors(&tensors, &names).unwrap();
        assert_eq!(rnn, expected, "{name}");
        let bytes = std::fs::read(&path).unwrap();
        assert!(file.with_layer(node, &rnn, 0).unwrap() == bytes, "{name}");
        // A masked network is found again.
        let mut masked = rnn.clone();
        for p in masked
            .params_mut()
            .iter_mut()
            .filter(|p| p.name.contains("weight_hh"))
        {
            p.data.iter_mut().step_by(2).for_each(|w| *w = 0.0);
        }
        let out = tempfile::tempdir().unwrap();
        let to = out.path().join(name);
        file.write(node, &masked, 0, &to).unwrap();
        let again = OnnxFile::open(&to).unwrap();
        let w = again
            .node(Some(&node.name))
            .unwrap()
            .tensors("lstm")
            .unwrap();
        let w: Vec<f32> = w["lstm.weight_hh_l0"]
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        assert_eq!(
            w,
            masked.params().get("lstm.weight_hh_l0").unwrap().data,
            "{name}"
        );
    }
}

#[shared_data::needed("models/silero_vad")]
#[test]
fn the_shipped_silero_vad_is_read_with_the_read_out_of_its_branch() {
    let folder = Path::new(shared_data::path!("models/silero_vad"));
    let names = CheckpointNames::default().with(|c| c.dense_input = true);
    let expected = Rnn::load(&folder.join("model.safetensors"), &names).unwrap();
    let file = OnnxFile::open(&folder.join("silero_vad.onnx")).unwrap();
    let text = file.node(None).unwrap_err().to_string();
    let name = "If_0_then_branch__Inline_0__/decoder/rnn/LSTM";
    assert!(text.contains(name), "{text}");
    let node = file.node(Some(name)).unwrap();
    let read_out = Some("If_0_then_branch__Inline_0__decoder.decoder.2");
    let rnn = file.network(node, read_out, ReadOut::Linear).unwrap();
    let same = |a: &str, b: &str| {
        let values = |rnn: &Rnn, name: &str| rnn.params().get(name).unwrap().data.clone();
        assert_eq!(values(&rnn, a), values(&expected, b), "{a}");
    };
    same("rnn.weight_hh_l0", "lstm.weight_hh_l0");
    same("out.weight", "out.weight");
    same("out.bias", "out.bias");
}
