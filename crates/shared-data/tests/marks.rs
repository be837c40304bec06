//! Tests with and without what they need.

#[shared_data::needed("no-such-folder")]
#[test]
fn a_test_that_needs_what_is_absent_does_not_run() {
    panic!("ran without its data");
}

#[shared_data::needed("models/stories260K", "data/text")]
#[test]
fn what_a_running_test_needs_is_there() {
    for path in [
        shared_data::path!("models/stories260K/config.json"),
        shared_data::path!("data/text"),
    ] {
        assert!(std::path::Path::new(path).exists(), "{path}");
    }
}
