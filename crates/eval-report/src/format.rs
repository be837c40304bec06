//! Numbers for people to read, the same on the terminal, in Markdown and in HTML.

/// Shown in a cell that was not measured.
pub const ABSENT: &str = "–";

/// `12,345,678`
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 token`, `2,048 tokens`
pub fn counted(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", count(number as u64))
}

/// `12.34 MiB`
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut scaled = value as f64 / 1024.0;
    if scaled < 1.0 {
        return format!("{value} B");
    }
    let mut unit = 0;
    while scaled >= 1024.0 {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.2} {}", UNITS[unit])
}

/// Fixed decimals with thousands separators; scientific where fixed decimals would say nothing.
pub fn real(value: f64, decimals: usize) -> String {
    let smallest = 0.5 * 10f64.powi(-(decimals as i32));
    if !value.is_finite() {
        return value.to_string();
    }
    if value.abs() >= 1e7 || (value != 0.0 && value.abs() < smallest) {
        return format!("{value:.2e}");
    }
    let fixed = format!("{value:.decimals$}");
    let digits = fixed.trim_start_matches('-');
    let (whole, fraction) = digits
        .split_once('.')
        .map_or((digits, None), |(w, f)| (w, Some(f)));
    let mut out = String::from(if fixed.starts_with('-') { "-" } else { "" });
    out += &whole.parse().map_or_else(|_| whole.to_owned(), count);
    if let Some(fraction) = fraction {
        out.push('.');
        out += fraction;
    }
    out
}

/// A fraction in [0, 1] as `12.3 %`.
pub fn percent(share: f64) -> String {
    format!("{} %", real(100.0 * share, 1))
}

/// A quotient as `1.23×`.
pub fn times(quotient: f64) -> String {
    format!("{}×", real(quotient, 2))
}

/// `0.123 s`, `12.3 s`, `2m 05s`, `1h 02m`.
pub fn seconds(value: f64) -> String {
    let whole = value.round().max(0.0) as u64;
    match value {
        v if v < 1.0 => format!("{v:.3} s"),
        v if v < 99.95 => format!("{v:.1} s"),
        _ if whole < 3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        _ => format!("{}h {:02}m", whole / 3600, whole % 3600 / 60),
    }
}

/// The label of an axis tick: as few digits as tell it, `20k`, `1.5M`.
pub fn tick(value: f64) -> String {
    let (scaled, suffix) = match value.abs() {
        v if v >= 1e12 || (v != 0.0 && v < 1e-4) => return format!("{value:.0e}"),
        v if v >= 1e9 => (value / 1e9, "G"),
        v if v >= 1e6 => (value / 1e6, "M"),
        v if v >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let rounded = format!("{scaled:.6}");
    format!(
        "{}{suffix}",
        rounded.trim_end_matches('0').trim_end_matches('.')
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reals_keep_their_decimals_and_get_separators() {
        assert_eq!(real(12.3456, 3), "12.346");
        assert_eq!(real(1234567.5, 1), "1,234,567.5");
        assert_eq!(real(-1234.0, 0), "-1,234");
        assert_eq!(real(999.9996, 3), "1,000.000");
        assert_eq!(real(0.0, 3), "0.000");
        assert_eq!(
            real(0.00001, 3),
            "1.00e-5",
            "a small number is not shown as zero"
        );
        assert_eq!(real(2.5e9, 3), "2.50e9");
    }

    #[test]
    fn bytes_and_counts_carry_units_and_separators() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(3 << 20), "3.00 MiB");
        assert_eq!(bytes(u64::MAX), "16.00 EiB");
        assert_eq!([0, 999, 1000].map(count), ["0", "999", "1,000"]);
        let tokens = [0, 1, 2048].map(|number| counted(number, "token"));
        assert_eq!(tokens, ["0 tokens", "1 token", "2,048 tokens"]);
        assert_eq!(bytes(5 << 29), "2.50 GiB");
        assert_eq!(count(1_234_567), "1,234,567");
    }

    #[test]
    fn durations_change_unit_where_people_do() {
        assert_eq!(seconds(0.0421), "0.042 s");
        assert_eq!(seconds(12.34), "12.3 s");
        assert_eq!(seconds(125.0), "2m 05s");
        assert_eq!(seconds(3725.0), "1h 02m");
    }

    #[test]
    fn ticks_have_no_trailing_zeros() {
        assert_eq!(tick(0.30000000000000004), "0.3");
        assert_eq!(tick(20.0), "20");
        assert_eq!(tick(20_000.0), "20k");
        assert_eq!(tick(1_500_000.0), "1.5M");
        assert_eq!(tick(0.0), "0");
    }
}
