//! The machine that a report was made on, and the time and memory that a piece of work took on it.

use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sysinfo::{CpuRefreshKind, System};

use crate::row::Row;

/// What the numbers of a report were measured on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of the processor, or its architecture where the system does not tell.
    pub cpu: String,
    /// Logical cores that this process may use.
    pub cores: usize,
    /// Main memory that this process may use, in bytes.
    pub memory_bytes: u64,
}

impl Machine {
    /// Ask the operating system.
    ///
    /// # Errors
    /// An operating system that does not tell about its processors or memory.
    pub fn detect() -> Result<Self> {
        let mut system = System::new().context("this machine's processor and memory")?;
        system.refresh_memory();
        system.refresh_cpu_list(CpuRefreshKind::nothing());
        let brand = system
            .cpus()
            .first()
            .map(|cpu| cpu.brand().trim().to_owned())
            .unwrap_or_default();
        let total = system.total_memory();
        Ok(Machine {
            cpu: if brand.is_empty() {
                std::env::consts::ARCH.to_owned()
            } else {
                brand
            },
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            // Inside a container the limit counts, not the host's memory.
            memory_bytes: system
                .cgroup_limits()
                .map_or(total, |limits| limits.total_memory.min(total)),
        })
    }
}

/// Measures one row: wall time, and peak resident memory where the kernel lets a process reset its own.
#[derive(Debug)]
pub struct Stopwatch {
    started: Instant,
    has_own_peak: bool,
}

impl Stopwatch {
    /// Start the clock and forget the memory peaks of the past.
    pub fn start() -> Self {
        Stopwatch {
            has_own_peak: reset_peak_rss(),
            started: Instant::now(),
        }
    }

    /// Fill `seconds` and `peak_rss_bytes` of `row`.
    pub fn stop(self, row: &mut Row) {
        row.seconds = self.started.elapsed().as_secs_f64();
        // Without the reset the peak would be that of earlier rows: not measured.
        row.peak_rss_bytes = if self.has_own_peak {
            peak_rss_bytes()
        } else {
            None
        };
    }
}

/// Peak resident set size of this process since the last reset, in bytes, pages of mapped files included; Linux only.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Set the peak back to what is resident now; false where the system does not offer it.
pub fn reset_peak_rss() -> bool {
    // "5" is the kernel's code for resetting the high-water mark (Linux 4.0 and later). The file must not be created.
    std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/clear_refs")
        .and_then(|mut file| std::io::Write::write_all(&mut file, b"5"))
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_a_processor_and_memory() {
        let machine = Machine::detect().unwrap();
        assert!(
            !machine.cpu.is_empty() && machine.cores > 0 && machine.memory_bytes > 1 << 20,
            "{machine:?}"
        );
    }

    #[test]
    fn a_row_has_its_own_peak_and_not_that_of_earlier_rows() {
        const BIG: usize = 256 << 20;
        let watch = Stopwatch::start();
        let block = vec![1u8; BIG];
        assert_eq!(std::hint::black_box(&block)[BIG / 2], 1);
        let mut big = Row::new("test", "big");
        watch.stop(&mut big);
        drop(block);
        let mut small = Row::new("test", "small");
        Stopwatch::start().stop(&mut small);
        let (Some(big), Some(small)) = (big.peak_rss_bytes, small.peak_rss_bytes) else {
            eprintln!("skipped: this system does not reset peak memory");
            return;
        };
        assert!(big >= small + BIG as u64 / 2, "{big} {small}");
    }
}
