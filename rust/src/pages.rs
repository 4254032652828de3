//! Memory for large buffers: in huge pages where the system has them, and freed where nothing waits for it.
//!
//! The kernel hands out a fresh page of 4 KiB at a time, which for a large buffer takes longer than filling it: 2 GB/s
//! were measured for a copy into fresh memory, and 7 to 14 GB/s with pages of 2 MiB.

// `madvise` is unsafe by nature; its use says why it is sound.
#![allow(unsafe_code)]

/// Buffers of fewer bytes have too few huge pages in them.
#[cfg(target_os = "linux")]
const MIN_ADVISED_BYTES: usize = 4 * 1024 * 1024;
/// Bytes of a page, or of several: advice is for whole pages.
#[cfg(target_os = "linux")]
const PAGE_BYTES: usize = 64 * 1024;

/// Ask for huge pages for the part of a buffer's memory that is not in use yet. A request: without them all works, too.
pub fn prefer_huge(buffer: &mut Vec<u8>) {
    #[cfg(target_os = "linux")]
    {
        let spare = buffer.spare_capacity_mut();
        let skipped = spare.as_ptr().align_offset(PAGE_BYTES);
        let Some(whole) = spare.get_mut(skipped..).filter(|whole| whole.len() >= MIN_ADVISED_BYTES) else { return };
        let len = whole.len() - whole.len() % PAGE_BYTES;
        // SAFETY: the range lies within this buffer's own memory, and the advice does not change what is in it.
        let _ = unsafe { rustix::mm::madvise(whole.as_mut_ptr().cast(), len, rustix::mm::Advice::LinuxHugepage) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = buffer;
}

/// Memory of fewer bytes is freed at once: that takes less than a small task may have to wait.
const FREED_ASIDE_BYTES: usize = 16 * 1024 * 1024;

/// Free what holds so many bytes of memory. Large memory is freed by a thread of its own, because the kernel takes some 0.2 s for
/// a GB: so long the caller's thread would send no heartbeat, and no small task would pass.
pub fn free_aside<T: Send + 'static>(size: usize, held: T) {
    if size >= FREED_ASIDE_BYTES {
        // If no thread can be started, the memory is freed here.
        drop(std::thread::Builder::new().name("skyward-free".to_owned()).spawn(move || drop(held)));
    }
}

#[cfg(test)]
mod tests {
    use super::prefer_huge;

    #[test]
    fn what_is_in_the_buffer_stays() {
        for capacity in [0, 1, 5 << 20, 64 << 20] {
            let mut buffer = Vec::with_capacity(capacity);
            buffer.extend((0..capacity.min(100_000)).map(|i| i.to_le_bytes()[0]));
            let before = buffer.clone();
            prefer_huge(&mut buffer);
            assert_eq!(buffer, before);
            buffer.resize(capacity, 7);
            assert_eq!(buffer.get(..before.len()), Some(&before[..]));
        }
    }
}
