//! Which crate may know of which, and which file of xtask: the arrows of the architecture section in CONTRIBUTING.md.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Each crate with the crates of this workspace that it may depend on.
const ALLOWED: [(&str, &[&str]); 15] = [
    ("xtask-launcher", &[]),
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
                // A crate that names itself switches on features for its tests.
                DependencyKind::Development => {
                    other == name || allowed.contains(&other) || ALLOWED_IN_TESTS.contains(&other)
                }
                _ => allowed.contains(&other),
            };
            assert!(is_allowed, "{name} must not depend on {other}");
        }
    }
}

/// A path of modules below the crate, such as `suites::kv`; empty for lib.rs.
type Module = Vec<String>;

/// Every file of xtask with the files that it imports from.
struct Imports(BTreeMap<Module, BTreeSet<Module>>);

impl Imports {
    fn of_xtask() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut sources = BTreeMap::new();
        read(&root, &mut Vec::new(), &mut sources);
        let modules: BTreeSet<Module> = sources.keys().cloned().collect();
        let imports = sources.iter().map(|(module, source)| {
            let paths = paths(&words(source), module, &modules);
            let files = paths.iter().map(|path| file_of(path, &modules));
            let files = files.filter(|file| file != module);
            (module.clone(), files.collect())
        });
        Self(imports.collect())
    }

    /// Imports that are part of a circle. A parent and its child may import each other, but not through a third file.
    fn circles(&self) -> Vec<String> {
        let mut circles = Vec::new();
        for (from, targets) in &self.0 {
            for to in targets {
                let skipped = is_parent_and_child(from, to).then_some((to, from));
                if self.reaches(to, from, skipped) {
                    circles.push(format!("{} -> {}", from.join("::"), to.join("::")));
                }
            }
        }
        circles
    }

    /// Whether `to` is reached from `from` without the direct import of `skipped`.
    fn reaches(&self, from: &Module, to: &Module, skipped: Option<(&Module, &Module)>) -> bool {
        let mut seen = BTreeSet::from([from]);
        let mut open = vec![from];
        while let Some(module) = open.pop() {
            for next in &self.0[module] {
                if skipped == Some((module, next)) {
                    continue;
                }
                if next == to {
                    return true;
                }
                if seen.insert(next) {
                    open.push(next);
                }
            }
        }
        false
    }
}

/// Sources of all modules in `dir`, by module.
fn read(dir: &Path, module: &mut Module, sources: &mut BTreeMap<Module, String>) {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            module.push(name);
            read(&path, module, sources);
            module.pop();
        } else if path.extension().is_some_and(|extension| extension == "rs") && name != "main" {
            let mut own = module.clone();
            if !["mod", "lib"].contains(&name.as_str()) {
                own.push(name);
            }
            let source = std::fs::read_to_string(&path).unwrap();
            // Tests are at the end of a file and may use what they like.
            let code = source.split("#[cfg(test)]\nmod tests").next().unwrap();
            sources.insert(own, code.to_owned());
        }
    }
}

/// Identifiers and signs of a source, without comments, strings and characters. A path separator is one sign.
fn words(source: &str) -> Vec<String> {
    let source: Vec<char> = source.chars().collect();
    let at = |i: usize| source.get(i).copied().unwrap_or('\0');
    let mut words = Vec::new();
    let mut i = 0;
    while i < source.len() {
        let start = i;
        i += 1;
        match source[start] {
            '/' if at(i) == '/' => {
                while i < source.len() && source[i] != '\n' {
                    i += 1;
                }
            }
            '"' => {
                while i < source.len() && source[i] != '"' {
                    i += if source[i] == '\\' { 2 } else { 1 };
                }
                i += 1;
            }
            '\'' if at(i) == '\\' => i += 3,
            '\'' if at(i + 1) == '\'' => i += 2,
            ':' if at(i) == ':' => {
                i += 1;
                words.push("::".into());
            }
            c if c.is_alphabetic() || c == '_' => {
                while at(i).is_alphanumeric() || at(i) == '_' {
                    i += 1;
                }
                words.push(source[start..i].iter().collect());
            }
            c if c.is_whitespace() => {}
            c => words.push(c.into()),
        }
    }
    words
}

/// All paths of `words` that begin in this crate, from its root: at `crate`, `super` or `self`, or at the bare name of a
/// child, of which `modules` has all.
fn paths(words: &[String], own: &Module, modules: &BTreeSet<Module>) -> Vec<Module> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < words.len() {
        let is_path = words.get(at + 1).is_some_and(|word| word == "::");
        let is_inner = at > 0 && ["::", "."].contains(&words[at - 1].as_str());
        let is_visibility = at > 1 && words[at - 1] == "in" && words[at - 2] == "(";
        if !is_path || is_inner || is_visibility {
            at += 1;
            continue;
        }
        let mut child = own.clone();
        child.push(words[at].clone());
        let start = if modules.contains(&child) {
            Some(own.clone())
        } else {
            let starts = ["crate", "super", "self"].contains(&words[at].as_str());
            starts.then(Vec::new)
        };
        // Paths of other crates are passed over whole: their branches are not paths of their own.
        let mut of_other_crates = Vec::new();
        let found = if start.is_some() {
            &mut found
        } else {
            &mut of_other_crates
        };
        tree(words, &mut at, start.unwrap_or_default(), own, found);
    }
    found
}

