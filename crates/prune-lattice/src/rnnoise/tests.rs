//! Records and lists of blocks.

use super::*;

fn file() -> (WeightFile, Vec<f32>, BitMatrix) {
    let matrix: Vec<f32> = (0..16 * 12).map(|k| k as f32 + 1.0).collect();
    // Blocks (0, 1), (0, 2) and (1, 0).
    let keep = BitMatrix::from_fn(16, 12, |i, j| matches!((i / 8, j / 4), (0, 1 | 2) | (1, 0)));
    let mut file = WeightFile::default();
    file.set(Array {
        name: "gru1_bias".into(),
        kind: 0,
        data: vec![7; 20],
    });
    file.set_matrix("gru1", &matrix, &keep).unwrap();
    (file, matrix, keep)
}

#[test]
fn a_file_is_written_as_it_was_read_byte_for_byte_and_blocks_stand_in_their_places() {
    let (file, matrix, keep) = file();
    let bytes = file.to_bytes().unwrap();
    assert!(bytes.len().is_multiple_of(64));
    let again = WeightFile::from_bytes(&bytes, Path::new("w.bin")).unwrap();
    assert_eq!(again, file);
    assert_eq!(again.to_bytes().unwrap(), bytes);
    let read = again.matrix("gru1", 16, 12).unwrap();
    for (e, v) in read.iter().enumerate() {
        let expected = if keep.get(e / 12, e % 12) {
            matrix[e]
        } else {
            0.0
        };
        assert_eq!(*v, expected);
    }
    let index = words(&again.get("gru1_idx").unwrap().data, i32::from_le_bytes);
    assert_eq!(index, [2, 4, 8, 1, 0]);
}

#[test]
fn weights_of_8_bits_are_read_where_a_file_has_no_floats() {
    // One row of codes 1, 2, .. of the first block, with a step of a half.
    let mut file = WeightFile::default();
    file.set_index("gru1_input_weights", &[1, 4]);
    file.set(Array {
        name: "gru1_input_weights_int8".into(),
        kind: 3,
        data: (0..32).map(|k| (k as i8 - 16) as u8).collect(),
    });
    let scales: Vec<f32> = (1..=8).map(|r| r as f32 / 127.0).collect();
    assert!(file.matrix("gru1_input_weights", 8, 8).is_err());
    file.set_floats("gru1_input_scale", &scales);
    let matrix = file.matrix("gru1_input_weights", 8, 8).unwrap();
    for (e, w) in matrix.iter().enumerate() {
        let (i, j) = (e / 8, e % 8);
        let expected = match j.checked_sub(4) {
            None => 0.0,
            Some(j) => (i as f32 + 1.0) * ((i * 4 + j) as f32 - 16.0),
        };
        assert!((w - expected).abs() < 1e-4, "{i} {j}: {w} {expected}");
    }
}

#[test]
fn changed_bytes_never_panic_and_what_is_read_is_written_as_it_was_read() {
    use rand::Rng;
    let (mut whole, ..) = file();
    whole.set_index("gru2", &[1, 0, 0]);
    whole.set(Array {
        name: "gru2_int8".into(),
        kind: 3,
        data: vec![3; 32],
    });
    whole.set_floats("gru2_scale", &[0.5; 16]);
    let bytes = whole.to_bytes().unwrap();
    let mut rng = crate::seed::rng(3, "damage");
    for round in 0..4000 {
        let mut damaged = bytes.clone();
        for _ in 0..=round % 4 {
            // Half of the changes go to heads and lists.
            let at = match rng.random_bool(0.5) {
                true => rng.random_range(0..bytes.len()),
                false => rng.random_range(0..bytes.len() / HEAD) * HEAD + rng.random_range(0..24),
            };
            damaged[at.min(bytes.len() - 1)] = rng.random();
        }
        if round % 3 == 0 {
            damaged.truncate(rng.random_range(0..damaged.len()));
        }
        let Ok(read) = WeightFile::from_bytes(&damaged, Path::new("w.bin")) else {
            continue;
        };
        let again = read.to_bytes().unwrap();
        assert_eq!(again.len(), damaged.len());
        assert_eq!(
            WeightFile::from_bytes(&again, Path::new("w.bin")).unwrap(),
            read
        );
        for name in ["gru1", "gru2"] {
            let _ = read.matrix(name, 16, 12);
        }
        let _ = read.network();
    }
}

