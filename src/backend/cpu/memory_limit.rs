//! How much memory this process may use.

use std::fs;
use std::path::{Path, PathBuf};

use super::memory::physical_memory;

/// Bytes: the machine's memory, or less where a control group (a container) sets a limit.
pub(crate) fn memory_limit() -> Option<usize> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups).into_iter().filter_map(|file| read_limit(&file));
    physical_memory().into_iter().chain(limits).min()
}

/// The files that may hold a limit, for a process whose `/proc/self/cgroup` reads `groups`: those of
/// version 2 for its group and all above it, and that of version 1.
fn limit_files(groups: &str) -> Vec<PathBuf> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let above = Path::new(own).ancestors();
    let mut files: Vec<PathBuf> =
        above.map(|group| Path::new("/sys/fs/cgroup").join(group).join("memory.max")).collect();
    files.push("/sys/fs/cgroup/memory/memory.limit_in_bytes".into());
    files
}

/// `None` for no such file and for `max`.
fn read_limit(file: &Path) -> Option<usize> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_looked_up_in_all_groups_above() {
        let files = limit_files("1:name=systemd:/x\n0::/system.slice/app.service\n");
        let names: Vec<&str> = files.iter().filter_map(|file| file.to_str()).collect();
        let expect = [
            "/sys/fs/cgroup/system.slice/app.service/memory.max",
            "/sys/fs/cgroup/system.slice/memory.max",
            "/sys/fs/cgroup/memory.max",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        ];
        assert_eq!(names, expect);
        assert_eq!(limit_files("").len(), 2);
    }
}
