//! No bytes make the index reader panic, and no accepted shard name leads out of the folder.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use tensor_io::Index;

fuzz_target!(|input: &[u8]| {
    let Ok(index) = Index::parse(input) else { return };
    // Numbers out of range, in fields that the index does not read, are no business of the index.
    let Ok(json) = serde_json::from_slice::<Value>(input) else { return };
    let map = json["weight_map"].as_object().expect("an index has a weight_map");
    assert_eq!(index.iter().count(), map.len());
    for (tensor, shard) in index.iter() {
        assert_eq!(map[tensor], shard);
        assert_eq!(index.shard_of(tensor), Some(shard));
        assert!(index.shards().contains(shard));
        let folder = Path::new("/a/folder");
        assert_eq!(folder.join(shard).parent(), Some(folder));
        assert!(folder.join(shard).file_name().is_some_and(|name| name == shard));
    }
});
