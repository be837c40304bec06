//! No bytes make the reader of importance matrices panic, and what it accepts are means of squares.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tensor_io::imatrix::Imatrix;

fuzz_target!(|input: &[u8]| {
    let Ok(imatrix) = Imatrix::from_bytes("fuzz.dat", input.to_vec()) else { return };
    for (name, entry) in &imatrix.entries {
        assert!(entry.means.iter().all(|mean| mean.is_finite() && *mean >= 0.0));
        let columns = entry.means.len() / entry.counts.len();
        assert!(imatrix.of(name, columns, entry.counts.len()).is_ok());
        assert!(entry.floored(0).is_some_and(|means| means.len() == columns));
    }
});
