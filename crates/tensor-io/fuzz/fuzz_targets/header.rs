//! No file makes the header reader panic, and it accepts what the safetensors crate accepts, except repeated names and
//! odd spellings of a dtype.

#![no_main]

use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;
use tensor_io::{Header, HeaderError};

fuzz_target!(|input: &[u8]| {
    compare(input);
    // The same bytes as a header text under a length that fits, and two bytes that say how much data follows: so that
    // mutations reach behind the length check.
    if let Some((data_bytes, text)) = input.split_first_chunk::<2>() {
        let data = vec![0; usize::from(u16::from_le_bytes(*data_bytes))];
        compare(&[&(text.len() as u64).to_le_bytes(), text, &data].concat());
    }
});

fn compare(file: &[u8]) {
    match (Header::parse(file), SafeTensors::deserialize(file)) {
        (Err(_), Err(_)) => {}
        (Ok(header), Ok(theirs)) => {
            assert_eq!(header.entries.len(), theirs.len());
            for entry in &header.entries {
                let view = theirs.tensor(&entry.name).expect("both hold the same names");
                assert_eq!(entry.dtype, view.dtype());
                assert_eq!(entry.shape, view.shape());
                let data = &file[header.data_start..][entry.start..entry.end];
                assert_eq!(data.as_ptr_range(), view.data().as_ptr_range());
            }
        }
        (Ok(header), Err(error)) => panic!("accepted {header:?}, which safetensors refuses: {error}"),
        (Err(error), Ok(_)) => assert!(
            matches!(
                error,
                HeaderError::Duplicate { .. } | HeaderError::UnknownDtype { .. } | HeaderError::Json(_)
            ),
            "refused what safetensors accepts: {error}"
        ),
    }
}
