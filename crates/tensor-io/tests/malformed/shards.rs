//! Shards and their index.

use crate::common::{folder, vectors};
use tensor_io::{Checkpoint, Error, HeaderError, Index, IndexError};

const INDEX: &str = r#"{"metadata":{"total_size":12},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

fn open_sharded(
    index: &str,
    first: Option<&[u8]>,
    second: Option<&[u8]>,
) -> Result<Checkpoint, Error> {
    let dir = tempfile::tempdir().unwrap();
    folder(
        dir.path(),
        &[
            ("config.json", b"{}"),
            ("model.safetensors.index.json", index.as_bytes()),
        ],
    );
    for (name, contents) in [(FIRST, first), (SECOND, second)] {
        if let Some(contents) = contents {
            folder(dir.path(), &[(name, contents)]);
        }
    }
    Checkpoint::open(dir.path())
}

#[test]
fn shards_that_agree_with_their_index_open() {
    let (first, second) = (vectors(&[("a", &[1.0])]), vectors(&[("b", &[2.0, 3.0])]));
    let checkpoint = open_sharded(INDEX, Some(&first), Some(&second)).unwrap();
    assert!(checkpoint.names().eq(["a", "b"]));
    assert_eq!(checkpoint.info("b").unwrap().shard, 1);
    assert_eq!((checkpoint.parameters(), checkpoint.total_bytes()), (3, 12));
}

#[test]
fn a_missing_shard_is_named() {
    let first = vectors(&[("a", &[1.0])]);
    let error = open_sharded(INDEX, Some(&first), None).unwrap_err();
    assert!(
        matches!(error, Error::MissingShard { index, shard } if shard == SECOND && index.ends_with("model.safetensors.index.json"))
    );
}

#[test]
fn a_tensor_that_its_shard_lacks_is_named() {
    let (first, second) = (vectors(&[("a", &[1.0])]), vectors(&[]));
    let error = open_sharded(INDEX, Some(&first), Some(&second)).unwrap_err();
    assert!(
        matches!(error, Error::NotInShard { tensor, shard, .. } if tensor == "b" && shard == SECOND)
    );
}

#[test]
fn a_tensor_that_the_index_does_not_list_is_named() {
    let (first, second) = (
        vectors(&[("a", &[1.0]), ("c", &[1.0])]),
        vectors(&[("b", &[2.0])]),
    );
    let error = open_sharded(INDEX, Some(&first), Some(&second)).unwrap_err();
    assert!(
        matches!(error, Error::NotInIndex { tensor, shard, .. } if tensor == "c" && shard.ends_with(FIRST))
    );
}

#[test]
fn a_tensor_in_another_shard_than_indexed_is_named() {
    let (first, second) = (vectors(&[("a", &[1.0]), ("b", &[2.0])]), vectors(&[]));
    let error = open_sharded(INDEX, Some(&first), Some(&second)).unwrap_err();
    assert!(matches!(
        error,
        Error::Misplaced { tensor, shard, indexed, .. } if tensor == "b" && shard.ends_with(FIRST) && indexed == SECOND
    ));
}

#[test]
fn a_tensor_in_two_shards_is_named() {
    let (first, second) = (
        vectors(&[("a", &[1.0])]),
        vectors(&[("b", &[2.0]), ("a", &[1.0])]),
    );
    let error = open_sharded(INDEX, Some(&first), Some(&second)).unwrap_err();
    assert!(matches!(
        error,
        Error::DuplicateTensor { tensor, first, second } if tensor == "a" && first.ends_with(FIRST) && second.ends_with(SECOND)
    ));
}

#[test]
fn a_malformed_shard_is_named() {
    let (first, second) = (vectors(&[("a", &[1.0])]), vectors(&[("b", &[2.0])]));
    let error = open_sharded(INDEX, Some(&first), Some(&second[..second.len() - 1])).unwrap_err();
    assert!(matches!(
        &error,
        Error::Header { file, source: HeaderError::Truncated { tensor, .. } } if tensor == "b" && file.ends_with(SECOND)
    ));
    assert!(error.to_string().contains(SECOND));
    let error = open_sharded(INDEX, Some(&first), Some(b"")).unwrap_err();
    assert!(matches!(
        error,
        Error::Header {
            source: HeaderError::TooShort { found: 0 },
            ..
        }
    ));
}

#[test]
fn an_index_that_is_no_index_is_refused() {
    for text in [
        "",
        "[]",
        "{}",
        r#"{"weight_map":[]}"#,
        r#"[{"a":"x"}]"#,
        r#"{"weight_map":{"a":1}}"#,
        r#"{"weight_map":{"a":"x","a":"x"}}"#,
        r#"{"weight_map":{},"weight_map":{}}"#,
    ] {
        assert!(
            matches!(Index::parse(text.as_bytes()), Err(IndexError::Json(_))),
            "{text}"
        );
    }
    for bytes in [
        &b"{\"weight_map\":{\"\xFF\":\"x\"}}"[..],
        b"{\"metadata\":{\"\xFF\":1},\"weight_map\":{}}",
    ] {
        assert!(matches!(Index::parse(bytes), Err(IndexError::NotUtf8(_))));
    }
    let error = open_sharded("{", None, None).unwrap_err();
    assert!(
        matches!(error, Error::Index { file, .. } if file.ends_with("model.safetensors.index.json"))
    );
    let error = Index::parse(br#"{"weight_map":{"w.7":"x","w.7":"x"}}"#).unwrap_err();
    assert!(error.to_string().contains("`w.7`"));
}

#[test]
fn an_index_cannot_lead_out_of_the_folder() {
    for name in [
        "../x.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "a\\\\b",
        "c:x",
        "x/",
        "./x",
        "a\\u0000b",
    ] {
        let text = format!(r#"{{"weight_map":{{"w":"{name}"}}}}"#);
        assert!(
            matches!(Index::parse(text.as_bytes()), Err(IndexError::UnsafeName { tensor, .. }) if tensor == "w"),
            "{name}"
        );
    }
}
