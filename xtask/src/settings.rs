//! What all suites share.

use anyhow::{Context, Result};
use clap::ValueEnum;

/// Settings of a run, whatever is measured.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Window in tokens; each suite has a default.
    pub window: Option<usize>,
    /// Number of windows, sequences or questions to evaluate; each suite has a default.
    pub samples: Option<usize>,
    /// Seed of everything random.
    pub seed: u64,
    /// Where tensors are.
    pub device: Device,
    /// Whether to show no progress.
    pub quiet: bool,
}

/// Where tensors are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// Processor
    #[default]
    Cpu,
    /// NVIDIA GPU; needs a build with the feature `cuda`
    Cuda,
    /// Apple GPU; needs a build with the feature `metal`
    Metal,
}

impl Device {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
            Device::Metal => "metal",
        }
    }

    /// The first device of this kind.
    ///
    /// # Errors
    /// No such device, or a program built without the feature of the same name.
    pub fn open(self) -> Result<candle_core::Device> {
        match self {
            Device::Cpu => Ok(candle_core::Device::Cpu),
            Device::Cuda => candle_core::Device::new_cuda(0),
            Device::Metal => candle_core::Device::new_metal(0),
        }
        .with_context(|| {
            format!(
                "--device {0}: needs the hardware and a build with --features {0}",
                self.name()
            )
        })
    }
}
