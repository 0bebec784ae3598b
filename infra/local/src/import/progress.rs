//! How far an import is, for people: a bar on a terminal, else a line now and then.

use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a line is written.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Tells on standard error.
pub(super) enum Progress {
    Bar(ProgressBar),
    Lines { total: u64, last: Instant },
}

impl Progress {
    /// Looks now whether standard error is a terminal.
    pub(super) fn new(total: u64) -> Self {
        if !io::stderr().is_terminal() {
            return Self::Lines { total, last: Instant::now() };
        }
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} rows, {per_sec}, {eta} to go");
        Self::Bar(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    /// So many rows are settled.
    pub(super) fn tell(&mut self, settled: u64) {
        match self {
            Self::Bar(bar) => bar.set_position(settled),
            Self::Lines { total, last } => {
                if last.elapsed() >= LINE_EVERY {
                    *last = Instant::now();
                    eprintln!("{settled} of {total} rows");
                }
            }
        }
    }

    /// Leaves the terminal to others.
    pub(super) fn end(self) {
        if let Self::Bar(bar) = self {
            bar.abandon();
        }
    }
}
