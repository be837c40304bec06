//! Windows to calibrate on, and others to hold out.

use anyhow::{Result, ensure};
use causal_lm::Windows;

/// `calibration` windows drawn with `seed`, and at most `held_out` of the others, also those drawn; fewer calibrate where
/// the text is short.
pub(super) fn split(
    windows: &Windows,
    (calibration, held_out): (usize, usize),
    seed: u64,
) -> Result<(Windows, Windows)> {
    let count = windows.count();
    let calibration = calibration.min(count.saturating_sub(held_out));
    ensure!(
        calibration > 0,
        "windows of the text: {count}; {held_out} that are held out leave none to calibrate on"
    );
    let calibration = windows.sample(calibration, seed);
    // A window that repeats one to calibrate on is not unseen.
    let others = windows.without(&calibration);
    ensure!(
        others.count() > 0,
        "all windows of the text are the same: none is left to hold out"
    );
    Ok((calibration, others.sample(held_out, seed)))
}

/// `count` windows to compare whole models on, drawn from those that `calibration` does not have: what is refitted on the
/// windows that it is judged by looks better than it is, most where a refit has many columns. Where the text has fewer others,
/// all of them and some of the calibration's.
pub(super) fn compared(
    windows: &Windows,
    calibration: &Windows,
    count: usize,
    seed: u64,
) -> Windows {
    let others = windows.without(calibration);
    let missing = count.saturating_sub(others.count());
    if missing == 0 {
        return others.sample(count, seed);
    }
    let fitted = windows.without(&others);
    let left_out = fitted.without(&fitted.sample(missing, seed));
    windows.without(&left_out)
}

/// How many windows models are compared on, and how many of them something was fitted to.
pub(super) fn describe(compared: &Windows, calibration: &Windows) -> String {
    let count = compared.count();
    match count - compared.without(calibration).count() {
        0 => format!("{count}, none calibrated on"),
        fitted => format!("{count}, {fitted} calibrated on"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn calibration_and_held_out_windows_are_disjoint_and_drawn() {
        let text: Vec<u32> = (0..400).collect();
        let windows = Windows::cut(&text, 10, None).unwrap();
        let (calibration, held_out) = split(&windows, (20, 5), 3).unwrap();
        assert_eq!((calibration.count(), held_out.count()), (20, 5));
        assert_eq!(calibration, windows.sample(20, 3));
        let seen: HashSet<&[u32]> = calibration.iter().collect();
        assert!(held_out.iter().all(|window| !seen.contains(window)));
    }

    #[test]
    fn models_are_compared_on_windows_that_nothing_was_fitted_to() {
        let text: Vec<u32> = (0..400).collect();
        let windows = Windows::cut(&text, 10, None).unwrap();
        let calibration = windows.sample(20, 3);
        let seen: HashSet<&[u32]> = calibration.iter().collect();
        let unseen = compared(&windows, &calibration, 20, 3);
        assert_eq!(unseen.count(), 20);
        assert!(unseen.iter().all(|window| !seen.contains(window)));
        assert_eq!(describe(&unseen, &calibration), "20, none calibrated on");
        // 20 others and six that are calibrated on.
        let all = windows.count();
        assert_eq!(all, 40);
        let filled = compared(&windows, &calibration, 26, 3);
        assert_eq!(describe(&filled, &calibration), "26, 6 calibrated on");
        let seen = compared(&windows, &windows, 8, 3);
        assert_eq!(seen, windows.sample(8, 3));
        assert_eq!(describe(&seen, &windows), "8, 8 calibrated on");
        assert_eq!(compared(&windows, &calibration, 100, 3), windows);
    }

    #[test]
    fn a_short_text_calibrates_on_what_is_not_held_out() {
        let text: Vec<u32> = (0..40).collect();
        let windows = Windows::cut(&text, 10, None).unwrap();
        let (calibration, held_out) = split(&windows, (128, 1), 0).unwrap();
        assert_eq!((calibration.count(), held_out.count()), (3, 1));
        assert!(split(&windows, (128, 4), 0).is_err());
        let same = Windows::cut(&[7; 40], 10, None).unwrap();
        assert!(split(&same, (2, 1), 0).is_err());
    }
}
