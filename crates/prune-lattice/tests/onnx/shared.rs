//! Several nodes in a file, and weights that more than one of them reads.

use crate::file::*;
use prune_lattice::{Error, onnx::OnnxFile, rnn::ReadOut};
use std::path::Path;

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