/// Follows a path, with its branches in braces, from `at` on.
fn tree(words: &[String], at: &mut usize, start: Module, own: &Module, found: &mut Vec<Module>) {
    let mut path = start;
    loop {
        match words.get(*at).map(String::as_str) {
            Some("{") => loop {
                *at += 1;
                if words[*at] != "}" {
                    tree(words, at, path.clone(), own, found);
                }
                if words[*at] == "}" {
                    *at += 1;
                    return;
                }
            },
            Some("crate") => path.clear(),
            Some("self") if path.is_empty() => path.clone_from(own),
            Some("self") => {}
            Some("super") => {
                if path.is_empty() {
                    path.clone_from(own);
                }
                path.pop();
            }
            Some(name) => path.push(name.to_owned()),
            None => {}
        }
        *at += 1;
        if words.get(*at).is_some_and(|word| word == "::") {
            *at += 1;
        } else {
            break;
        }
    }
    // A new name for what was imported.
    if words.get(*at).is_some_and(|word| word == "as") {
        *at += 2;
    }
    found.push(path);
}

/// The file that a path leads to: its longest part that is a module.
fn file_of(path: &Module, modules: &BTreeSet<Module>) -> Module {
    let mut part = path.clone();
    while !modules.contains(&part) {
        part.pop();
    }
    part
}

fn module(path: &str) -> Module {
    path.split("::").map(String::from).collect()
}

fn is_parent_and_child(a: &Module, b: &Module) -> bool {
    let (short, long) = if a.len() < b.len() { (a, b) } else { (b, a) };
    long.len() == short.len() + 1 && long.starts_with(short)
}

#[test]
fn files_of_xtask_import_one_another_without_circles() {
    let imports = Imports::of_xtask();
    assert!(imports.0.len() > 20, "no sources found");
    assert!(imports.0[&module("suite")].contains(&module("settings")));
    let circles = imports.circles();
    assert!(
        circles.is_empty(),
        "part of a circle:\n{}",
        circles.join("\n")
    );
}

#[test]
fn a_circle_through_a_third_file_is_found_and_that_of_parent_and_child_is_not_one() {
    let circles = |arrows: &[(&str, &str)]| {
        let mut imports = BTreeMap::new();
        for (from, to) in arrows {
            imports.entry(module(to)).or_insert_with(BTreeSet::new);
            let targets: &mut BTreeSet<Module> = imports.entry(module(from)).or_default();
            targets.insert(module(to));
        }
        Imports(imports).circles()
    };
    assert!(circles(&[("a", "a::b"), ("a::b", "a"), ("a", "a::c"), ("a::c", "a")]).is_empty());
    assert_eq!(circles(&[("a", "b"), ("b", "a"), ("c", "a")]).len(), 2);
    assert_eq!(
        circles(&[("a", "a::b"), ("a::b", "a::c"), ("a::c", "a")]).len(),
        3
    );
}

#[test]
fn nothing_imports_the_command_line_and_settings_import_nothing() {
    let imports = Imports::of_xtask();
    for (from, targets) in &imports.0 {
        for to in targets {
            let is_cli = |module: &Module| module.first().is_some_and(|first| first == "cli");
            assert!(
                is_cli(from) || !is_cli(to),
                "{} imports cli",
                from.join("::")
            );
        }
    }
    assert!(imports.0[&module("settings")].is_empty());
}

#[test]
fn imports_are_read_from_all_forms_of_paths() {
    let own = module("a::b");
    let modules = BTreeSet::from([own.clone(), module("a::b::child"), module("a::b::e")]);
    let source = "use crate::x::{self, Y, z::{W as V}};\nuse super::c; // crate::no\nfn f() { self::d::g(\"crate::no\") }
        use child::{A, B}; use other::{e::C, child}; fn h(x: e::D) -> crate::q::child::E { x.child::<u8>() }";
    let mut found: Vec<String> = paths(&words(source), &own, &modules)
        .iter()
        .map(|path| path.join("::"))
        .collect();
    found.sort();
    assert_eq!(
        found,
        [
            "a::b::child::A",
            "a::b::child::B",
            "a::b::d::g",
            "a::b::e::D",
            "a::c",
            "q::child::E",
            "x",
            "x::Y",
            "x::z::W"
        ]
    );
}
