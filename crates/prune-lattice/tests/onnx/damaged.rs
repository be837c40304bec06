//! Files whose bytes were changed: errors, never panics.

use crate::file::*;
use proptest::prelude::*;
use prune_lattice::{onnx::OnnxFile, rnn::ReadOut};

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
