//! Shows the progress of an import or a migration on standard error: a bar on a terminal, otherwise a line every few seconds.

use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const LINE_INTERVAL: Duration = Duration::from_secs(5);

pub(crate) enum Progress {
    Bar(ProgressBar),
    Lines { total: u64, last: Instant },
}

impl Progress {
    /// Checks once whether standard error is a terminal.
    pub(crate) fn new(total: u64) -> Self {
        if !io::stderr().is_terminal() {
            return Self::Lines { total, last: Instant::now() };
        }
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} rows, {per_sec}, {eta} to go");
        Self::Bar(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    /// Shows how many rows are settled.
    pub(crate) fn report(&mut self, settled: u64) {
        match self {
            Self::Bar(bar) => bar.set_position(settled),
            Self::Lines { total, last } => {
                if last.elapsed() >= LINE_INTERVAL {
                    *last = Instant::now();
                    eprintln!("{settled} of {total} rows");
                }
            }
        }
    }

    /// Ends the bar, so that other output can follow it.
    pub(crate) fn finish(self) {
        if let Self::Bar(bar) = self {
            bar.abandon();
        }
    }
}
