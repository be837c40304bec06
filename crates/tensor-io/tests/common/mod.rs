//! Checkpoints made by hand, byte by byte, independently of the crate's writer.

use std::fs;
use std::path::Path;

/// A safetensors file of this header text and data.
pub(crate) fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let length = header.len() as u64;
    [&length.to_le_bytes(), header.as_bytes(), data].concat()
}

/// Little-endian bytes.
pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A safetensors file of f32 vectors.
pub(crate) fn vectors(tensors: &[(&str, &[f32])]) -> Vec<u8> {
    let mut header = Vec::new();
    let mut data = Vec::new();
    for (name, values) in tensors {
        let start = data.len();
        data.extend(f32_bytes(values));
        header.push(format!(
            r#""{name}":{{"dtype":"F32","shape":[{}],"data_offsets":[{start},{}]}}"#,
            values.len(),
            data.len()
        ));
    }
    safetensors(&format!("{{{}}}", header.join(",")), &data)
}

/// Writes a folder of files.
pub(crate) fn folder(dir: &Path, files: &[(&str, &[u8])]) {
    for (name, contents) in files {
        fs::write(dir.join(name), contents).unwrap();
    }
}
