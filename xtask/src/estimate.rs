//! How long a run will take, said before it begins: a block of the model is timed on a batch of its text, and the work is
//! counted in passes over texts. Good to a factor of two, which is what one needs to know before waiting.

use std::time::Instant;

use anyhow::Result;
use causal_lm::{BATCH_TOKENS, Decoder, Hidden, LinearName, NoTap, Windows};

use crate::settings::Settings;

/// Seconds below which nobody asks.
const WORTH_SAYING: f64 = 20.0;

/// Floating-point operations of an eigendecomposition and a factorisation of n by n in f64, each counted as often as it is
/// slower than one of a product in f32: 9 n³ at a quarter of the rate.
const SOLVE: f64 = 36.0;

/// What a block of a model takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    layers: f64,
    /// Seconds to load a block.
    load: f64,
    /// Seconds for a token of the whole model, head included.
    token: f64,
    /// Floating-point operations a second in the products of a block.
    rate: f64,
    /// Widths of the inputs of a block's linears, each input once.
    inputs: [f64; 4],
}

impl Probe {
    /// Times the first block on at most a batch of `windows`.
    pub(crate) fn of(decoder: &Decoder<'_>, windows: &Windows) -> Result<Self> {
        let windows = windows.first((BATCH_TOKENS / windows.window_len()).max(1));
        let tokens = (windows.count() * windows.window_len()) as f64;
        let hidden = Hidden::embed(decoder, &windows)?;
        let started = Instant::now();
        let block = decoder.block(0)?;
        let load = started.elapsed().as_secs_f64();
        // The first run of a product also starts threads and touches memory.
        hidden.clone().advance(&block, &mut NoTap)?;
        let mut hidden = hidden.clone();
        let started = Instant::now();
        hidden.advance(&block, &mut NoTap)?;
        let seconds = started.elapsed().as_secs_f64();
        decoder.release(0);

        let config = decoder.config();
        let shape = |name| config.linear_shape(0, name);
        let linears = LinearName::ALL.into_iter().chain(LinearName::DELTA_NET);
        let weights: usize = linears.filter_map(shape).map(|[m, n]| m * n).sum();
        let weights = weights.max(1) as f64;
        // Before the MLP stands attention or a delta net.
        let input = |names: &[LinearName]| {
            let shape = names.iter().find_map(|&name| shape(name));
            shape.map_or(0.0, |[_, n]| n as f64)
        };
        let layers = config.layers() as f64;
        let head = (config.vocab * config.hidden) as f64 / weights;
        Ok(Self {
            layers,
            load,
            token: seconds / tokens * (layers + head),
            rate: 2.0 * weights * tokens / seconds,
            inputs: [
                input(&[LinearName::Q, LinearName::DeltaQkv]),
                input(&[LinearName::O, LinearName::DeltaOut]),
                input(&[LinearName::Gate]),
                input(&[LinearName::Down]),
            ],
        })
    }

    /// Seconds for a pass of `tokens` through the model, block by block.
    pub(crate) fn pass(&self, tokens: usize) -> f64 {
        self.layers * self.load + self.token * tokens as f64
    }

    /// Seconds for tokens that run beside one another, one each at a time: products of few rows run at a third of the rate.
    pub(crate) fn decode(&self, tokens: usize) -> f64 {
        3.0 * self.token * tokens as f64
    }

    /// Halves of all blocks.
    pub(crate) fn sublayers(&self) -> usize {
        2 * self.layers as usize
    }

    /// Seconds to read and write all blocks once.
    pub(crate) fn copy(&self) -> f64 {
        2.0 * self.layers * self.load
    }

    /// Seconds to add up the Gram matrices of the inputs of o_proj and down_proj, or of all linears.
    pub(crate) fn grams(&self, tokens: usize, all: bool) -> f64 {
        let squares = |places: &[usize]| -> f64 {
            places
                .iter()
                .map(|&i| self.inputs[i] * self.inputs[i])
                .sum()
        };
        let places: &[usize] = if all { &[0, 1, 2, 3] } else { &[1, 3] };
        self.layers * tokens as f64 * squares(places) / self.rate
    }

    /// Seconds to factorise the Gram matrices of all inputs.
    pub(crate) fn solves(&self) -> f64 {
        let cubes: f64 = self.inputs.iter().map(|n| n * n * n).sum();
        self.layers * SOLVE * cubes / self.rate
    }
}

impl Settings {
    /// Says on stderr how long the run of `name` will take, where it is worth saying and anybody reads it. What fails while it
    /// is estimated is left to the run to say.
    pub(crate) fn expect(&self, name: &str, seconds: impl FnOnce() -> Result<f64>) {
        if self.quiet {
            return;
        }
        let Ok(seconds) = seconds() else {
            return;
        };
        if seconds >= WORTH_SAYING {
            let less = match self.cells.are_kept() {
                true => ", less what --cells has and other parts measure",
                false => "",
            };
            eprintln!("{name}: {}{less}", about(seconds));
        }
    }
}

/// A time that is not known well: `about 40 seconds`, `about 7 minutes`, `about 3 hours`.
pub(crate) fn about(seconds: f64) -> String {
    let (number, unit) = match seconds {
        s if s < 55.0 => (10.0 * (s / 10.0).round().max(1.0), "second"),
        s if s < 5400.0 => ((s / 60.0).round().max(1.0), "minute"),
        s => ((s / 3600.0).round(), "hour"),
    };
    let plural = if number == 1.0 { "" } else { "s" };
    format!("about {number} {unit}{plural}")
}

/// What is left of `total` steps of which `done` took `elapsed` seconds; nothing where that is too early to tell or not worth
/// saying.
pub(crate) fn left(elapsed: f64, done: u64, total: u64) -> Option<String> {
    let early = done == 0 || elapsed < 5.0;
    let left = elapsed * total.saturating_sub(done) as f64 / done.max(1) as f64;
    (!early && left >= WORTH_SAYING).then(|| about(left))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rounded_to_what_is_known_of_them() {
        for (seconds, text) in [
            (3.0, "about 10 seconds"),
            (44.0, "about 40 seconds"),
            (61.0, "about 1 minute"),
            (640.0, "about 11 minutes"),
            (5_500.0, "about 2 hours"),
            (40_000.0, "about 11 hours"),
        ] {
            assert_eq!(about(seconds), text);
        }
    }

    #[test]
    fn what_is_left_follows_from_what_is_done_once_that_tells_anything() {
        assert_eq!(left(60.0, 1, 11).as_deref(), Some("about 10 minutes"));
        assert_eq!(left(60.0, 0, 11), None);
        assert_eq!(left(2.0, 1, 1000), None);
        assert_eq!(left(60.0, 10, 11), None);
        assert_eq!(left(60.0, 11, 11), None);
    }

    #[test]
    fn work_adds_up() {
        let probe = Probe {
            layers: 2.0,
            load: 1.0,
            token: 0.5,
            rate: 10.0,
            inputs: [1.0, 2.0, 3.0, 4.0],
        };
        assert_eq!(probe.pass(4), 4.0);
        assert_eq!(probe.decode(4), 6.0);
        assert_eq!(probe.copy(), 4.0);
        assert_eq!(probe.grams(5, false), 2.0 * 5.0 * 20.0 / 10.0);
        assert_eq!(probe.grams(5, true), 2.0 * 5.0 * 30.0 / 10.0);
        assert_eq!(probe.solves(), 2.0 * 36.0 * 100.0 / 10.0);
    }
}
