//! Parts of a run.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

/// Part `index` of `count`, counted from 1. Written `2/4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    index: NonZeroUsize,
    count: NonZeroUsize,
}

/// Parts that are named where some are missing.
const NAMED: usize = 8;

impl Shard {
    /// The most parts of a run.
    pub const MAX: usize = 65536;

    /// The first of `count` parts that are not there, and how many more; `None` where all are.
    pub fn missing(count: usize, is_there: impl Fn(usize) -> bool) -> Option<String> {
        let mut missing = (1..=count).filter(|index| !is_there(*index));
        let named = missing.by_ref().take(NAMED);
        let named: Vec<String> = named.map(|index| format!("{index}/{count}")).collect();
        let more = missing.count();
        match (named.is_empty(), more) {
            (true, _) => None,
            (false, 0) => Some(named.join(", ")),
            (false, more) => Some(format!("{} and {more} more", named.join(", "))),
        }
    }

    /// Which part, counted from 1.
    pub fn index(self) -> usize {
        self.index.get()
    }

    /// Of how many.
    pub fn count(self) -> usize {
        self.count.get()
    }

    /// The places of `all` things, counted from 0, that are in this part where each part has neighbours.
    pub fn range(self, all: usize) -> std::ops::Range<usize> {
        let end = |part: usize| part * all / self.count;
        end(self.index() - 1)..end(self.index())
    }

    /// Whether cell `number`, counted from 0, is in this part.
    pub(crate) fn has(self, number: usize) -> bool {
        number % self.count == self.index.get() - 1
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once('/').and_then(|(index, count)| {
            Some(Shard {
                index: index.parse().ok()?,
                count: count.parse().ok()?,
            })
        });
        match parts {
            Some(shard) if shard.index <= shard.count && shard.count() <= Self::MAX => Ok(shard),
            _ => Err(format!(
                "expected I/N, part I of N, counted from 1, N at most {}",
                Self::MAX
            )),
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_parts_are_all_places_once() {
        for (count, all) in [(1, 5), (3, 12), (4, 10), (7, 3)] {
            let parts = (1..=count).map(|i| format!("{i}/{count}").parse::<Shard>().unwrap());
            let places: Vec<usize> = parts.flat_map(|part| part.range(all)).collect();
            assert_eq!(places, (0..all).collect::<Vec<_>>(), "{count} {all}");
        }
    }

    #[test]
    fn parts_are_counted_from_one() {
        assert_eq!("3/4".parse::<Shard>().unwrap().to_string(), "3/4");
        assert_eq!("1/65536".parse::<Shard>().unwrap().count(), Shard::MAX);
        for wrong in [
            "0/4",
            "5/4",
            "1",
            "1/0",
            "a/b",
            "-1/2",
            "1/65537",
            "1/18446744073709551615",
        ] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn of_many_missing_parts_the_first_are_named() {
        let missing =
            |count, there: &[usize]| Shard::missing(count, |index| there.contains(&index));
        assert_eq!(missing(2, &[1, 2]), None);
        assert_eq!(missing(3, &[2]).unwrap(), "1/3, 3/3");
        assert_eq!(
            missing(60000, &[1, 3]).unwrap(),
            "2/60000, 4/60000, 5/60000, 6/60000, 7/60000, 8/60000, 9/60000, 10/60000 and 59990 more"
        );
    }
}
