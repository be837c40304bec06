//! Which crate may know of which: the arrows of the architecture section in CONTRIBUTING.md.

use std::collections::BTreeSet;

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Each crate with the crates of this workspace that it may depend on.
const ALLOWED: [(&str, &[&str]); 14] = [
    ("shared-data", &[]),
    ("tensor-io", &[]),
    ("packed", &[]),
    ("linalg", &[]),
    ("kv-lazy", &["tensor-io"]),
    ("causal-lm", &["tensor-io", "packed", "linalg", "kv-lazy"]),
    (
        "prune-structured",
        &["tensor-io", "packed", "linalg", "kv-lazy", "causal-lm"],
    ),
    (
        "lowrank-eora",
        &["tensor-io", "packed", "linalg", "causal-lm"],
    ),
    ("lm-eval", &["tensor-io", "kv-lazy", "causal-lm"]),
    (
        "frontier",
        &[
            "tensor-io",
            "packed",
            "linalg",
            "kv-lazy",
            "causal-lm",
            "prune-structured",
            "lowrank-eora",
            "lm-eval",
        ],
    ),
    ("prune-lattice", &["tensor-io", "linalg"]),
    ("eval-report", &["tensor-io"]),
    ("toy-lm", &["tensor-io", "causal-lm"]),
    (
        "xtask",
        &[
            "tensor-io",
            "packed",
            "linalg",
            "kv-lazy",
            "causal-lm",
            "prune-structured",
            "lowrank-eora",
            "lm-eval",
            "frontier",
            "prune-lattice",
            "eval-report",
            "toy-lm",
        ],
    ),
];

/// What tests, benches and examples of every crate may use beyond that.
const ALLOWED_IN_TESTS: [&str; 1] = ["shared-data"];

#[test]
fn crates_depend_one_way() {
    let metadata = MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .no_deps()
        .other_options(["--offline".to_owned()])
        .exec()
        .unwrap();
    let members: BTreeSet<&str> = metadata.packages.iter().map(|p| p.name.as_str()).collect();
    assert!(members.contains("tensor-io") && members.contains("xtask"));
    for package in &metadata.packages {
        let name = package.name.as_str();
        let (_, allowed) = ALLOWED
            .iter()
            .find(|(known, _)| *known == name)
            .unwrap_or_else(|| panic!("{name}: add it to the architecture"));
        for dependency in &package.dependencies {
            let other = dependency.name.as_str();
            let is_allowed = match dependency.kind {
                _ if !members.contains(other) => continue,
                DependencyKind::Development => {
                    allowed.contains(&other) || ALLOWED_IN_TESTS.contains(&other)
                }
                _ => allowed.contains(&other),
            };
            assert!(is_allowed, "{name} must not depend on {other}");
        }
    }
}
