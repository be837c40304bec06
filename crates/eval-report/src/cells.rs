//! Cells of a run, kept in a folder as they are finished: a run that was stopped goes on there, and several processes share
//! the cells of one run.
//!
//! A cell is what a run measures between two places where it may stop: a row, or some that belong together. Every process
//! asks for the same cells in the same order; the folder says which are done.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tensor_io::{ContentHash, atomic};

use crate::error::{Error, Result};
use crate::report::Section;
use crate::row::Row;
pub use crate::shard::Shard;

/// What a folder's cells were measured by; a run that differs in any of it does not fit the folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFacts {
    /// The command line without what may differ between processes, one argument each.
    pub command: Vec<String>,
    /// The program's version.
    pub version: String,
    /// Content hashes of models and texts by their names on the command line.
    pub inputs: BTreeMap<String, ContentHash>,
}

impl RunFacts {
    /// What the two differ in; `others` begins what is said of the other.
    pub(crate) fn difference(&self, other: &Self, others: &str) -> Option<String> {
        let words = |facts: &Self| facts.command.join(" ");
        let changed = |what: &str, here: &str, there: &str| {
            Some(format!("{what} is {here:?}, {others} {there:?}"))
        };
        if self.command != other.command {
            return changed("the command", &words(self), &words(other));
        }
        if self.version != other.version {
            return changed("the version", &self.version, &other.version);
        }
        let differs = |name: &&String| self.inputs.get(*name) != other.inputs.get(*name);
        let mut names = self.inputs.keys().chain(other.inputs.keys());
        let name = names.find(differs)?;
        Some(format!(
            "{name} has other contents than those that {others}"
        ))
    }
}

/// Which cells a process measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// All that are not in the folder.
    All,
    /// Those of one part that are not in the folder.
    Shard(Shard),
    /// None: all are to be there.
    Nothing,
}

/// The cells of a run. By default there is no folder, and each cell is measured when it is asked for.
#[derive(Debug, Clone, Default)]
pub struct Cells {
    store: Option<Arc<Store>>,
    /// What names of cells begin with in the folder.
    within: String,
}

#[derive(Debug)]
struct Store {
    dir: PathBuf,
    part: Part,
    asked: Mutex<Asked>,
}

#[derive(Debug, Default)]
struct Asked {
    names: HashSet<String>,
    /// Those that are this process's to measure, done or not.
    ours: HashSet<String>,
    missing: Vec<String>,
}

/// The file of a cell.
#[derive(Serialize, Deserialize)]
struct Stored<T, S = String> {
    cell: S,
    value: T,
}

/// A section with what a report keeps elsewhere.
#[derive(Serialize, Deserialize)]
struct WholeSection {
    section: Section,
    rows: Vec<Row>,
    print_layers: bool,
}

impl From<Section> for WholeSection {
    fn from(mut section: Section) -> Self {
        Self {
            rows: std::mem::take(&mut section.rows),
            print_layers: section.print_layers,
            section,
        }
    }
}

impl From<WholeSection> for Section {
    fn from(whole: WholeSection) -> Self {
        Self {
            rows: whole.rows,
            print_layers: whole.print_layers,
            ..whole.section
        }
    }
}

/// Name of the file that says what the cells were measured by.
const FACTS: &str = "run.json";

impl Cells {
    /// Cells that are kept in `dir`, which is made where it is not there.
    ///
    /// # Errors
    /// [`Error::OtherRun`] where the folder has the cells of a run with other facts, [`Error::Read`] for a folder that
    /// was to have cells and is none, and files that cannot be read or written.
    pub fn open(dir: impl Into<PathBuf>, facts: &RunFacts, part: Part) -> Result<Self> {
        let dir = dir.into();
        if part != Part::Nothing {
            fs::create_dir_all(&dir).map_err(|source| Error::Folder {
                path: dir.clone(),
                source,
            })?;
        }
        match Self::facts(&dir) {
            Ok(there) => {
                if let Some(difference) = facts.difference(&there, "the folder's cells have") {
                    return Err(Error::OtherRun { dir, difference });
                }
            }
            Err(Error::Read { source, .. })
                if source.kind() == ErrorKind::NotFound && part != Part::Nothing =>
            {
                write_facts(&dir, facts)?;
            }
            Err(error) => return Err(error),
        }
        let store = Store {
            dir,
            part,
            asked: Mutex::default(),
        };
        Ok(Self {
            store: Some(Arc::new(store)),
            within: String::new(),
        })
    }

    /// The folder, where cells are kept.
    pub fn dir(&self) -> Option<&Path> {
        self.store.as_ref().map(|store| store.dir.as_path())
    }

    /// Whether cells are kept in a folder.
    pub fn are_kept(&self) -> bool {
        self.store.is_some()
    }

