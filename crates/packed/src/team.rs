//! Threads for regions of a few microseconds.
//!
//! A product of one token takes less time than waking a sleeping thread. Workers therefore wait for the next region for a
//! short while before they sleep, and a region does not wait for workers that have not begun: the caller does all work
//! that is not yet claimed, so a worker that the system has put aside delays a region by one claim, not by its share.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a worker waits for the next region before it sleeps.
const PATIENCE: Duration = Duration::from_micros(50);
/// Checks between two looks at the clock.
const CHECKS: usize = 64;
/// Checks of a caller that waits for workers before it lets others run on its processor.
const CALLER_CHECKS: usize = 4096;

type Job<'a> = dyn Fn() + Sync + 'a;

/// The caller and some workers.
#[derive(Debug)]
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the caller of the region that runs.
    region: Mutex<()>,
}

/// Bit of [`Shared::gate`] that is set while workers may enter.
const OPEN: usize = 1 << (usize::BITS - 1);

#[derive(Debug)]
struct Shared {
    /// Number of regions begun.
    regions: AtomicUsize,
    /// [`OPEN`], and the number of workers that are in the region.
    gate: AtomicUsize,
    /// What the region does; valid while the gate is open or workers are inside.
    job: UnsafeCell<Option<JobPointer>>,
    /// Workers that sleep or are about to.
    sleepers: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct JobPointer(*const Job<'static>);

impl std::fmt::Debug for JobPointer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("job")
    }
}

// SAFETY: the pointer refers to a closure that is `Sync`, and it is used while the closure lives (see `Team::run`).
unsafe impl Send for JobPointer {}
// SAFETY: `job` is written by the one caller that holds `Team::region`, while the gate is closed and nobody is inside; it
// is read by workers inside. Entering (acquire) comes after opening (release), and closing waits for all to leave.
unsafe impl Sync for Shared {}

