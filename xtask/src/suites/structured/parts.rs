//! Statistics that processes compute in parts, each on some of the calibration windows, and share through the folder of
//! cells: `calibration/2-of-4` and so on in it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use eval_report::cells::Shard;
use prune_structured::Calibration;
use tensor_io::atomic::{Overwrite, PendingFolder};

use super::cells::Cells;
use crate::bar::Bar;

/// The folder of the parts.
fn folder(cells: &Path) -> PathBuf {
    cells.join("calibration")
}

fn name(index: usize, count: usize) -> String {
    format!("{index}-of-{count}")
}

impl Cells<'_> {
    /// Computes a part of the statistics, unless it is there.
    pub(super) fn calibrate_part(&self, shard: Shard) -> Result<()> {
        let dir = self
            .settings
            .cells
            .dir()
            .context("--calib-shard: needs --cells")?;
        let needs = self.needs();
        ensure!(
            !needs.fluctuation,
            "--calib-shard: the statistics of flap-compat depend on the order of windows; leave that method out"
        );
        let all = self.calibration.count();
        let range = shard.range(all);
        ensure!(
            !range.is_empty(),
            "--calib-shard {shard}: the windows to calibrate on are {all}, fewer than parts"
        );
        let dst = folder(dir).join(name(shard.index(), shard.count()));
        if !dst.exists() {
            let pending = PendingFolder::create(&dst, Overwrite::Never)?;
            let bar = self.settings.bar("calibration", 0);
            let windows = self.calibration.pick(&range.collect::<Vec<_>>());
            self.calibrate(&windows, pending.path(), &bar)?
                .save(pending.path())?;
            bar.finish();
            pending.persist()?;
        }
        eprintln!(
            "part {shard} of the statistics is in {}; when all are there, runs with the same --cells use them",
            dst.display()
        );
        Ok(())
    }

    /// The statistics: merged from the parts where processes have computed any, or else of all windows.
    pub(super) fn calibrated(&self, bar: &Bar) -> Result<Calibration> {
        let parts = match self.settings.cells.dir() {
            Some(dir) => parts(&folder(dir)).context("--cells")?,
            None => Vec::new(),
        };
        if parts.is_empty() {
            return self.calibrate(self.calibration, self.scratch, bar);
        }
        let parts = parts.iter().map(|part| {
            let part = Calibration::load(part);
            part.context("--cells")
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        Ok(Calibration::merge(&parts, self.scratch)?)
    }
}

/// The folders of all parts, in their order; none where there are none.
fn parts(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    if dir.is_dir() {
        for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
            let name = entry?.file_name();
            let numbers = name.to_str().and_then(|name| name.split_once("-of-"));
            let part = numbers.and_then(|(i, n)| format!("{i}/{n}").parse::<Shard>().ok());
            // What is being written has other names.
            found.extend(part.map(|part| (part.index(), part.count())));
        }
    }
    let Some(&(_, count)) = found.first() else {
        return Ok(Vec::new());
    };
    if let Some((_, other)) = found.iter().find(|(_, other)| *other != count) {
        bail!("{}: parts of {count} and of {other}", dir.display());
    }
    if let Some(missing) = Shard::missing(count, |index| found.contains(&(index, count))) {
        bail!(
            "{}: --calib-shard {missing} has not been computed",
            dir.display()
        );
    }
    Ok((1..=count)
        .map(|index| dir.join(name(index, count)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_all_there_or_missing_ones_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(parts(&dir.path().join("none")).unwrap().is_empty());
        let make = |name: &str| std::fs::create_dir(dir.path().join(name)).unwrap();
        make(".3-of-3.tensor-io-partial");
        assert!(parts(dir.path()).unwrap().is_empty());
        make("1-of-18446744073709551615");
        assert!(parts(dir.path()).unwrap().is_empty());
        make("2-of-3");
        let error = parts(dir.path()).unwrap_err().to_string();
        assert!(error.contains("1/3, 3/3"), "{error}");
        make("3-of-3");
        make("1-of-3");
        let found = parts(dir.path()).unwrap();
        assert_eq!(
            found,
            ["1-of-3", "2-of-3", "3-of-3"].map(|name| dir.path().join(name))
        );
        make("1-of-2");
        assert!(
            parts(dir.path())
                .unwrap_err()
                .to_string()
                .contains("of 3 and of 2")
                || parts(dir.path())
                    .unwrap_err()
                    .to_string()
                    .contains("of 2 and of 3")
        );
    }
}
