//! No bytes make a weight file of RNNoise panic, and what is read is written as it was read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prune_lattice::rnnoise::WeightFile;
use std::path::Path;

fuzz_target!(|input: &[u8]| {
    let Ok(file) = WeightFile::from_bytes(input, Path::new("fuzz.bin")) else {
        return;
    };
    let bytes = file.to_bytes().expect("names and sizes are those that were read");
    assert_eq!(WeightFile::from_bytes(&bytes, Path::new("fuzz.bin")).ok(), Some(file.clone()));
    for array in &file.arrays {
        for end in ["_float", "_int8", "_idx"] {
            if let Some(name) = array.name.strip_suffix(end) {
                let _ = file.matrix(name, 16, 12);
            }
        }
    }
    let _ = file.network();
    let _ = file.convolutions(&[0.5; 65]);
});
