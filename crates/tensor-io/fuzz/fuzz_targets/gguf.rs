//! No bytes make the GGUF reader panic, and what it accepts lies within the file and apart from each other.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tensor_io::gguf::{Gguf, Metadata};

fuzz_target!(|input: &[u8]| {
    examine(input.to_vec());
    // The same bytes behind the magic number, version 3 and counts of one byte each, so that mutations reach the entries.
    if let Some(([tensors, keys], rest)) = input.split_first_chunk::<2>() {
        let counts = [u64::from(*tensors), u64::from(*keys)].map(u64::to_le_bytes).concat();
        examine([b"GGUF\x03\0\0\0", &counts[..], rest].concat());
    }
});

fn examine(file: Vec<u8>) {
    let whole = file.len();
    let gguf = match Gguf::from_bytes("fuzz.gguf", file) {
        Ok(gguf) => gguf,
        Err(error) => {
            assert!(!error.to_string().contains('\n'));
            return;
        }
    };
    let metadata = gguf.metadata();
    for key in metadata.keys() {
        assert!(metadata.contains(key) && metadata.value_type(key).is_some());
        let value = metadata.get(key);
        if let (Ok(Some(number)), Ok(Some(value))) = (metadata.get_u64(key), &value) {
            assert!(format!("{value:?}").contains(&number.to_string()));
        }
        let _ = (metadata.get_f64(key), metadata.get_bool(key), metadata.get_str(key));
        let _ = (metadata.get_strings(key), metadata.get_f32s(key), metadata.get_i32s(key));
        if let Ok(Some(length)) = metadata.len_of(key) {
            assert!(length <= whole);
            let _ = metadata.get_usizes(key, length);
        }
        let _ = metadata.required(key, Metadata::get_usize);
    }
    let mut ranges = Vec::new();
    for info in gguf.tensors() {
        let bytes = gguf.bytes(&info.name).expect("listed");
        assert_eq!(bytes.len(), info.bytes);
        assert_eq!(info.elements() / info.width() * info.row_bytes(), info.bytes);
        ranges.push(bytes.as_ptr_range());
        let _ = gguf.floats(&info.name);
    }
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
}