    /// The same folder for one of several things that are measured in a run: names of its cells begin with `name`.
    pub fn within(&self, name: &str) -> Self {
        Self {
            store: self.store.clone(),
            within: format!("{}{name}: ", self.within),
        }
    }

    /// What the cells of a folder were measured by.
    ///
    /// # Errors
    /// The folder has no `run.json`, or it cannot be read.
    pub fn facts(dir: &Path) -> Result<RunFacts> {
        read(&dir.join(FACTS))
    }

    /// The value of a cell: what the folder has, or else what `measure` returns, which the folder then has; `None` for
    /// a cell that another process is to measure.
    ///
    /// # Errors
    /// What `measure` returns; a name that was asked for before; files that cannot be read or written.
    pub fn get<T, E>(
        &self,
        name: &str,
        measure: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<Option<T>, E>
    where
        T: Serialize + DeserializeOwned,
        E: From<Error>,
    {
        let Some(store) = &self.store else {
            return measure().map(Some);
        };
        let name = &format!("{}{name}", self.within);
        let number = store.ask(name)?;
        let path = store.dir.join(file_name(name));
        match read::<Stored<T>>(&path) {
            Ok(stored) if stored.cell == *name => return Ok(Some(stored.value)),
            Ok(stored) => {
                let difference =
                    format!("{} is {:?}, expected {name:?}", path.display(), stored.cell);
                let dir = store.dir.clone();
                return Err(Error::OtherRun { dir, difference }.into());
            }
            Err(Error::Read { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        if !store.measures(number) {
            store.asked().missing.push(name.clone());
            return Ok(None);
        }
        let value = measure()?;
        write_cell(&store.dir, name, &value)?;
        // What other processes will read, so that all go on with the same.
        Ok(Some(read::<Stored<T>>(&path)?.value))
    }

    /// The same for a cell of whole sections.
    ///
    /// # Errors
    /// Those of [`Cells::get`].
    pub fn sections<E: From<Error>>(
        &self,
        name: &str,
        measure: impl FnOnce() -> std::result::Result<Vec<Section>, E>,
    ) -> std::result::Result<Option<Vec<Section>>, E> {
        let whole = self.get(name, || {
            let sections = measure()?.into_iter();
            Ok::<_, E>(sections.map(WholeSection::from).collect::<Vec<_>>())
        })?;
        Ok(whole.map(|sections| sections.into_iter().map(Section::from).collect()))
    }

    /// Which of these cells, asked for in this order from now on, this process will measure.
    pub fn ours(&self, names: &[String]) -> Vec<bool> {
        let Some(store) = &self.store else {
            return vec![true; names.len()];
        };
        let first = store.asked().names.len();
        let is_ours = |(at, name): (usize, &String)| {
            let done = store.dir.join(file_name(&format!("{}{name}", self.within)));
            !done.exists() && store.measures(first + at)
        };
        names.iter().enumerate().map(is_ours).collect()
    }

    /// Whether an earlier run has finished this cell, so that this one, which measures all, takes its value instead.
    pub fn found(&self, name: &str) -> bool {
        self.store.as_ref().is_some_and(|store| {
            let done = store.dir.join(file_name(&format!("{}{name}", self.within)));
            store.part == Part::All && done.exists()
        })
    }

    /// The cells that were asked for and are not done: those of other processes.
    pub fn missing(&self) -> Vec<String> {
        let store = self.store.as_ref();
        store.map_or_else(Vec::new, |store| store.asked().missing.clone())
    }

    /// This process's cells by their names, of those in the folder; none where no folder keeps them.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub(crate) fn stored(&self) -> Result<BTreeMap<String, serde_json::Value>> {
        let Some(store) = &self.store else {
            return Ok(BTreeMap::new());
        };
        let dir = store.dir.as_path();
        let folder = |source| Error::Read {
            path: dir.into(),
            source,
        };
        let mut cells = BTreeMap::new();
        for entry in fs::read_dir(dir).map_err(folder)? {
            let path = entry.map_err(folder)?.path();
            let is_json = path
                .extension()
                .is_some_and(|extension| extension == "json");
            if is_json && !path.ends_with(FACTS) {
                let stored: Stored<serde_json::Value> = read(&path)?;
                if store.asked().ours.contains(&stored.cell) {
                    cells.insert(stored.cell, stored.value);
                }
            }
        }
        Ok(cells)
    }

    /// How many cells were asked for.
    pub fn count(&self) -> usize {
        self.store
            .as_ref()
            .map_or(0, |store| store.asked().names.len())
    }
}

impl Store {
    fn asked(&self) -> std::sync::MutexGuard<'_, Asked> {
        // Names and counts are whole after every statement.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a cell that is not done is this process's to measure.
    fn measures(&self, number: usize) -> bool {
        match self.part {
            Part::All => true,
            Part::Shard(shard) => shard.has(number),
            Part::Nothing => false,
        }
    }

    /// The number of a cell in the order of asking.
    fn ask(&self, name: &str) -> Result<usize> {
        let mut asked = self.asked();
        let number = asked.names.len();
        if !asked.names.insert(name.into()) {
            return Err(Error::CellTwice { name: name.into() });
        }
        if self.measures(number) {
            asked.ours.insert(name.into());
        }
        Ok(number)
    }
}

/// Writes what the cells of a folder are measured by.
pub(crate) fn write_facts(dir: &Path, facts: &RunFacts) -> Result<()> {
    Ok(atomic::write_sealed_json(dir.join(FACTS), facts)?)
}

/// Writes a cell.
pub(crate) fn write_cell<T: Serialize>(dir: &Path, name: &str, value: &T) -> Result<()> {
    let stored = Stored { cell: name, value };
    Ok(atomic::write_sealed_json(
        dir.join(file_name(name)),
        &stored,
    )?)
}

/// A file with a checksum, so that no number that was damaged or edited enters a report.
fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let value = atomic::read_sealed_json(path)?;
    value.ok_or_else(|| Error::Read {
        path: path.into(),
        source: ErrorKind::NotFound.into(),
    })
}

/// A file name that people can read and that no two cells share.
fn file_name(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let plain = name.chars().map(|c| if is_plain(c) { c } else { '-' });
    let plain: String = plain.take(80).collect();
    let hash = ContentHash::of(name.as_bytes()).to_u64();
    format!("{plain}-{hash:016x}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> RunFacts {
        RunFacts {
            command: vec!["eval".into(), "--seed".into(), "3".into()],
            version: "1".into(),
            inputs: BTreeMap::from([("model".to_owned(), ContentHash::of(b"weights"))]),
        }
    }

    /// The values of cells `0..6` as one process gets them, with the names it measured.
    fn run(cells: &Cells) -> (Vec<Option<f64>>, Vec<usize>) {
        let mut measured = Vec::new();
        let values = (0..6).map(|i| {
            let value = cells.get::<_, Error>(&format!("flap at {i}"), || {
                measured.push(i);
                Ok(1.0 / (3.0 + i as f64))
            });
            value.unwrap()
        });
        let values = values.collect();
        (values, measured)
    }

    #[test]
    fn parts_measure_every_cell_once_and_the_whole_equals_one_run() {
        let dir = tempfile::tempdir().unwrap();
        let open = |part| Cells::open(dir.path(), &facts(), part).unwrap();
        let (first, by_first) = run(&open(Part::Shard("1/2".parse().unwrap())));
        assert_eq!(by_first, [0, 2, 4]);
        assert_eq!(first.iter().flatten().count(), 3);
        let second = open(Part::Shard("2/2".parse().unwrap()));
        let (_, by_second) = run(&second);
        assert_eq!(by_second, [1, 3, 5]);
        assert!(second.missing().is_empty());
        let (merged, by_merge) = run(&open(Part::Nothing));
        assert!(by_merge.is_empty());
        assert_eq!(merged, run(&Cells::default()).0);
    }

    #[test]
    fn parts_of_a_run_have_names_of_their_own_and_are_counted_together() {
        let dir = tempfile::tempdir().unwrap();
        let cells = Cells::open(dir.path(), &facts(), Part::All).unwrap();
        let (first, second) = (cells.within("kv"), cells.within("lowrank"));
        assert_eq!(run(&first).1.len(), 6);
        assert_eq!(run(&second).1.len(), 6);
        assert_eq!(cells.count(), 12);
        let merge = Cells::open(dir.path(), &facts(), Part::Nothing).unwrap();
        let missing = merge.within("chain").get::<f64, Error>("dense", || Ok(1.0));
        assert_eq!(missing.unwrap(), None);
        assert_eq!(merge.missing(), ["chain: dense"]);
        assert_eq!(run(&merge.within("kv")).0, run(&Cells::default()).0);
    }

    #[test]
    fn the_cells_that_a_process_measures_are_known_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..6).map(|i| format!("flap at {i}")).collect();
        let open = |part| Cells::open(dir.path(), &facts(), part).unwrap();
        let second = open(Part::Shard("2/3".parse().unwrap()));
        let ours = second.ours(&names);
        let (_, measured) = run(&second);
        let expected: Vec<bool> = (0..6).map(|i| measured.contains(&i)).collect();
        assert_eq!(ours, expected);
        let left: Vec<bool> = expected.iter().map(|done| !done).collect();
        assert_eq!(open(Part::All).ours(&names), left);
        let found = |part| names.iter().map(|name| open(part).found(name)).collect();
        let (by_all, by_merge): (Vec<bool>, Vec<bool>) = (found(Part::All), found(Part::Nothing));
        assert_eq!((by_all, by_merge), (expected, vec![false; 6]));
        assert!(!Cells::default().found(&names[1]));
        assert_eq!(Cells::default().ours(&names), [true; 6]);
    }