#[test]
fn files_that_are_cut_off_or_damaged_are_one_clear_error_each() {
    let bytes = file().0.to_bytes().unwrap();
    let first = |bytes: &[u8]| WeightFile::from_bytes(bytes, Path::new("w.bin"));
    for cut in [1, 63, 64, 100, bytes.len() - 1] {
        let text = first(&bytes[..cut]).unwrap_err().to_string();
        assert!(text.starts_with("w.bin: record at byte"), "{text}");
    }
    for (at, value) in [(0, b'X'), (4, 1), (12, 255), (15, 128), (16, 1), (20, 0xff)] {
        let mut damaged = bytes.clone();
        damaged[at] = value;
        assert!(first(&damaged).is_err(), "{at}");
    }
    let (mut file, ..) = file();
    assert!(file.matrix("gru1", 24, 12).is_err());
    assert!(file.matrix("gru1", 16, 8).is_err());
    assert!(matches!(
        file.matrix("gru2", 16, 12),
        Err(Error::MissingTensor { .. })
    ));
    assert!(
        file.set_matrix("gru1", &[0.0; 9], &BitMatrix::ones(3, 3))
            .is_err()
    );
    file.arrays[0].name = "n".repeat(44);
    assert!(file.to_bytes().is_err());
}

#[test]
fn what_can_be_read_can_be_written_and_only_bytes_without_a_meaning_become_zeros() {
    let (whole, matrix, _) = file();
    let bytes = whole.to_bytes().unwrap();
    let read = |bytes: &[u8]| WeightFile::from_bytes(bytes, Path::new("w.bin"));
    // The first record has a name of 9 bytes, and 20 bytes of data.
    let changed = |changes: &[(usize, u8)]| {
        let mut bytes = bytes.clone();
        for &(at, value) in changes {
            bytes[at] = value;
        }
        bytes
    };
    for at in [HEAD - NAME + 10, HEAD - 2, HEAD + 20, 2 * HEAD - 1] {
        let found = read(&changed(&[(at, 7)])).unwrap();
        assert_eq!(found, whole);
        assert_eq!(found.to_bytes().unwrap(), bytes);
    }
    // A name of 44 bytes.
    let name: Vec<(usize, u8)> = (HEAD - NAME..HEAD).map(|at| (at, b'n')).collect();
    let text = read(&changed(&name)).unwrap_err().to_string();
    assert!(
        text.contains("w.bin: record at byte 0") && text.contains(&"n".repeat(44)),
        "{text}"
    );
    // A type that is not known, and sizes of no whole elements.
    for (changes, words) in [
        ([(8, 4), (12, 20)], "`gru1_bias` has elements of type 4"),
        ([(8, 0), (12, 19)], "`gru1_bias` has 19 bytes"),
        ([(8, 1), (12, 21)], "`gru1_bias` has 21 bytes"),
    ] {
        let text = read(&changed(&changes)).unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
        let mut file = whole.clone();
        file.arrays[0].kind = i32::from(changes[0].1);
        file.arrays[0].data.resize(usize::from(changes[1].1), 7);
        let text = file.to_bytes().unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    }
    // Numbers of one type are not taken for those of another.
    let mut other = whole.clone();
    let floats = matrix[..5].iter().flat_map(|v| v.to_le_bytes()).collect();
    other.set(Array {
        name: "gru1_idx".into(),
        kind: FLOAT,
        data: floats,
    });
    let text = other.matrix("gru1", 16, 12).unwrap_err().to_string();
    assert!(text.contains("`gru1_idx` has elements of type 0"), "{text}");
}
