//! Speeds that can be compared: programs take turns, and each is measured several times.
//!
//! A speed measured once says as much of what else the machine did as of the program. Here the same work of several
//! programs is timed in alternation, so that other load slows all of them alike, and each is timed in [`ROUNDS`] rounds.
//! A speed is the median of the rounds, and a ratio the median of the ratios round by round.

use std::time::{Duration, Instant};

use crate::row::{Row, Spread, SpreadOver};

/// Rounds that a program is timed in.
pub const ROUNDS: usize = 3;

/// The times of one program. Calls are dealt to the rounds in turn: the first, the second, the third, the first again.
#[derive(Debug, Clone, Default)]
pub struct Rounds {
    spent: [Duration; ROUNDS],
    tokens: [f64; ROUNDS],
    calls: usize,
}

impl Rounds {
    /// Run `work`, which handles `tokens` tokens, and add its time to the next round.
    pub fn time<T>(&mut self, tokens: f64, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let done = work();
        self.add(tokens, started.elapsed());
        done
    }

    /// Add the time of work done elsewhere to the next round.
    pub fn add(&mut self, tokens: f64, spent: Duration) {
        let round = self.calls % ROUNDS;
        self.spent[round] += spent;
        self.tokens[round] += tokens;
        self.calls += 1;
    }

    /// Time of all rounds.
    pub fn spent(&self) -> Duration {
        self.spent.iter().sum()
    }

    /// Tokens per second of each round; empty before all rounds have been timed.
    pub fn rates(&self) -> Vec<f64> {
        if self.calls < ROUNDS {
            return Vec::new();
        }
        let rate = |(tokens, spent): (&f64, &Duration)| tokens / spent.as_secs_f64().max(1e-9);
        self.tokens.iter().zip(&self.spent).map(rate).collect()
    }

    /// Fill the speed of the program that `row` is about, with its spread.
    pub fn fill(&self, row: &mut Row) {
        fill(
            row,
            &self.rates(),
            |row| &mut row.tokens_per_second,
            "tokens_per_second",
        );
    }

    /// Fill the speed as [`Rounds::fill`] does, that of the dense program which took turns with it, and their ratio.
    pub fn fill_beside(&self, dense: &Rounds, row: &mut Row) {
        let (own, dense) = (self.rates(), dense.rates());
        let ratios: Vec<f64> = own
            .iter()
            .zip(&dense)
            .map(|(own, dense)| own / dense)
            .collect();
        fill(
            row,
            &own,
            |row| &mut row.tokens_per_second,
            "tokens_per_second",
        );
        fill(
            row,
            &dense,
            |row| &mut row.tokens_per_second_dense,
            "tokens_per_second_dense",
        );
        fill(row, &ratios, |row| &mut row.speedup, "speedup");
    }
}

fn fill(row: &mut Row, values: &[f64], field: fn(&mut Row) -> &mut Option<f64>, name: &str) {
    *field(row) = median(values);
    if let Some(spread) = Spread::of(values, SpreadOver::Repeats) {
        row.spread.insert(name.into(), spread);
    }
}

/// The middle value, or the mean of the two in the middle; `None` for no values.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n.is_multiple_of(2) => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        _ => Some(sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(seconds: &[u64]) -> Rounds {
        let mut rounds = Rounds::default();
        for &seconds in seconds {
            rounds.add(60.0, Duration::from_secs(seconds));
        }
        rounds
    }

    #[test]
    fn a_ratio_is_that_of_rounds_side_by_side_and_one_slow_round_decides_nothing() {
        // The machine is four times as slow in the second round, for both.
        let (own, dense) = (rounds(&[1, 4, 1]), rounds(&[2, 8, 2]));
        let mut row = Row::new("s", "flap");
        own.fill_beside(&dense, &mut row);
        assert_eq!(row.tokens_per_second, Some(60.0));
        assert_eq!(row.tokens_per_second_dense, Some(30.0));
        assert_eq!(row.speedup, Some(2.0));
        let spread = row.spread["tokens_per_second"];
        assert_eq!((spread.runs, spread.min, spread.max), (3, 15.0, 60.0));
        assert_eq!(spread.over, SpreadOver::Repeats);
        let ratio = row.spread["speedup"];
        assert_eq!((ratio.min, ratio.max), (2.0, 2.0));
    }

    #[test]
    fn calls_are_dealt_to_the_rounds_in_turn() {
        let rates = rounds(&[1, 2, 3, 1, 2, 3]).rates();
        assert_eq!(rates, [60.0, 30.0, 20.0]);
        let mut row = Row::new("s", "flap");
        rounds(&[1, 2]).fill(&mut row);
        assert_eq!(row.tokens_per_second, None);
    }
}
