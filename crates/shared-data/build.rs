//! Rebuilds the macros, and with them the tests that use them, when the folder changes.

fn main() {
    println!("cargo::rerun-if-changed=../../../shared");
}
