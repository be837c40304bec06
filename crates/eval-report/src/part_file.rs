//! The cells of one part of a run in one file, for parts that share no folder: a `report.json` without rows, whose field
//! `part` holds the cells with a checksum. [`collect`] puts the files of all parts together.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tensor_io::ContentHash;

use crate::cells::{Cells, RunFacts, Shard, write_cell, write_facts};
use crate::error::{Error, Result};
use crate::report::Report;

/// Name of the field.
pub(crate) const PART: &str = "part";

/// What a part measured.
#[derive(Serialize, Deserialize)]
struct Part {
    shard: String,
    facts: RunFacts,
    cells: BTreeMap<String, Value>,
}

/// A part with the hash of its JSON text.
#[derive(Serialize, Deserialize)]
struct Sealed {
    blake3: ContentHash,
    contents: Value,
}

/// The cells of part `shard` in the folder of `cells` as a report, with the head of `report`. The folder may have cells of other
/// parts too.
///
/// # Errors
/// Cells that cannot be read.
pub fn to_json(report: &Report, cells: &Cells, facts: &RunFacts, shard: Shard) -> Result<String> {
    let part = Part {
        shard: shard.to_string(),
        facts: facts.clone(),
        cells: cells.stored()?,
    };
    let contents = serde_json::to_value(part)?;
    let sealed = Sealed {
        blake3: ContentHash::of(contents.to_string().as_bytes()),
        contents,
    };
    let head = Report {
        sections: Vec::new(),
        ..report.clone()
    };
    let mut file: Value = serde_json::from_str(&head.to_json()?)?;
    file[PART] = serde_json::to_value(sealed)?;
    Ok(serde_json::to_string(&file)? + "\n")
}

/// Puts the cells of all parts of a run into the folder `dir`, from which [`Cells::open`] takes them.
///
/// # Errors
/// [`Error::Parts`] with the files of parts that do not fit together: of other runs, twice the same, one missing, or a cell in
/// two of them; [`Error::NotAReport`] for a file that is none or was changed since.
pub fn collect(files: &[PathBuf], dir: &Path) -> Result<()> {
    let parts = files.iter().map(|path| Ok((path.as_path(), read(path)?)));
    let parts: Vec<(&Path, Part)> = parts.collect::<Result<_>>()?;
    let Some(((first, whole), others)) = parts.split_first() else {
        return Err(Error::NoRuns);
    };
    for (path, other) in others {
        if let Some(difference) = other.facts.difference(&whole.facts, "the first part has") {
            return Err(unfit(first, path, difference));
        }
    }
    let shards = parts.iter().map(|(path, part)| {
        let shard: Shard = part
            .shard
            .parse()
            .map_err(|reason: String| Error::NotAReport {
                path: path.into(),
                source: Box::new(Error::Part(reason)),
            })?;
        Ok((*path, shard))
    });
    let shards: Vec<(&Path, Shard)> = shards.collect::<Result<_>>()?;
    let count = shards[0].1.count();
    for (at, (path, shard)) in shards.iter().enumerate() {
        if shard.count() != count {
            let difference = format!("part {shard}, of another number of parts than {count}");
            return Err(unfit(first, path, difference));
        }
        if let Some((same, _)) = shards[..at].iter().find(|(_, other)| other == shard) {
            return Err(unfit(same, path, format!("both are part {shard}")));
        }
    }
    let there: BTreeSet<usize> = shards.iter().map(|(_, shard)| shard.index()).collect();
    if let Some(missing) = Shard::missing(count, |index| there.contains(&index)) {
        return Err(Error::PartsMissing(missing));
    }
    write_facts(dir, &whole.facts)?;
    let mut places: BTreeMap<&str, &Path> = BTreeMap::new();
    for (path, part) in &parts {
        for (name, value) in &part.cells {
            if let Some(other) = places.insert(name, path) {
                return Err(unfit(other, path, format!("both have the cell {name:?}")));
            }
            write_cell(dir, name, value)?;
        }
    }
    Ok(())
}

fn unfit(first: &Path, second: &Path, difference: String) -> Error {
    Error::Parts {
        first: first.into(),
        second: second.into(),
        difference,
    }
}

