//! ONNX files made by hand.

use prune_lattice::{
    Error,
    onnx::OnnxFile,
    rnn::{CheckpointNames, Rnn},
};
use std::path::Path;

pub(crate) const FILE: &str = "model.onnx";

pub(crate) fn varint(mut v: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while v >= 128 {
        out.push(v as u8 | 128);
        v >>= 7;
    }
    out.push(v as u8);
    out
}

/// A field of bytes: text, message, raw data.
pub(crate) fn bytes(tag: u64, content: &[u8]) -> Vec<u8> {
    [
        varint(tag << 3 | 2),
        varint(content.len() as u64),
        content.to_vec(),
    ]
    .concat()
}

pub(crate) fn int(tag: u64, v: i64) -> Vec<u8> {
    [varint(tag << 3), varint(v as u64)].concat()
}

pub(crate) fn tensor(name: &str, dims: &[i64], values: &[f32]) -> Vec<u8> {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let dims: Vec<u8> = dims.iter().flat_map(|&d| int(1, d)).collect();
    [dims, int(2, 1), bytes(8, name.as_bytes()), bytes(9, &raw)].concat()
}

pub(crate) fn attribute_int(name: &str, v: i64) -> Vec<u8> {
    bytes(5, &[bytes(1, name.as_bytes()), int(3, v)].concat())
}

pub(crate) fn attribute_ints(name: &str, v: &[i64]) -> Vec<u8> {
    let ints: Vec<u8> = v.iter().flat_map(|&v| int(8, v)).collect();
    bytes(5, &[bytes(1, name.as_bytes()), ints].concat())
}

pub(crate) fn attribute_text(name: &str, v: &str) -> Vec<u8> {
    bytes(
        5,
        &[bytes(1, name.as_bytes()), bytes(4, v.as_bytes())].concat(),
    )
}

pub(crate) fn node(op: &str, inputs: &[&str], output: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    let inputs: Vec<u8> = inputs.iter().flat_map(|i| bytes(1, i.as_bytes())).collect();
    let parts = [inputs, bytes(2, output.as_bytes()), bytes(4, op.as_bytes())].concat();
    [parts, attributes.concat()].concat()
}

pub(crate) fn model(nodes: &[Vec<u8>], initializers: &[Vec<u8>]) -> Vec<u8> {
    let nodes: Vec<u8> = nodes.iter().flat_map(|n| bytes(1, n)).collect();
    let tensors: Vec<u8> = initializers.iter().flat_map(|t| bytes(5, t)).collect();
    // An unknown field before the graph.
    [
        bytes(2, b"a producer"),
        bytes(7, &[nodes, tensors].concat()),
    ]
    .concat()
}

pub(crate) fn ramp(n: usize, from: f32) -> Vec<f32> {
    (0..n).map(|k| from + k as f32 * 0.01).collect()
}

pub(crate) const H: usize = 2;
pub(crate) const IN: usize = 3;

/// A GRU with its weights as initializers in ONNX's gate order z, r, h.
pub(crate) fn gru(attributes: &[Vec<u8>]) -> Vec<u8> {
    model(
        &[node("GRU", &["x", "w", "r", "b"], "y", attributes)],
        &[
            tensor("w", &[1, 6, 3], &ramp(18, 1.0)),
            tensor("r", &[1, 6, 2], &ramp(12, 2.0)),
            tensor("b", &[1, 12], &ramp(12, 3.0)),
        ],
    )
}

pub(crate) fn read(bytes: Vec<u8>) -> Result<OnnxFile, Error> {
    OnnxFile::from_bytes(bytes, Path::new(FILE))
}

pub(crate) fn flat(file: &OnnxFile, name: &str) -> Vec<f32> {
    let tensors = file.node(None).unwrap().tensors("rnn").unwrap();
    tensors[&format!("rnn.{name}")]
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// A network of the file's node with a read-out of one output.
pub(crate) fn network(file: &OnnxFile) -> Rnn {
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

/// A graph as an attribute of a node.
pub(crate) fn attribute_graph(name: &str, nodes: &[Vec<u8>], initializers: &[Vec<u8>]) -> Vec<u8> {
    let nodes: Vec<u8> = nodes.iter().flat_map(|n| bytes(1, n)).collect();
    let tensors: Vec<u8> = initializers.iter().flat_map(|t| bytes(5, t)).collect();
    let graph = bytes(6, &[nodes, tensors].concat());
    bytes(5, &[bytes(1, name.as_bytes()), graph].concat())
}

pub(crate) fn named(node: Vec<u8>, name: &str) -> Vec<u8> {
    [node, bytes(3, name.as_bytes())].concat()
}

pub(crate) fn ints(name: &str, values: &[i64]) -> Vec<u8> {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let dims = int(1, values.len() as i64);
    [dims, int(2, 7), bytes(8, name.as_bytes()), bytes(9, &raw)].concat()
}
