//! Importance matrices in both forms.

use tensor_io::Error;
use tensor_io::gguf::{BlockLayout, TensorSpec, Value, Writer};
use tensor_io::imatrix::{Imatrix, Importance};

fn sample() -> Imatrix {
    let mut imatrix = Imatrix {
        datasets: vec!["calibration.txt".into()],
        chunks: Some(2),
        chunk_tokens: Some(12),
        ..Imatrix::default()
    };
    let means = (0..32).map(|i| f64::from(i % 7) / 8.0 + 0.125).collect();
    imatrix
        .entries
        .insert("blk.0.attn_q.weight".into(), Importance::new(means, 24));
    let experts = Importance {
        means: (0..48).map(|i| f64::from(i) / 3.0).collect(),
        counts: vec![20, 4, 0],
    };
    imatrix
        .entries
        .insert("blk.0.ffn_down_exps.weight".into(), experts);
    imatrix
}

fn near(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} is not {b}");
    }
}

#[test]
fn the_gguf_form_keeps_means_and_counts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i.gguf");
    sample().write_gguf(&path).unwrap();
    let read = Imatrix::read(&path).unwrap();
    assert_eq!(
        (&read.datasets, read.chunks, read.chunk_tokens),
        (&sample().datasets, Some(2), Some(12))
    );
    let (q, down) = ("blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight");
    near(&read.entries[q].means, &sample().entries[q].means);
    assert_eq!(read.entries[down].counts, [20, 4, 0]);
    near(
        &read.entries[down].means[..32],
        &sample().entries[down].means[..32],
    );
    // The third expert saw no token.
    assert_eq!(read.entries[down].means[32..], [1.0; 16]);
    // Written once more, it is the same file but for that expert.
    let again = dir.path().join("again.gguf");
    read.write_gguf(&again).unwrap();
    near(
        &Imatrix::read(&again).unwrap().entries[q].means,
        &read.entries[q].means,
    );
}

#[test]
fn the_older_form_keeps_means_and_counts_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i.dat");
    sample().write_legacy(&path).unwrap();
    let read = Imatrix::read(&path).unwrap();
    assert_eq!(
        (&read.datasets, read.chunks, read.chunk_tokens),
        (&sample().datasets, Some(2), None)
    );
    for (name, entry) in &sample().entries {
        near(&read.entries[name].means, &entry.means);
        assert_eq!(read.entries[name].counts, [2]);
    }
}

#[test]
fn sizes_are_checked_where_an_entry_is_used() {
    let imatrix = sample();
    assert!(imatrix.of("blk.0.attn_q.weight", 32, 1).unwrap().is_some());
    assert!(imatrix.of("blk.1.attn_q.weight", 32, 1).unwrap().is_none());
    let wrong = imatrix.of("blk.0.attn_q.weight", 64, 1).unwrap_err();
    assert!(
        wrong.contains("blk.0.attn_q.weight") && wrong.contains("64"),
        "{wrong}"
    );
    let experts = imatrix
        .of("blk.0.ffn_down_exps.weight", 16, 3)
        .unwrap()
        .unwrap();
    assert_eq!(experts.matrix(0).unwrap()[..2], [0.0, 1.0 / 3.0]);
    assert_eq!(experts.matrix(1).unwrap()[0], 16.0 / 3.0);
    assert!(experts.matrix(3).is_none());
}

fn write_bytes(bytes: &[u8]) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i.dat");
    std::fs::write(&path, bytes).unwrap();
    Imatrix::read(&path).unwrap_err()
}

#[test]
fn values_that_are_no_means_of_squares_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (bad, why) in [
        (vec![1.0, -1.0], "-1"),
        (vec![f64::NAN, 1.0], "NaN"),
        (vec![0.0, 0.0], "all columns"),
        (vec![], "0 columns"),
    ] {
        let mut imatrix = sample();
        imatrix.entries.insert("w".into(), Importance::new(bad, 3));
        for written in [
            imatrix.write_gguf(dir.path().join("i.gguf")),
            imatrix.write_legacy(dir.path().join("i.dat")),
        ] {
            let error = written.unwrap_err();
            assert!(matches!(error, Error::Imatrix { .. }), "{error}");
            assert!(error.to_string().contains(why), "{error}");
        }
    }
    let one = |value: f32| {
        [
            &1i32.to_le_bytes()[..],
            &1i32.to_le_bytes(),
            b"w",
            &1i32.to_le_bytes(),
            &1i32.to_le_bytes(),
            &value.to_le_bytes(),
        ]
        .concat()
    };
    for value in [-1.0, f32::INFINITY, 0.0] {
        let error = write_bytes(&one(value));
        assert!(matches!(error, Error::Imatrix { .. }), "{error}");
    }
}

