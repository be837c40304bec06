//! The exports of Silero VAD.

use prune_lattice::{
    onnx::OnnxFile,
    rnn::{CheckpointNames, ReadOut, Rnn},
};
use std::path::Path;

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
