//! `cargo xtask slurm`: an evaluation as a Slurm job array, a part a job, and a job that merges them.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use eval_report::command_line;
use tensor_io::atomic;

use crate::stdout::print;

/// What to run and what each part may use.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Folder for scripts, cells, logs and the report.
    pub out: PathBuf,
    /// Number of parts.
    pub parts: NonZeroUsize,
    /// Number of parts that calibrate before them, where they share that too.
    pub calib_parts: Option<NonZeroUsize>,
    /// Partition; the cluster's own without.
    pub partition: Option<String>,
    /// Time limit of a part.
    pub time: String,
    /// Memory of a part.
    pub memory: String,
    /// Cores of a part.
    pub cores: NonZeroUsize,
    /// Threads of a part, where the evaluation does not say.
    pub threads: Option<NonZeroUsize>,
    /// The words of the evaluation, which can be run in parts.
    pub evaluation: Vec<String>,
}

/// The folder of the cells.
pub(crate) fn cells(out: &Path) -> PathBuf {
    out.join("cells")
}

/// Write the scripts and say how to submit them.
///
/// # Errors
/// A folder that scripts cannot name or that cannot be written.
pub(crate) fn run(config: &Config) -> Result<()> {
    let scripts = Scripts::new(config)?;
    let named = || format!("--out {}", config.out.display());
    fs::create_dir_all(&config.out).with_context(named)?;
    for (name, script) in [
        ("part.sbatch", scripts.part()),
        ("merge.sbatch", scripts.merge()),
        ("submit.sh", scripts.submit()),
    ] {
        atomic::write(config.out.join(name), script.as_bytes())?;
    }
    if let Some(parts) = config.calib_parts {
        let script = scripts.calibration(parts);
        atomic::write(config.out.join("calibration.sbatch"), script.as_bytes())?;
    }
    let submit = quoted(&config.out.join("submit.sh"));
    print(&format!("submit with: sh {submit}\n"))
}

struct Scripts<'a> {
    config: &'a Config,
    /// This program.
    program: String,
    /// Where the jobs run: paths of the evaluation are relative to it.
    here: String,
    out: PathBuf,
}

impl<'a> Scripts<'a> {
    fn new(config: &'a Config) -> Result<Self> {
        let program = std::env::current_exe().context("the path of this program")?;
        let here = std::env::current_dir().context("the current folder")?;
        let out = here.join(&config.out);
        // Directives end with their line.
        for path in [&here, &out] {
            ensure!(
                !path.display().to_string().contains(['\n', '\r']),
                "{path:?}: scripts cannot name a path with line breaks"
            );
        }
        Ok(Self {
            config,
            program: program.display().to_string(),
            out,
            here: here.display().to_string(),
        })
    }

    fn path(&self, name: &str) -> String {
        quoted(&self.out.join(name))
    }

    fn head(&self, name: &str, more: &[String]) -> String {
        let Config {
            partition,
            time,
            memory,
            cores,
            ..
        } = self.config;
        let partition = (partition.iter()).map(|name| format!("partition={}", directive(name)));
        let mut lines = vec![
            format!("job-name={name}"),
            format!("time={}", directive(time)),
            format!("mem={}", directive(memory)),
            format!("cpus-per-task={cores}"),
            format!("chdir={}", directive(&self.here)),
        ];
        lines.extend(partition);
        lines.extend_from_slice(more);
        let lines: String = lines
            .iter()
            .map(|line| format!("#SBATCH --{line}\n"))
            .collect();
        format!("#!/bin/sh\n{lines}\nset -eu\n")
    }

    /// A part a job. A requeued part finds its finished cells and goes on behind them.
    fn part(&self) -> String {
        self.array(("eval-part", "part"), "--shard", self.config.parts)
    }

    /// The parts of the statistics, which must be there before cells are measured.
    fn calibration(&self, parts: NonZeroUsize) -> String {
        self.array(("eval-calibration", "calibration"), "--calib-shard", parts)
    }

    /// An array of jobs that each get a number behind `flag`.
    fn array(&self, (name, log): (&str, &str), flag: &str, parts: NonZeroUsize) -> String {
        let log = self.out.join(format!("{log}-%a.log"));
        let more = [
            format!("array=1-{parts}"),
            "requeue".into(),
            "open-mode=append".into(),
            format!("output={}", log_file(&log)),
        ];
        let threads = self.config.threads;
        let threads = threads.map_or_else(String::new, |n| format!(" --threads {n}"));
        format!(
            "{}exec {} {}{threads} --cells {} {flag} \"$SLURM_ARRAY_TASK_ID/{parts}\"\n",
            self.head(name, &more),
            quoted(Path::new(&self.program)),
            command_line(&self.config.evaluation),
            quoted(&cells(&self.out)),
        )
    }

    fn merge(&self) -> String {
        let log = self.out.join("merge.log");
        format!(
            "{}exec {} report --merge {} --out {}\n",
            self.head("eval-merge", &[format!("output={}", log_file(&log))]),
            quoted(Path::new(&self.program)),
            quoted(&cells(&self.out)),
            self.path("report"),
        )
    }

    fn submit(&self) -> String {
        let (first, after) = match self.config.calib_parts {
            None => (String::new(), ""),
            Some(_) => (
                format!(
                    "calibration=$(sbatch --parsable {})\n",
                    self.path("calibration.sbatch")
                ),
                "--dependency=\"afterok:$calibration\" --kill-on-invalid-dep=yes ",
            ),
        };
        format!(
            "#!/bin/sh\n\
             # The parts, and the merge when all of them are done.\n\
             set -eu\n\
             {first}\
             parts=$(sbatch --parsable {after}{})\n\
             sbatch --dependency=\"afterok:$parts\" --kill-on-invalid-dep=yes {}\n",
            self.path("part.sbatch"),
            self.path("merge.sbatch"),
        )
    }
}

/// A value of a directive, which sbatch cuts at spaces outside of quotes.
fn directive(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/.-_%=:,@+".contains(c);
    if value.chars().all(plain) {
        return value.to_owned();
    }
    let escaped: String = value
        .chars()
        .flat_map(|c| [Some('\\').filter(|_| matches!(c, '"' | '\\')), Some(c)])
        .flatten()
        .collect();
    format!("\"{escaped}\"")
}

/// The path of a log: sbatch reads `%` as the beginning of a number, which only the last part of the path has.
fn log_file(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let folder = path.parent().unwrap_or(Path::new("")).display();
    let folder = folder.to_string().replace('%', "%%");
    directive(&format!("{folder}/{name}"))
}

/// A path as a word of a shell.
fn quoted(path: &Path) -> String {
    command_line(&[path.display().to_string()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_with_spaces_are_one_word_for_sbatch() {
        assert_eq!(directive("/data/sweep"), "/data/sweep");
        assert_eq!(directive("/a b/c"), "\"/a b/c\"");
        assert_eq!(directive("/a\"b\\c"), "\"/a\\\"b\\\\c\"");
        let log = log_file(Path::new("/50% of it/part-%a.log"));
        assert_eq!(log, "\"/50%% of it/part-%a.log\"");
    }
}
