//! Processes as `/proc` shows them. Elsewhere than on Linux nothing is found.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::process::Pid;

/// When a process started. Together with its id it identifies a process: another process with the id has another start time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StartTime {
    /// In clock ticks since the boot of the machine.
    ticks: u64,
    /// The id of that boot.
    boot: String,
}

/// A process that has not been reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    /// The process has ended, and its parent has not read its status.
    pub is_zombie: bool,
    /// The id of its session, which is that of the process that created the session.
    pub session: i32,
    ticks: u64,
}

/// Returns the state of a process; `None` if there is none with this id.
pub(super) fn stat(pid: Pid) -> Option<Stat> {
    parse(&fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?)
}

/// Parses `/proc/<pid>/stat` (proc_pid_stat(5)). The second field is the name in parentheses, which may contain any character.
fn parse(text: &str) -> Option<Stat> {
    let (_, fields) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    Some(Stat {
        is_zombie: matches!(*fields.first()?, "Z" | "X"),
        session: fields.get(3)?.parse().ok()?,
        ticks: fields.get(19)?.parse().ok()?,
    })
}

/// Returns when this process started; `None` if there is no process with this id.
pub(super) fn start_time(pid: Pid) -> Option<StartTime> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
    Some(StartTime { ticks: stat(pid)?.ticks, boot })
}

/// Writes which process this is.
pub(super) fn write_start(path: &Path, pid: Pid, started: &StartTime) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path)?;
    writeln!(file, "{} {} {}", pid.as_raw_nonzero(), started.ticks, started.boot)
}

/// Reads what [`write_start`] has written.
pub(super) fn read_start(path: &Path) -> Option<(Pid, StartTime)> {
    let text = fs::read_to_string(path).ok()?;
    let mut words = text.split_whitespace();
    let pid = Pid::from_raw(words.next()?.parse().ok()?)?;
    let ticks = words.next()?.parse().ok()?;
    Some((pid, StartTime { ticks, boot: words.next()?.to_owned() }))
}

/// The ids of all processes.
pub(super) fn all() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_contain_anything() {
        let fields = "S 1 7 5 0 -1 4194560 1 0 0 0 2 3 0 0 20 0 1 0 987654 1 2";
        let found = parse(&format!("7 (a) R (b) {fields}"));
        assert_eq!(found, Some(Stat { is_zombie: false, session: 5, ticks: 987_654 }));
        assert_eq!(parse(&format!("7 (x) {}", fields.replace('S', "Z"))).map(|stat| stat.is_zombie), Some(true));
        assert_eq!(parse("7 (x) S 1 7"), None);
        assert_eq!(parse(""), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_is_known_by_its_id_and_start_time() {
        let path = std::env::temp_dir().join(crate::id::new_sandbox_id());
        let own = rustix::process::getpid();
        let started = start_time(own).expect("it runs");
        write_start(&path, own, &started).expect("written");
        assert_eq!(read_start(&path), Some((own, started.clone())));
        assert_ne!(start_time(Pid::INIT), Some(started));
        fs::write(&path, "12").expect("written");
        assert_eq!(read_start(&path), None);
        fs::remove_file(&path).expect("removed");
        assert!(all().any(|pid| pid == own));
    }
}
