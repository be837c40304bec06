//! Budgets as they are written on the command line.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

/// A budget.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Memory {
    /// Bytes.
    Bytes(u64),
    /// Percent of the model's bytes in bf16.
    Percent(f64),
}

/// Suffixes and what they multiply with.
const UNITS: [(&str, f64); 10] = [
    ("kib", 1024.0),
    ("mib", 1048576.0),
    ("gib", 1073741824.0),
    ("kb", 1e3),
    ("mb", 1e6),
    ("gb", 1e9),
    ("k", 1e3),
    ("m", 1e6),
    ("g", 1e9),
    ("b", 1.0),
];

impl Memory {
    /// Bytes, given those of the model in bf16.
    pub fn bytes(self, bf16: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (bf16 as f64 * percent / 100.0) as u64,
        }
    }
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            "expected bytes, such as 500000000, 500M or 1.5GiB, or a percentage, such as 35%"
                .to_string()
        };
        let number = |text: &str| -> Option<f64> {
            let value: f64 = text.trim().parse().ok()?;
            (value.is_finite() && value > 0.0).then_some(value)
        };
        let lower = text.trim().to_lowercase();
        if let Some(percent) = lower.strip_suffix('%') {
            return number(percent).map(Self::Percent).ok_or_else(expected);
        }
        let unit = UNITS.into_iter().find_map(|(suffix, factor)| {
            let value = lower.strip_suffix(suffix)?;
            Some(number(value)? * factor)
        });
        let bytes = unit.or_else(|| number(&lower)).ok_or_else(expected)?;
        Ok(Self::Bytes(bytes as u64))
    }
}

impl Display for Memory {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{bytes}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_bytes_with_or_without_a_unit_and_percentages() {
        for (text, bytes) in [
            ("1000", 1000),
            ("35%", 700),
            ("12.5 %", 250),
            ("1.5k", 1500),
            ("2KiB", 2048),
            ("3MB", 3_000_000),
            ("1G", 1_000_000_000),
        ] {
            assert_eq!(text.parse::<Memory>().unwrap().bytes(2000), bytes, "{text}");
        }
        for text in ["", "%", "-3", "0", "many", "3 T", "nan"] {
            let error = text.parse::<Memory>().unwrap_err();
            assert!(error.contains("500M"), "{text}: {error}");
        }
        assert_eq!("35%".parse::<Memory>().unwrap().to_string(), "35%");
    }
}
