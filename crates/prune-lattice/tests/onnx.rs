//! ONNX files as a user meets them: real exports, small files made by hand, and files that must be refused.

use proptest::prelude::*;
use prune_lattice::{
    Cell, Error,
    onnx::OnnxFile,
    rnn::{CheckpointNames, Rnn},
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
    for p in rnn
        .params_mut()
        .iter_mut()
        .filter(|p| p.name == "rnn.bias_l0")
    {
        p.data[0] = 1.0;
    }
    assert!(file.with_layer(node, &rnn, 0).is_err());
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
    let named = |name: &str| {
        let lstm = node("LSTM", &["x", "w", "r"], "y", &[]);
        [lstm, bytes(3, name.as_bytes())].concat()
    };
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_files_never_panic(at in 0usize..400, value: u8, cut in 0usize..400) {
        let mut bytes = gru(&[attribute_int("linear_before_reset", 1)]);
        let len = bytes.len();
        bytes[at % len] = value;
        let _ = read(bytes.clone());
        bytes.truncate(cut % len);
        let _ = read(bytes);
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
