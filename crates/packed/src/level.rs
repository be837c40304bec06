//! Which instructions the processor has.

use std::ffi::OsStr;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use crate::machine::neon::{Neon, NeonDot};
use crate::machine::{Kernel, portable::Portable};
#[cfg(target_arch = "x86_64")]
use crate::machine::{
    avx2::{Avx2, AvxVnni},
    avx512::Avx512,
};

/// A set of instructions for the kernels. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Level {
    /// No special instructions.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// The same and AVX-VNNI.
    AvxVnni,
    /// AVX-512 (F, BW, VL) with VNNI.
    Avx512,
    /// NEON.
    Neon,
    /// NEON with the dot products of Armv8.2.
    NeonDot,
}

/// The variable that limits [`Level::detected`] to a level by its name; [`Level::from_env`] tells whether it names one.
pub const LEVEL_VARIABLE: &str = "PACKED_LEVEL";

impl Level {
    /// All levels, the fastest last.
    pub const ALL: [Self; 6] = [
        Self::Portable,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Neon,
        Self::NeonDot,
    ];

    /// Its name: `portable`, `avx2`, `avx-vnni`, `avx512`, `neon`, `neon-dot`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
            Self::NeonDot => "neon-dot",
        }
    }

    /// Whether this processor has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => AvxVnni::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => Neon::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => NeonDot::detect().is_some(),
            _ => false,
        }
    }

    /// The levels of this processor.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|level| level.is_available())
    }

    /// The fastest level of this processor, no faster than the one that the variable [`LEVEL_VARIABLE`] names, if it names
    /// one: programs report what [`Level::from_env`] refuses. Found once.
    pub fn detected() -> Self {
        static DETECTED: OnceLock<Level> = OnceLock::new();
        *DETECTED.get_or_init(|| Self::from_env().unwrap_or_else(|_| Self::fastest(None)))
    }

    /// The fastest level of this processor, no faster than the one that the variable [`LEVEL_VARIABLE`] names. Without the
    /// variable, or where it is empty, the fastest.
    ///
    /// # Errors
    /// [`Error::UnknownLevel`](crate::Error::UnknownLevel) where the variable names no level of this architecture.
    pub fn from_env() -> crate::Result<Self> {
        Self::limited(std::env::var_os(LEVEL_VARIABLE).as_deref())
    }

    fn limited(name: Option<&OsStr>) -> crate::Result<Self> {
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            return Ok(Self::fastest(None));
        };
        let name = name.to_string_lossy();
        let limit: Self = name.parse()?;
        match limit.is_of_this_architecture() {
            true => Ok(Self::fastest(Some(limit))),
            false => Err(crate::Error::UnknownLevel(name.into())),
        }
    }

    fn is_of_this_architecture(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 | Self::AvxVnni | Self::Avx512 => cfg!(target_arch = "x86_64"),
            Self::Neon | Self::NeonDot => cfg!(target_arch = "aarch64"),
        }
    }

    fn fastest(limit: Option<Self>) -> Self {
        let rank = |level: Self| Self::ALL.into_iter().position(|other| other == level);
        Self::available()
            .filter(|&level| limit.is_none_or(|limit| rank(level) <= rank(limit)))
            .last()
            .unwrap_or(Self::Portable)
    }

    /// Runs a kernel; on a level that this processor does not have, the portable one.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => match Avx512::detect() {
                Some(machine) => machine.run(kernel),
                None => Portable.run(kernel),
            },
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => match AvxVnni::detect() {
                Some(machine) if K::BYTES => machine.run(kernel),
                // The other kernels have no use for its instructions.
                Some(machine) => machine.avx2().run(kernel),
                None => Portable.run(kernel),
            },
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => match Avx2::detect() {
                Some(machine) => machine.run(kernel),
                None => Portable.run(kernel),
            },
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => match NeonDot::detect() {
                Some(machine) if K::BYTES => machine.run(kernel),
                Some(machine) => machine.neon().run(kernel),
                None => Portable.run(kernel),
            },
            #[cfg(target_arch = "aarch64")]
            Self::Neon => match Neon::detect() {
                Some(machine) => machine.run(kernel),
                None => Portable.run(kernel),
            },
            _ => Portable.run(kernel),
        }
    }
}

/// Names of the levels of this architecture.
pub(crate) fn names() -> String {
    let own = Level::ALL
        .into_iter()
        .filter(|level| level.is_of_this_architecture());
    own.map(Level::name).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Level {
    type Err = crate::Error;

    fn from_str(name: &str) -> crate::Result<Self> {
        Self::ALL
            .into_iter()
            .find(|level| level.name() == name)
            .ok_or_else(|| crate::Error::UnknownLevel(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_names_the_fastest_level_that_is_used() {
        assert_eq!(Level::fastest(Some(Level::Portable)), Level::Portable);
        for level in Level::available() {
            assert_eq!(Level::fastest(Some(level)), level);
            assert_eq!(level.name().parse::<Level>().unwrap(), level);
        }
        assert!(Level::fastest(None).is_available());
        assert!("sse9".parse::<Level>().is_err());
    }

    #[test]
    fn a_limit_that_names_no_level_of_this_architecture_is_an_error_with_those_that_there_are() {
        let limited = |name: &str| Level::limited(Some(OsStr::new(name)));
        assert_eq!(Level::limited(None), Ok(Level::fastest(None)));
        assert_eq!(limited(""), Ok(Level::fastest(None)));
        assert_eq!(limited("portable"), Ok(Level::Portable));
        for level in Level::available() {
            assert_eq!(limited(level.name()), Ok(level));
        }
        let foreign = Level::ALL
            .into_iter()
            .find(|level| !level.is_of_this_architecture());
        for name in ["avx-512", "AVX2", foreign.map_or("sse9", Level::name)] {
            let error = limited(name).unwrap_err().to_string();
            assert!(
                error.contains(name) && error.contains("(portable"),
                "{error}"
            );
            for level in Level::available() {
                assert!(error.contains(level.name()), "{error}");
            }
        }
    }
}
