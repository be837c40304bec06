//! Time and peak memory of the work behind a row.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::row::{MemoryScope, Row};

/// Largest peak that each running stopwatch has seen, by its number.
///
/// The kernel keeps one peak for the whole process. A stopwatch that resets it would take the peak away from those that
/// were started before, so it hands them what was reached first.
static RUNNING: Mutex<Running> = Mutex::new(Running {
    next: 0,
    peaks: BTreeMap::new(),
});

struct Running {
    next: u64,
    peaks: BTreeMap<u64, u64>,
}

fn running() -> MutexGuard<'static, Running> {
    // Numbers stay right whatever panicked while it held them.
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Measures one row: wall time and peak resident memory. Stopwatches may be nested.
///
/// On Linux the peak is that of the row alone. Where the system does not let a process reset its peak, it is that of the
/// process so far, and [`Row::peak_rss_scope`] says so. Other systems than Linux report none.
#[derive(Debug)]
pub struct Stopwatch {
    number: u64,
    scope: MemoryScope,
    started: Instant,
}

impl Stopwatch {
    /// Start the clock and reset the peak.
    pub fn start() -> Self {
        let mut running = running();
        let before = peak_rss_bytes().unwrap_or(0);
        let scope = match reset_peak_rss() {
            true => MemoryScope::Row,
            false => MemoryScope::Process,
        };
        if scope == MemoryScope::Row {
            for peak in running.peaks.values_mut() {
                *peak = before.max(*peak);
            }
        }
        let number = running.next;
        running.next += 1;
        running.peaks.insert(number, 0);
        Stopwatch {
            number,
            scope,
            started: Instant::now(),
        }
    }

    /// Fill `seconds`, `peak_rss_bytes` and `peak_rss_scope` of `row`.
    pub fn stop(self, row: &mut Row) {
        row.seconds = self.started.elapsed().as_secs_f64();
        let earlier = running().peaks.get(&self.number).copied().unwrap_or(0);
        row.peak_rss_bytes = peak_rss_bytes().map(|peak| peak.max(earlier));
        row.peak_rss_scope = match row.peak_rss_bytes {
            Some(_) => self.scope,
            None => MemoryScope::default(),
        };
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        running().peaks.remove(&self.number);
    }
}

/// Peak resident set size of this process since the last reset, in bytes, pages of mapped files included; Linux only.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Set the peak back to what is resident now; false where the system does not offer it.
fn reset_peak_rss() -> bool {
    // "5" is the kernel's code for resetting the high-water mark (Linux 4.0 and later). The file must not be created.
    std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/clear_refs")
        .and_then(|mut file| std::io::Write::write_all(&mut file, b"5"))
        .is_ok()
}

// Other systems report no peak.
#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const BIG: usize = 256 << 20;

    /// One test at a time uses much memory.
    static ALONE: Mutex<()> = Mutex::new(());

    fn alone() -> MutexGuard<'static, ()> {
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn use_memory() {
        let block = vec![1u8; BIG];
        assert_eq!(std::hint::black_box(&block)[BIG / 2], 1);
    }

    fn measure(work: impl FnOnce()) -> Row {
        let watch = Stopwatch::start();
        work();
        let mut row = Row::new("test", "test");
        watch.stop(&mut row);
        row
    }

    #[test]
    fn a_row_has_its_own_peak_or_says_that_it_is_the_process_s() {
        let _alone = alone();
        let (big, small) = (measure(use_memory), measure(|| ()));
        let peak = big.peak_rss_bytes.unwrap();
        let later = small.peak_rss_bytes.unwrap();
        match small.peak_rss_scope {
            MemoryScope::Row => assert!(peak >= later + BIG as u64 / 2, "{peak} {later}"),
            MemoryScope::Process => assert!(later >= peak),
        }
    }

    #[test]
    fn a_row_has_the_peak_of_the_rows_measured_within_it() {
        let _alone = alone();
        let mut inner = Row::new("test", "inner");
        let outer = measure(|| {
            use_memory();
            inner = measure(|| ());
        });
        let outer = outer.peak_rss_bytes.unwrap();
        let inner = inner.peak_rss_bytes.unwrap();
        assert!(outer >= inner && outer >= BIG as u64, "{outer} {inner}");
    }
}
