//! Leases, by the clock of the node that goes on while the machine is suspended.
//!
//! [`std::time::Instant`] stands still while a virtual machine is paused or a laptop sleeps. A node that slept for longer
//! than its lease has been given up by its client meanwhile, and must end its tasks as soon as it wakes.

use std::ops::Add;
use std::sync::Mutex;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::locks::lock;

/// The clock that counts the time in which the machine is suspended as well.
#[cfg(target_os = "linux")]
const CLOCK: ClockId = ClockId::Boottime;
/// See above. On macOS this one goes on.
#[cfg(not(target_os = "linux"))]
const CLOCK: ClockId = ClockId::Monotonic;

/// A moment, counted from the machine's start. All processes of a machine count alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

impl BootTime {
    #[must_use]
    pub fn now() -> Self {
        let time = clock_gettime(CLOCK);
        Self(Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0)))
    }

    /// Return the moment that is so many milliseconds after the machine's start.
    #[must_use]
    pub fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// Return how many milliseconds after the machine's start this is.
    #[must_use]
    pub fn millis(self) -> u64 {
        self.0.as_millis().try_into().unwrap_or(u64::MAX)
    }

    /// Return how long after `earlier` this is; nothing if it is before.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Return how long before this moment `now` is; nothing if it is later.
    #[must_use]
    pub fn left(self, now: Self) -> Duration {
        self.0.saturating_sub(now.0)
    }
}

impl Add<Duration> for BootTime {
    type Output = Self;

    fn add(self, length: Duration) -> Self {
        Self(self.0.saturating_add(length))
    }
}

/// How long a process may go on without another word.
#[derive(Debug)]
pub struct Lease {
    /// Set anew by each word of the peer.
    end: Mutex<BootTime>,
    now: fn() -> BootTime,
}

impl Lease {
    /// Begin a lease of this length.
    #[must_use]
    pub fn new(length: Duration) -> Self {
        Self::counting(length, BootTime::now)
    }

    fn counting(length: Duration, now: fn() -> BootTime) -> Self {
        Self { end: Mutex::new(now() + length), now }
    }

    /// Let the lease end so long from now.
    pub fn renew(&self, length: Duration) {
        *lock(&self.end) = (self.now)() + length;
    }

    /// Return how long the lease goes on; nothing if it is over.
    #[must_use]
    pub fn left(&self) -> Duration {
        lock(&self.end).left((self.now)())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    static CLOCK_MILLIS: AtomicU64 = AtomicU64::new(1000);

    /// A lease is over as soon as the machine wakes that slept for longer, and can be renewed before its end.
    #[test]
    fn a_lease_goes_on_while_the_machine_sleeps() {
        let seconds = Duration::from_secs;
        let lease = Lease::counting(seconds(60), || BootTime::from_millis(CLOCK_MILLIS.load(Ordering::Relaxed)));
        let sleep = |length: u64| CLOCK_MILLIS.fetch_add(length * 1000, Ordering::Relaxed);
        sleep(59);
        assert_eq!(lease.left(), seconds(1));
        lease.renew(seconds(60));
        assert_eq!(lease.left(), seconds(60));
        sleep(3600);
        assert_eq!(lease.left(), Duration::ZERO);
    }

    /// The clock goes on, is never behind the one that stands still meanwhile, and is what its milliseconds say.
    #[test]
    fn boot_time_counts_at_least_what_instants_count() {
        let (before, began) = (BootTime::now(), std::time::Instant::now());
        std::thread::sleep(Duration::from_millis(5));
        let passed = began.elapsed();
        let after = BootTime::now();
        assert!(after.left(before) >= passed && before.left(after) == Duration::ZERO);
        assert!(BootTime::from_millis(after.millis()) <= after && BootTime::from_millis(u64::MAX).millis() == u64::MAX);
        assert_eq!(BootTime::from_millis(u64::MAX) + Duration::MAX, BootTime(Duration::MAX));
    }
}
