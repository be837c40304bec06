//! No bytes make an ONNX file panic when it is read, used or written back.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prune_lattice::{onnx::OnnxFile, rnn::ReadOut};
use std::path::Path;

fuzz_target!(|input: &[u8]| {
    let Ok(file) = OnnxFile::from_bytes(input.to_vec(), Path::new("fuzz.onnx")) else {
        return;
    };
    for node in file.nodes() {
        let read_out = file.network(node, Some("out"), ReadOut::Relu);
        let plain = file.network(node, None, ReadOut::Linear);
        for rnn in [read_out, plain].into_iter().flatten() {
            let same = file.with_layer(node, &rnn, 0);
            // Sums of biases may round; a file without them goes back as it came.
            if let (Ok(bytes), false) = (same, node.has_bias()) {
                assert_eq!(bytes, input);
            }
        }
    }
});
