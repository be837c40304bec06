//! What `cargo xtask` runs first: it is built in a second, says how long the first build of xtask takes, and starts it. Flags of
//! cargo before `xtask` end here; settings in the environment, such as `CARGO_NET_OFFLINE=true`, reach both builds.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    if program().is_some_and(|program| !program.exists()) {
        eprintln!(
            "the first build of xtask, optimised, takes seven to nine minutes on two cores; cargo names the crates as it compiles them"
        );
    }
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["run", "--release", "--package", "xtask", "--"])
        .args(env::args_os().skip(1));
    // What `cargo run` says of this program would make build scripts that watch it run again.
    for (name, _) in env::vars_os() {
        let of_package =
            |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        if name.to_str().is_some_and(of_package) {
            command.env_remove(name);
        }
    }
    run(command)
}

/// Where cargo puts xtask: in the profile's folder beside that of this program.
fn program() -> Option<PathBuf> {
    let launcher = env::current_exe().ok()?;
    let target = launcher.parent()?.parent()?;
    let name = format!("xtask{}", env::consts::EXE_SUFFIX);
    Some(target.join("release").join(name))
}

/// Runs it in the place of this process, which signals reach then.
#[cfg(unix)]
fn run(mut command: Command) -> ExitCode {
    use std::os::unix::process::CommandExt;
    failed(&command.exec())
}

#[cfg(not(unix))]
fn run(mut command: Command) -> ExitCode {
    match command.status() {
        Ok(status) => ExitCode::from(
            status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(1),
        ),
        Err(error) => failed(&error),
    }
}

fn failed(error: &std::io::Error) -> ExitCode {
    eprintln!("error: cargo: {error}");
    ExitCode::FAILURE
}