impl Team {
    /// A team of `threads`, the caller included.
    ///
    /// # Panics
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            regions: AtomicUsize::new(0),
            gate: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            sleepers: AtomicUsize::new(0),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let worker = |index| {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name(format!("packed-{index}"))
                .spawn(move || shared.work())
                .expect("a thread")
        };
        Self {
            workers: (1..threads).map(worker).collect(),
            shared,
            region: Mutex::new(()),
        }
    }

    /// The team of the process, with as many threads as rayon's pool had when it was first asked for.
    pub fn global() -> &'static Self {
        static GLOBAL: OnceLock<Team> = OnceLock::new();
        GLOBAL.get_or_init(|| Self::new(rayon::current_num_threads()))
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job` on the calling thread, and at the same time on those workers that come before it is done. `job` takes its
    /// work from a shared counter, so that any number of threads does all of it.
    ///
    /// A call while another thread's region runs, and one from within a region, runs on the calling thread alone.
    ///
    /// # Panics
    /// When `job` does.
    pub fn run(&self, job: &Job<'_>) {
        if self.workers.is_empty() {
            return job();
        }
        let region = match self.region.try_lock() {
            Ok(region) => region,
            // A job that panicked leaves nothing half done.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return job(),
        };
        let shared = &*self.shared;
        *shared.panic() = None;
        // SAFETY: only the lifetime changes. No worker uses the pointer after this function: it is read inside the gate
        // only, and `Close`, which is dropped before the function returns or unwinds, closes the gate and waits until
        // nobody is inside.
        let pointer = JobPointer(unsafe {
            std::mem::transmute::<*const Job<'_>, *const Job<'static>>(std::ptr::from_ref(job))
        });
        // SAFETY: the gate is closed and nobody is inside, and `region` keeps other callers away.
        unsafe { *shared.job.get() = Some(pointer) };
        {
            let _close = Close(shared);
            shared.gate.store(OPEN, Ordering::Release);
            shared.regions.fetch_add(1, Ordering::SeqCst);
            if shared.sleepers.load(Ordering::SeqCst) > 0 {
                for worker in &self.workers {
                    worker.thread().unpark();
                }
            }
            job();
        }
        let panic = shared.panic().take();
        drop(region);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Closes the gate and waits for those inside.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut checks = 0;
        while self.0.gate.load(Ordering::Acquire) != 0 {
            checks += 1;
            match checks < CALLER_CHECKS {
                true => spin_loop(),
                false => thread::yield_now(),
            }
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.regions.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches panics of jobs, so it ends by itself.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut seen = 0;
        loop {
            seen = self.next_region(seen);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            if self.enter() {
                // SAFETY: inside the gate the job is set and lives.
                let job = unsafe { (*self.job.get()).map(|pointer| &*pointer.0) };
                let result = catch_unwind(AssertUnwindSafe(|| job.map(|job| job())));
                if let Err(panic) = result {
                    *self.panic() = Some(panic);
                }
                self.gate.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// What a worker's job panicked with.
    fn panic(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.panic
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits until more regions than `seen` have begun, and returns their number.
    fn next_region(&self, seen: usize) -> usize {
        let started = Instant::now();
        loop {
            for _ in 0..CHECKS {
                let regions = self.regions.load(Ordering::Acquire);
                if regions != seen {
                    return regions;
                }
                spin_loop();
            }
            if started.elapsed() > PATIENCE {
                break;
            }
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let regions = loop {
            // Either this sees the new region, or its caller sees the sleeper and wakes it.
            let regions = self.regions.load(Ordering::SeqCst);
            if regions != seen {
                break regions;
            }
            thread::park();
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        regions
    }

    /// Enters the region if it is still open.
    fn enter(&self) -> bool {
        let enter = |gate| (gate & OPEN != 0).then_some(gate + 1);
        self.gate
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, enter)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Output;

    /// Counts `work` in a region.
    fn count(team: &Team, work: usize) -> usize {
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        team.run(&|| {
            while next.fetch_add(1, Ordering::Relaxed) < work {
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        done.into_inner()
    }

    #[test]
    fn all_work_of_a_region_is_done_when_it_returns() {
        for threads in [1, 2, 5] {
            let team = Team::new(threads);
            assert_eq!(team.threads(), threads);
            for work in 0..200 {
                assert_eq!(count(&team, work), work);
            }
        }
    }

    #[test]
    fn nobody_is_in_a_region_that_has_returned_and_what_was_written_there_is_seen() {
        // Fewer under Miri, which looks at every access.
        let rounds = if cfg!(miri) { 40 } else { 20_000 };
        let team = Team::new(4);
        for round in 0..rounds {
            // Memory of this round alone, of a size of its own, that threads write without locks.
            let (tokens, rows) = (1 + round % 3, 16 * (1 + round % 5) + round % 16);
            let mut values = vec![-1.0f32; tokens * rows];
            let inside = AtomicUsize::new(0);
            let output = Output::new(&mut values, tokens, rows, 1);
            team.run(&|| {
                inside.fetch_add(1, Ordering::SeqCst);
                while let Some(mut claim) = output.claim() {
                    for tile in claim.tiles() {
                        for token in 0..tokens {
                            claim.part(tile, token).fill(round as f32);
                        }
                    }
                }
                inside.fetch_sub(1, Ordering::SeqCst);
            });
            assert_eq!(inside.load(Ordering::SeqCst), 0, "round {round}");
            assert!(
                values.iter().all(|value| *value == round as f32),
                "round {round}"
            );
            // Workers that wait, that are about to sleep and that sleep.
            match round % 128 {
                0 => thread::sleep(2 * PATIENCE),
                1 => thread::sleep(PATIENCE),
                2..8 => thread::yield_now(),
                _ => {}
            }
        }
    }

    #[test]
    fn a_region_runs_after_workers_have_fallen_asleep() {
        let team = Team::new(2);
        for _ in 0..3 {
            thread::sleep(4 * PATIENCE);
            assert_eq!(count(&team, 1000), 1000);
        }
    }

    #[test]
    fn regions_within_regions_and_of_several_callers_do_not_block() {
        let team = Team::new(3);
        let total = AtomicUsize::new(0);
        team.run(&|| {
            total.fetch_add(count(&team, 10), Ordering::Relaxed);
        });
        assert!(total.load(Ordering::Relaxed) >= 10);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for work in 0..100 {
                        assert_eq!(count(&team, work), work);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_of_a_job_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2);
        for _ in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| team.run(&|| panic!("job"))));
            assert!(result.is_err());
            assert_eq!(count(&team, 50), 50);
        }
    }
}
