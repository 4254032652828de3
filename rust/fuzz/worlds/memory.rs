//! The memory that a run takes, counted: a peer's few bytes must not take much.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use skyward_lite::timing::{CREDIT, NOTE_CREDIT};

/// Memory that a run may take beside what its bytes account for: the credits of results and notes, for which a peer may
/// declare more than it sends, and what the world itself is made of.
const FIXED_BYTES: usize = CREDIT + NOTE_CREDIT + (32 << 20);
/// Bytes of memory for each byte of the script: lz4 makes 255 of one, and an event takes more than its frame.
const BYTES_PER_BYTE: usize = 4096;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(at, layout) }
    }
}

/// Run something on a script of so many bytes.
///
/// # Panics
/// If it took more memory than a script of this length may.
pub fn bounded(bytes: usize, run: impl FnOnce()) {
    let before = NOW.load(Relaxed);
    MOST.store(before, Relaxed);
    run();
    let most = MOST.load(Relaxed).saturating_sub(before);
    assert!(most <= FIXED_BYTES + bytes * BYTES_PER_BYTE, "{bytes} bytes took {most} bytes of memory");
}
