//! A decoder in a PyTorch pickle.

#[path = "../../tensor-io/tests/common/pickle.rs"]
mod pickle;

use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Model, ModelConfig, synthetic};
use serde_json::json;
use tensor_io::{Checkpoint, Config, WriteOptions};

fn logits(model: &Model<'_>) -> Vec<f32> {
    let mut cache = model.full_cache(1).unwrap();
    let mut last = Vec::new();
    for token in [1u32, 5, 3] {
        let logits = model.forward(&[&[token]], &mut cache).unwrap();
        last = logits.flatten_all().unwrap().to_vec1().unwrap();
    }
    last
}

#[test]
fn a_loaded_model_reads_nothing_more_of_its_pickle() {
    let fields = json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 10, "max_position_embeddings": 16,
    });
    let config = Config::new(fields.as_object().unwrap().clone());
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str| Checkpoint::open(dir.path().join(name)).unwrap();

    // The same model as safetensors and as a pickle.
    let (folder, options) = (dir.path().join("safe"), WriteOptions::default());
    synthetic::write(&config, DType::F32, &folder, &options, synthetic::random(1)).unwrap();
    let tensors = ModelConfig::new(&config).unwrap().tensors();
    let safe = open("safe");
    let contents: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(name, _)| safe.bytes(name).unwrap().into_owned())
        .collect();
    let entries: Vec<(&str, &str, &[usize])> = tensors
        .iter()
        .map(|(name, shape)| (name.as_str(), "FloatStorage", &shape[..]))
        .collect();
    let state = pickle::state_dict(&entries);
    let paths: Vec<String> = (0..contents.len())
        .map(|i| format!("archive/data/{i}"))
        .collect();
    let storages = paths
        .iter()
        .zip(&contents)
        .map(|(path, c)| (path.as_str(), &c[..]));
    let files: Vec<(&str, &[u8])> = std::iter::once(("archive/data.pkl", &state[..]))
        .chain(storages)
        .collect();
    let pickled = dir.path().join("pickled");
    std::fs::create_dir(&pickled).unwrap();
    std::fs::copy(folder.join("config.json"), pickled.join("config.json")).unwrap();
    let weights = pickled.join("pytorch_model.bin");
    std::fs::write(&weights, pickle::zip(&files)).unwrap();

    let old = open("pickled");
    let [safe, old] = [&safe, &old].map(|c| Decoder::new(c, DType::F32, &Device::Cpu).unwrap());
    let expected = logits(&Model::load(&safe).unwrap());
    let model = Model::load(&old).unwrap();
    // Whatever is read from the file from here on is an error.
    std::fs::remove_file(&weights).unwrap();
    assert_eq!(logits(&model), expected);
    let zeros = Tensor::zeros(10, DType::F32, &Device::Cpu).unwrap();
    assert_ne!(expected, zeros.to_vec1::<f32>().unwrap());
}
