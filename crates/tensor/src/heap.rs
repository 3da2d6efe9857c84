//! [`give_back_freed`]: memory that was freed, back to the system.

/// Gives the system the pages that the allocator keeps for later though nothing is in them. The GNU allocator keeps
/// what lay between pieces that live on, and as much again as the largest piece that was ever freed: after a vocabulary
/// of 262,144 tokens was read and compiled, some MB that would count beside the weights for as long as these are served.
///
/// For the end of a large piece of work: it walks through all that was freed.
pub fn give_back_freed() {
    // SAFETY: takes the allocator's own locks and touches no memory that is in use.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::*;

    /// Bytes of memory that are this process's alone.
    fn private_bytes() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    #[test]
    fn holes_between_living_pieces_go_back() {
        const PIECE: usize = 64 << 10;
        const N: usize = 1000;
        let mut pieces: Vec<Option<Vec<u8>>> = (0..N).map(|_| Some(vec![1; PIECE])).collect();
        // Every tenth lives on, so that no end of the heap is free.
        pieces.iter_mut().enumerate().filter(|(i, _)| i % 10 > 0).for_each(|(_, piece)| *piece = None);
        let before = private_bytes();
        give_back_freed();
        let given_back = before.saturating_sub(private_bytes());
        assert!(given_back > N * PIECE / 2, "{given_back} of {} bytes", N * PIECE);
        assert!(pieces.iter().flatten().all(|piece| piece.iter().all(|&byte| byte == 1)));
    }
}
