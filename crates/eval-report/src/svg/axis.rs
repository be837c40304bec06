//! Positions along an axis, and its ticks.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

use crate::format;
use crate::plot::Scale;

/// Ticks that an axis has room for.
const MAX_TICKS: usize = 8;
/// Characters of a setting that was chosen and not computed.
const CHOSEN: usize = 5;

/// An axis over a range of values, the same code for both spacings.
#[derive(Clone)]
pub(super) struct Coordinate {
    low: f64,
    high: f64,
    scale: Scale,
    ticks: Vec<f64>,
}

impl Coordinate {
    /// The axis of `settings` that were chosen: ticks stand at them if they are few, short and apart.
    pub(super) fn of_settings(settings: impl Iterator<Item = f64>, scale: Scale) -> Self {
        let mut values: Vec<f64> = settings.collect();
        values.sort_by(f64::total_cmp);
        values.dedup();
        let mut axis = Self::of_measurements(values.iter().copied(), scale);
        let apart = 1.0 / (MAX_TICKS as f64 + 2.0);
        let is_apart = values
            .windows(2)
            .all(|pair| axis.place(pair[1]) - axis.place(pair[0]) >= apart);
        let is_chosen = |value: &f64| format::tick(*value).len() <= CHOSEN;
        if values.len() <= MAX_TICKS && is_apart && values.iter().all(is_chosen) {
            axis.ticks = values;
        }
        axis
    }

    /// The axis of measured `values`, of which there is at least one: ticks stand at round numbers.
    pub(super) fn of_measurements(values: impl Iterator<Item = f64>, scale: Scale) -> Self {
        let (min, max) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), v| {
            (lo.min(v), hi.max(v))
        });
        let (from, to) = (forward(scale, min), forward(scale, max));
        // A margin, so that no marker sits on the frame; some room where all values are the same.
        let margin = if to > from {
            0.05 * (to - from)
        } else {
            0.05 * from.abs().max(1.0)
        };
        let (low, high) = (backward(scale, from - margin), backward(scale, to + margin));
        let ticks = match scale {
            Scale::Linear => linear_ticks(low, high),
            Scale::Log => log_ticks(low, high),
        };
        Coordinate {
            low,
            high,
            scale,
            ticks,
        }
    }

    /// Share of the way from the low to the high end.
    fn place(&self, value: f64) -> f64 {
        let [low, high, value] = [self.low, self.high, value].map(|v| forward(self.scale, v));
        (value - low) / (high - low)
    }
}

fn forward(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Linear => value,
        Scale::Log => value.ln(),
    }
}

fn backward(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Linear => value,
        Scale::Log => value.exp(),
    }
}

/// Multiples of 1, 2 or 5 times a power of ten.
fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    let power = 10f64.powf(((high - low) / MAX_TICKS as f64).log10().floor());
    let fits = |step: &f64| (high - low) / step <= MAX_TICKS as f64;
    let step = [1.0, 2.0, 5.0]
        .map(|m| m * power)
        .into_iter()
        .find(fits)
        .unwrap_or(10.0 * power);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// 1, 2 and 5 times powers of ten, or powers of ten where those are many; linear ticks within less than a decade.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let at = |multiples: &[f64], stride: usize| -> Vec<f64> {
        let all = decades
            .clone()
            .step_by(stride)
            .flat_map(|d| multiples.iter().map(move |m| m * 10f64.powi(d)));
        all.filter(|v| (low..=high).contains(v)).collect()
    };
    let fine = at(&[1.0, 2.0, 5.0], 1);
    match fine.len() {
        0..=2 => linear_ticks(low, high),
        3..=MAX_TICKS => fine,
        _ => at(&[1.0], decades.clone().count().div_ceil(MAX_TICKS)),
    }
}

impl Ranged for Coordinate {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        limit.0 + (self.place(*value) * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Coordinate {
    fn format_ext(&self, value: &f64) -> String {
        format::tick(*value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_get_their_own_ticks_when_there_is_room() {
        let doubled = [16.0, 8.0, 32.0, 64.0, 8.0];
        assert_eq!(
            Coordinate::of_settings(doubled.into_iter(), Scale::Log).ticks,
            [8.0, 16.0, 32.0, 64.0]
        );
        let crowded = Coordinate::of_settings([1.0, 2.0, 1000.0].into_iter(), Scale::Linear).ticks;
        assert_eq!(crowded, [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]);
        let computed = Coordinate::of_settings([1.509_644, 1.783_081].into_iter(), Scale::Linear);
        assert!(!computed.ticks.contains(&1.509_644), "{:?}", computed.ticks);
    }

    #[test]
    fn every_axis_has_two_to_eight_ticks_within_its_range() {
        for (low, high) in [
            (1.0, 1.5),
            (9.8, 10.1),
            (1e-9, 1e9),
            (3.0, 4000.0),
            (1e6, 1.0001e6),
            (7.0, 7.0),
            (0.02, 0.9),
        ] {
            for scale in [Scale::Linear, Scale::Log] {
                let axis = Coordinate::of_measurements([low, high].into_iter(), scale);
                assert!(
                    (2..=MAX_TICKS + 1).contains(&axis.ticks.len()),
                    "{low} {high} {scale:?} {:?}",
                    axis.ticks
                );
                assert!(
                    axis.ticks.iter().all(|t| axis.range().contains(t)),
                    "{low} {high} {scale:?} {:?}",
                    axis.ticks
                );
            }
        }
    }

    #[test]
    fn a_log_axis_puts_the_geometric_mean_in_the_middle() {
        let axis = Coordinate::of_measurements([10.0, 1000.0].into_iter(), Scale::Log);
        assert_eq!(axis.map(&100.0, (0, 200)), 100);
    }
}
