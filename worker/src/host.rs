//! What this machine has left.

/// Bytes of memory that can still be used, by the kernel and by the container's limit.
///
/// # Errors
/// A sentence, where the kernel does not say.
pub(crate) fn available_memory() -> Result<u64, String> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").map_err(|error| format!("/proc/meminfo: {error}"))?;
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .ok_or("/proc/meminfo does not say what is available")?;
    Ok(available.min(cgroup_room().unwrap_or(u64::MAX)))
}

/// Bytes the container may still use, where it has a limit: the host's numbers do not know it.
fn cgroup_room() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = read("/sys/fs/cgroup/memory.max").or_else(|| read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))?;
    let used = read("/sys/fs/cgroup/memory.current").or_else(|| read("/sys/fs/cgroup/memory/memory.usage_in_bytes"))?;
    // The page cache counts as used but gives way.
    let stat = std::fs::read_to_string("/sys/fs/cgroup/memory.stat")
        .or_else(|_| std::fs::read_to_string("/sys/fs/cgroup/memory/memory.stat"))
        .unwrap_or_default();
    let cached = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .unwrap_or(0);
    Some(limit.saturating_sub(used).saturating_add(cached))
}