#[test]
fn truncated_and_foreign_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i.dat");
    sample().write_legacy(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let without_name = whole.len() - 4 - 4 - "calibration.txt".len();
    for len in 0..whole.len() {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert_eq!(Imatrix::read(&path).is_ok(), len == without_name, "{len}");
    }
    let negative = write_bytes(&[&1i32.to_le_bytes()[..], &(-1i32).to_le_bytes()].concat());
    assert!(negative.to_string().contains("found -1"), "{negative}");
    let behind = write_bytes(&[&whole[..], b"x"].concat());
    assert!(behind.to_string().contains("1 bytes behind"), "{behind}");
    let model = dir.path().join("m.gguf");
    Writer::create(&model, &[], &[]).unwrap().finish().unwrap();
    let error = Imatrix::read(&model).unwrap_err();
    assert!(error.to_string().contains("holds a model"), "{error}");
}

#[test]
fn tensors_that_belong_to_no_entry_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i.gguf");
    let metadata = [("general.type".to_string(), Value::from("imatrix"))];
    let f32s = BlockLayout::named("F32").unwrap();
    let write = |names: &[&str]| {
        let specs: Vec<_> = names
            .iter()
            .map(|name| TensorSpec::new(*name, f32s, [1, 1]))
            .collect();
        let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
        for name in names {
            writer.write(name, &1f32.to_le_bytes()).unwrap();
        }
        writer.finish().unwrap();
        Imatrix::read(&path)
    };
    assert!(write(&["w.in_sum2", "w.counts", "w.in_sum"]).is_ok());
    for names in [
        &["w.weight"][..],
        &["w.counts"],
        &["w.in_sum2", "w.counts", "v.counts"],
    ] {
        let error = write(names).unwrap_err();
        assert!(error.to_string().contains("unexpected tensor"), "{error}");
    }
    let error = write(&["w.in_sum2"]).unwrap_err();
    assert!(matches!(error, Error::UnknownTensor { .. }), "{error}");
}

/// The files of other programs: the same matrix in both forms, in hexadecimal, with the means.
#[shared_data::needed("golden/gguf-imatrix.json")]
#[test]
fn both_golden_files_give_the_golden_means_and_are_written_byte_for_byte() {
    let text = std::fs::read_to_string(shared_data::path!("golden/gguf-imatrix.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let hex = |key: &str| -> Vec<u8> {
        let digits = golden[key].as_str().unwrap();
        (0..digits.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
            .collect()
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("imatrix");
    let written = dir.path().join("written");
    for form in ["dat", "gguf"] {
        std::fs::write(&path, hex(form)).unwrap();
        let mut read = Imatrix::read(&path).unwrap();
        let means = golden["means"].as_object().unwrap();
        assert_eq!(read.entries.len(), means.len());
        for (name, expected) in means {
            let expected: Vec<f64> = expected
                .as_array()
                .unwrap()
                .iter()
                .map(|x| x.as_f64().unwrap())
                .collect();
            near(&read.entries[name].means, &expected);
        }
        assert_eq!(
            (read.chunks, &read.datasets[..]),
            (Some(2), &["calibration.txt".to_string()][..])
        );
        match form {
            "dat" => read.write_legacy(&written).unwrap(),
            _ => read.write_gguf(&written).unwrap(),
        }
        assert_eq!(std::fs::read(&written).unwrap(), hex(form), "{form}");
        if form == "gguf" {
            read.write_legacy(&written).unwrap();
            assert_eq!(std::fs::read(&written).unwrap(), hex("dat"));
        } else {
            // The older form says chunks: two of twelve tokens.
            read.chunk_tokens = Some(12);
            read.entries
                .values_mut()
                .for_each(|entry| entry.counts = vec![24]);
            read.write_gguf(&written).unwrap();
            near(
                &Imatrix::read(&written).unwrap().entries["blk.0.attn_q.weight"].means,
                &read.entries["blk.0.attn_q.weight"].means,
            );
        }
    }
}
