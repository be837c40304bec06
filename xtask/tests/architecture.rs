//! Which crate may know of which: the arrows of the architecture section in CONTRIBUTING.md.

use std::path::Path;

/// Each crate with all the crates of this workspace that it may depend on.
const ALLOWED: [(&str, &[&str]); 10] = [
    ("packed", &[]),
    ("tensor-io", &[]),
    ("linalg", &[]),
    ("kv-lazy", &["tensor-io"]),
    ("causal-lm", &["tensor-io", "packed", "kv-lazy"]),
    (
        "prune-structured",
        &["tensor-io", "packed", "linalg", "causal-lm"],
    ),
    (
        "lowrank-eora",
        &["tensor-io", "packed", "linalg", "causal-lm"],
    ),
    ("prune-lattice", &["tensor-io"]),
    ("toy-lm", &["tensor-io", "causal-lm"]),
    (
        "xtask",
        &[
            "tensor-io",
            "packed",
            "kv-lazy",
            "causal-lm",
            "prune-structured",
            "lowrank-eora",
            "prune-lattice",
            "toy-lm",
        ],
    ),
];

/// Knows no other crate, and only tests know it.
const FOR_TESTS: &str = "shared-data";

#[test]
fn dependencies_point_one_way() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut crates: Vec<_> = std::fs::read_dir(root.join("crates"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    crates.push(root.join("xtask"));
    for folder in crates {
        let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        let name = manifest
            .lines()
            .find_map(|line| line.strip_prefix("name = "))
            .unwrap()
            .trim_matches('"');
        if name == FOR_TESTS {
            continue;
        }
        let (_, allowed) = ALLOWED
            .iter()
            .find(|(known, _)| *known == name)
            .unwrap_or_else(|| panic!("{name}: add it to the architecture"));
        for (other, _) in ALLOWED {
            let depends = manifest
                .lines()
                .any(|line| line.starts_with(&format!("{other}.")));
            assert!(
                !depends || allowed.contains(&other),
                "{name} must not know of {other}"
            );
        }
    }
}
