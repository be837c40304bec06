//! `cargo xtask slurm`: an evaluation as a Slurm job array, a part a job, and a job that merges them.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
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
    /// The words of the evaluation.
    pub evaluation: Vec<String>,
}

/// Write the scripts and say how to submit them.
///
/// # Errors
/// Words that are no evaluation of a suite, and a folder that cannot be written.
pub(crate) fn run(config: &Config) -> Result<()> {
    match config.evaluation.as_slice() {
        [eval, _, ..] if eval == "eval" => {}
        words => bail!(
            "expected `eval SUITE ...`, or `eval --model ..` for all suites, behind `--`, found {:?}",
            words.join(" ")
        ),
    }
    if config.calib_parts.is_some() && config.evaluation[1] != "structured" {
        bail!("--calib-parts: only `eval structured` calibrates in parts");
    }
    for flag in ["--cells", "--shard", "--calib-shard", "--out"] {
        let is = |word: &&String| word.split('=').next() == Some(flag);
        if let Some(word) = config.evaluation.iter().find(is) {
            bail!("{word}: the scripts set it");
        }
    }
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
    let submit = config.out.join("submit.sh");
    print(&format!("submit with: sh {}\n", submit.display()))
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
        Ok(Self {
            config,
            program: program.display().to_string(),
            out: here.join(&config.out),
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
        let partition = partition.iter().map(|name| format!("partition={name}"));
        let mut lines = vec![
            format!("job-name={name}"),
            format!("time={time}"),
            format!("mem={memory}"),
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
        format!(
            "{}exec {} {} --threads {} --cells {} {flag} \"$SLURM_ARRAY_TASK_ID/{parts}\"\n",
            self.head(name, &more),
            quoted(Path::new(&self.program)),
            command_line(&self.config.evaluation),
            self.config.cores,
            self.path("cells"),
        )
    }

    fn merge(&self) -> String {
        let log = self.out.join("merge.log");
        format!(
            "{}exec {} report --merge {} --out {}\n",
            self.head("eval-merge", &[format!("output={}", log_file(&log))]),
            quoted(Path::new(&self.program)),
            self.path("cells"),
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