fn read(path: &Path) -> Result<Part> {
    let text = fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.into(),
        source,
    })?;
    let named = |source: Error| Error::NotAReport {
        path: path.into(),
        source: Box::new(source),
    };
    let part = || -> Result<Part> {
        let mut file: Value = serde_json::from_str(&text)?;
        let sealed = file.get_mut(PART).map_or(Value::Null, Value::take);
        // What is wrong with the head is said as of any other report.
        Report::from_value(file)?;
        if sealed.is_null() {
            return Err(Error::Part("a whole report, not one of a part".into()));
        }
        let Sealed { blake3, contents } = serde_json::from_value(sealed)?;
        if ContentHash::of(contents.to_string().as_bytes()) != blake3 {
            let reason = "its checksum does not match: the file is damaged or was edited";
            return Err(Error::Part(reason.into()));
        }
        Ok(serde_json::from_value(contents)?)
    };
    part().map_err(named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cells::Part as Which;
    use crate::row::Row;

    fn facts(version: &str) -> RunFacts {
        RunFacts {
            command: vec!["eval".into(), "structured".into()],
            version: version.into(),
            inputs: BTreeMap::from([("model".to_owned(), ContentHash::of(b"weights"))]),
        }
    }

    /// The file of a part of a run of four cells.
    fn file(dir: &Path, shard: &str, facts: &RunFacts) -> PathBuf {
        let folder = dir.join(format!("cells-{}", shard.replace('/', "-of-")));
        let which: Shard = shard.parse().unwrap();
        let cells = Cells::open(&folder, facts, Which::Shard(which)).unwrap();
        for at in 0..4 {
            let mut row = Row::new("structured", format!("flap {at}"));
            row.perplexity = Some(1.0 / (3.0 + f64::from(at)));
            cells
                .get::<_, Error>(&format!("flap {at}"), || Ok(row))
                .unwrap();
        }
        let report = Report {
            seed: 3,
            ..Report::default()
        };
        let path = dir.join(format!("{}.json", shard.replace('/', "-of-")));
        fs::write(&path, to_json(&report, &cells, facts, which).unwrap()).unwrap();
        path
    }

    #[test]
    fn the_cells_of_all_parts_are_those_of_one_run() {
        let dir = tempfile::tempdir().unwrap();
        let facts = facts("1");
        let files = ["2/2", "1/2"].map(|shard| file(dir.path(), shard, &facts));
        let merged = dir.path().join("merged");
        fs::create_dir(&merged).unwrap();
        collect(&files, &merged).unwrap();
        let cells = Cells::open(&merged, &facts, Which::Nothing).unwrap();
        for at in 0..4 {
            let row = cells.get::<Row, Error>(&format!("flap {at}"), || Err(Error::NoRuns));
            let row = row.unwrap().unwrap();
            assert_eq!(row.perplexity, Some(1.0 / (3.0 + f64::from(at))));
        }
        assert!(cells.missing().is_empty());
    }

    #[test]
    fn a_part_in_a_shared_folder_has_its_own_cells_alone() {
        let dir = tempfile::tempdir().unwrap();
        let facts = facts("1");
        let files = ["1/2", "2/2"].map(|shard| {
            let which: Shard = shard.parse().unwrap();
            let shared = dir.path().join("shared");
            let cells = Cells::open(shared, &facts, Which::Shard(which)).unwrap();
            for name in ["a", "b", "c"] {
                cells.get::<_, Error>(name, || Ok(name.to_owned())).unwrap();
            }
            let path = dir.path().join(format!("{}.json", which.index()));
            let json = to_json(&Report::default(), &cells, &facts, which).unwrap();
            fs::write(&path, json).unwrap();
            path
        });
        let cells: Vec<usize> = files.iter().map(|f| read(f).unwrap().cells.len()).collect();
        assert_eq!(cells, [2, 1]);
        let merged = dir.path().join("merged");
        fs::create_dir(&merged).unwrap();
        collect(&files, &merged).unwrap();
    }

    #[test]
    fn a_part_is_no_report_that_can_be_compared() {
        let dir = tempfile::tempdir().unwrap();
        let part = file(dir.path(), "1/2", &facts("1"));
        let error = Report::read(&part).unwrap_err().to_string();
        assert!(
            error.contains("1-of-2.json") && error.contains("--merge"),
            "{error}"
        );
    }

    #[test]
    fn a_number_of_parts_that_no_run_has_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "1/2", &facts("1"));
        let mut report: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let contents = &mut report[PART]["contents"];
        contents["shard"] = "1/18446744073709551615".into();
        let hash = ContentHash::of(contents.to_string().as_bytes());
        report[PART]["blake3"] = serde_json::to_value(hash).unwrap();
        fs::write(&path, report.to_string()).unwrap();
        let error = collect(&[path], dir.path()).unwrap_err().to_string();
        assert!(error.contains("at most 65536"), "{error}");
    }

    #[test]
    fn parts_that_do_not_fit_are_refused_with_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let first = file(dir.path(), "1/2", &facts("1"));
        let refused = |files: &[PathBuf]| {
            let merged = tempfile::tempdir().unwrap();
            collect(files, merged.path()).unwrap_err().to_string()
        };
        let other = tempfile::tempdir().unwrap();
        let newer = file(other.path(), "2/2", &facts("2"));
        let error = refused(&[first.clone(), newer.clone()]);
        assert!(error.contains("version"), "{error}");
        assert!(error.contains("2-of-2.json"), "{error}");
        let mut of_other_weights = facts("1");
        let weights = ContentHash::of(b"other weights");
        of_other_weights.inputs.insert("model".into(), weights);
        let other = tempfile::tempdir().unwrap();
        let retrained = file(other.path(), "2/2", &of_other_weights);
        let error = refused(&[first.clone(), retrained]);
        assert!(error.contains("model has other contents"), "{error}");
        let error = refused(&[first.clone(), first.clone()]);
        assert!(error.contains("both are part 1/2"), "{error}");
        let error = refused(std::slice::from_ref(&first));
        assert!(error.contains("2/2"), "{error}");
        let third = file(dir.path(), "3/3", &facts("1"));
        let error = refused(&[first.clone(), third]);
        assert!(error.contains("3/3"), "{error}");
        let text = fs::read_to_string(&first).unwrap();
        fs::write(&first, text.replace("0.2", "0.3")).unwrap();
        let error = refused(&[first]);
        assert!(error.contains("checksum"), "{error}");
        let whole = dir.path().join("whole.json");
        fs::write(&whole, Report::default().to_json().unwrap()).unwrap();
        let error = refused(&[whole]);
        assert!(error.contains("a whole report"), "{error}");
    }
}