    #[test]
    fn a_number_that_was_changed_in_a_cell_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Cells::open(dir.path(), &facts(), Part::All).unwrap();
        run(&open());
        let path = dir.path().join(file_name("flap at 1"));
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("0.25", "0.35")).unwrap();
        let changed = open().get::<f64, Error>("flap at 1", || Ok(1.0));
        let error = changed.unwrap_err().to_string();
        assert!(
            error.contains("flap-at-1") && error.contains("checksum"),
            "{error}"
        );
        let facts_file = dir.path().join(FACTS);
        let text = fs::read_to_string(&facts_file).unwrap();
        fs::write(&facts_file, text.replace("--seed", "--sead")).unwrap();
        let error = Cells::facts(dir.path()).unwrap_err().to_string();
        assert!(error.contains("run.json"), "{error}");
    }

    #[test]
    fn a_stopped_run_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let cells = Cells::open(dir.path(), &facts(), Part::All).unwrap();
        let stopped = cells.get::<f64, Error>("flap at 1", || Err(Error::NoRuns));
        assert!(matches!(stopped, Err(Error::NoRuns)));
        assert_eq!(
            cells.get::<_, Error>("flap at 0", || Ok(7.0)).unwrap(),
            Some(7.0)
        );
        let (values, measured) = run(&Cells::open(dir.path(), &facts(), Part::All).unwrap());
        assert_eq!(measured, [1, 2, 3, 4, 5]);
        assert_eq!(values[0], Some(7.0));
    }

    #[test]
    fn a_section_comes_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let section = Section {
            title: "speed".into(),
            rows: vec![Row::new("kv", "lazy")],
            print_layers: true,
            ..Section::default()
        }
        .fact("window", 8);
        for part in [Part::All, Part::Nothing] {
            let cells = Cells::open(dir.path(), &facts(), part).unwrap();
            let sections = cells.sections::<Error>("speed", || Ok(vec![section.clone()]));
            assert_eq!(sections.unwrap(), Some(vec![section.clone()]));
        }
    }

    #[test]
    fn missing_cells_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let open = |part| Cells::open(dir.path(), &facts(), part).unwrap();
        run(&open(Part::Shard("2/3".parse().unwrap())));
        let merge = open(Part::Nothing);
        run(&merge);
        assert_eq!(merge.count(), 6);
        let left = [0, 2, 3, 5].map(|i| format!("flap at {i}"));
        assert_eq!(merge.missing(), left);
    }

    #[test]
    fn cells_of_another_run_are_refused_with_what_differs() {
        let dir = tempfile::tempdir().unwrap();
        Cells::open(dir.path(), &facts(), Part::All).unwrap();
        let refused = |change: &dyn Fn(&mut RunFacts)| {
            let mut facts = facts();
            change(&mut facts);
            Cells::open(dir.path(), &facts, Part::All)
                .unwrap_err()
                .to_string()
        };
        assert!(refused(&|f| f.command[2] = "4".into()).contains("eval --seed 4"));
        assert!(refused(&|f| f.version = "2".into()).contains("the version is \"2\""));
        let other = ContentHash::of(b"other");
        let error = refused(&|f| {
            f.inputs.insert("model".into(), other);
        });
        assert!(error.contains("model has other contents"), "{error}");
    }

    #[test]
    fn a_folder_without_cells_cannot_be_merged() {
        let dir = tempfile::tempdir().unwrap();
        let error = Cells::open(dir.path(), &facts(), Part::Nothing).unwrap_err();
        assert!(error.to_string().contains("run.json"), "{error}");
        let gone = dir.path().join("gone");
        assert!(Cells::open(&gone, &facts(), Part::Nothing).is_err());
        assert!(!gone.exists());
    }

    #[test]
    fn a_cell_that_is_asked_for_twice_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let cells = Cells::open(dir.path(), &facts(), Part::All).unwrap();
        cells.get::<_, Error>("dense", || Ok(1)).unwrap();
        let twice = cells.get::<_, Error>("dense", || Ok(1));
        assert!(matches!(twice, Err(Error::CellTwice { name }) if name == "dense"));
    }

    #[test]
    fn a_damaged_cell_is_an_error_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Cells::open(dir.path(), &facts(), Part::All).unwrap();
        open().get::<_, Error>("dense", || Ok(1.5)).unwrap();
        fs::write(dir.path().join(file_name("dense")), "{\"cell\":").unwrap();
        let error = open().get::<_, Error>("dense", || Ok(1.5)).unwrap_err();
        assert!(error.to_string().contains("dense"), "{error}");
    }
}
