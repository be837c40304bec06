//! The machine that a report was made on.

use serde::{Deserialize, Serialize};
use sysinfo::{CpuRefreshKind, System};

/// What the numbers of a report were measured on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of the processor, or its architecture where the system does not report it.
    pub cpu: String,
    /// Logical cores that this process may use.
    pub cores: usize,
    /// Main memory that this process may use, in bytes.
    pub memory_bytes: u64,
}

impl Machine {
    /// Ask the operating system.
    pub fn detect() -> Self {
        let mut system = System::new();
        system.refresh_memory();
        system.refresh_cpu_list(CpuRefreshKind::nothing());
        let brand = system
            .cpus()
            .first()
            .map(|cpu| cpu.brand().trim().to_owned())
            .unwrap_or_default();
        let total = system.total_memory();
        Machine {
            cpu: if brand.is_empty() {
                std::env::consts::ARCH.to_owned()
            } else {
                brand
            },
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            // Inside a container its limit counts, not the host's memory.
            memory_bytes: system
                .cgroup_limits()
                .map_or(total, |limits| limits.total_memory.min(total)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_a_processor_and_memory() {
        let machine = Machine::detect();
        assert!(
            !machine.cpu.is_empty() && machine.cores > 0 && machine.memory_bytes > 1 << 20,
            "{machine:?}"
        );
    }
}
