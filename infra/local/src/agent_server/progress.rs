//! Reports the progress of an install: the events, their display on a terminal, and their extraction from an installer's output.

use std::collections::HashSet;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Python;

const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// A step of an install.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Searching for a Python.
    Searching,
    Found(Python),
    /// Another process is installing into the same folder.
    Waiting,
    /// Installing. `line` describes the current activity; `done` and `of` count packages and are estimates.
    Installing {
        line: String,
        done: usize,
        of: usize,
    },
    /// Importing the installed packages to check that they work.
    Verifying,
    /// The agent server is installed, by this run or an earlier one.
    Done,
}

/// Receives the events of an install. Implementations should return quickly, because the install waits for them.
pub trait Progress: Send + Sync {
    fn report(&self, event: Event);
}

/// Ignores all events.
impl Progress for () {
    fn report(&self, _: Event) {}
}

impl<T: Progress + ?Sized> Progress for &T {
    fn report(&self, event: Event) {
        (**self).report(event);
    }
}

/// Shows progress on stderr: a bar on a terminal, otherwise a line every few seconds. Shows nothing if there is nothing to install.
pub struct Terminal {
    state: Mutex<TerminalState>,
}

struct TerminalState {
    /// `None` if stderr is not a terminal.
    bar: Option<ProgressBar>,
    plain: PlainLines,
    started: Option<Instant>,
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Terminal {
    /// Checks once whether stderr is a terminal.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(TerminalState {
                bar: io::stderr().is_terminal().then(new_bar),
                plain: PlainLines::default(),
                started: None,
            }),
        }
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(spinner_style());
    bar
}

fn spinner_style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {bar:30} {pos}/{len} {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Progress for Terminal {
    fn report(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        let duration = match (&event, state.started) {
            (Event::Done, started) => started.map(|started| started.elapsed()),
            (Event::Installing { .. } | Event::Waiting, None) => {
                state.started = Some(Instant::now());
                None
            }
            _ => None,
        };
        let Some(bar) = &state.bar else {
            if let Some(line) = state.plain.line(&event, duration, Instant::now()) {
                // If stderr is closed, the install continues without output.
                let _ = writeln!(io::stderr(), "{line}");
            }
            return;
        };
        match event {
            Event::Done => {
                bar.finish_and_clear();
                if let Some(duration) = duration {
                    let _ = writeln!(io::stderr(), "{}", ready(duration));
                }
            }
            Event::Installing { line, done, of } => {
                if bar.length() != Some(of as u64) {
                    bar.set_style(bar_style());
                    bar.set_length(of as u64);
                    bar.enable_steady_tick(Duration::from_millis(200));
                }
                bar.set_position(done as u64);
                bar.set_message(line);
            }
            other => {
                bar.unset_length();
                bar.set_style(spinner_style());
                bar.enable_steady_tick(Duration::from_millis(200));
                bar.set_message(describe(&other));
            }
        }
    }
}

fn ready(duration: Duration) -> String {
    format!("The agent server is ready ({} s)", duration.as_secs())
}

fn describe(event: &Event) -> String {
    match event {
        Event::Searching => "Searching for Python 3.12 or newer".to_owned(),
        Event::Found(python) => format!("Python {} ({})", python.version, python.path.display()),
        Event::Waiting => "Another process is installing the agent server; waiting for it".to_owned(),
        Event::Installing { line, done, of } => {
            format!("Installing the agent server ({done}/{of}): {line}")
        }
        Event::Verifying => "Checking the agent server".to_owned(),
        Event::Done => "The agent server is ready".to_owned(),
    }
}

/// Selects the lines to print where no bar can be drawn.
#[derive(Default)]
struct PlainLines {
    last: Option<Instant>,
}

impl PlainLines {
    fn line(&mut self, event: &Event, duration: Option<Duration>, now: Instant) -> Option<String> {
        let line = match event {
            Event::Searching | Event::Found(_) => return None,
            Event::Done => return duration.map(ready),
            Event::Installing { .. } if self.last.is_some_and(|last| now - last < LINE_INTERVAL) => {
                return None;
            }
            event => describe(event),
        };
        self.last = Some(now);
        Some(line)
    }
}

/// Extracts the progress from the output of pip or uv.
pub(super) struct InstallerOutput {
    names: HashSet<String>,
    done: usize,
    of: usize,
}

impl InstallerOutput {
    pub(super) fn new(of: usize) -> Self {
        Self { names: HashSet::new(), done: 0, of }
    }

    /// Returns the event that a line of output represents; most lines represent none.
    pub(super) fn read(&mut self, line: &str) -> Option<Event> {
        let line = line.trim();
        let (word, rest) = line.split_once(' ')?;
        let activity = match word {
            // pip prints the name of each package once, or several times if it backtracks.
            "Collecting" => {
                let name = package_name(rest);
                self.names.insert(name.clone());
                self.done = self.done.max(self.names.len());
                name
            }
            // uv prints the names of large packages only, and the number of all packages when it has downloaded them.
            "Downloading" | "Downloaded" | "Building" | "Built"
                if !rest.starts_with("wheel")
                    && !rest.contains(".whl")
                    && !rest.contains(".tar.gz")
                    && !rest.contains("://") =>
            {
                let name = package_name(rest);
                self.names.insert(name.clone());
                self.done = self.done.max(self.names.len());
                format!("{} {name}", word.to_lowercase())
            }
            "Resolved" => "versions chosen".to_owned(),
            "Prepared" => {
                self.done = self.of;
                "writing files".to_owned()
            }
            "Installing" if rest.starts_with("collected packages") => {
                self.done = self.of;
                "writing files".to_owned()
            }
            "Installed" | "Successfully" => {
                self.done = self.of;
                "packages installed".to_owned()
            }
            _ => return None,
        };
        self.done = self.done.min(self.of);
        Some(Event::Installing { line: activity, done: self.done, of: self.of })
    }
}

/// The package name in a requirement such as `tokenizers[extra]<1,>=0.2 (from litellm)`, normalized like pip does to compare names.
fn package_name(requirement: &str) -> String {
    let end = requirement
        .find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_' | '.'))
        .unwrap_or(requirement.len());
    requirement[..end].to_lowercase().replace(['_', '.'], "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_pip() {
        let mut output = InstallerOutput::new(3);
        let mut shown = Vec::new();
        for line in [
            "Collecting openhands-sdk==1.15.0",
            "  Downloading openhands_sdk-1.15.0-py3-none-any.whl (400 kB)",
            "Requirement already satisfied: pip in ./venv",
            "Collecting Jinja2[i18n]<4,>=3 (from litellm==1.80.10->openhands-sdk==1.15.0)",
            "Collecting jinja2<5 (from x)",
            "Building wheels for collected packages: func-timeout",
            "Installing collected packages: a, b, c",
            "Successfully installed a-1 b-2 c-3",
            "",
        ] {
            if let Some(Event::Installing { line, done, of }) = output.read(line) {
                assert_eq!(of, 3);
                shown.push((line, done));
            }
        }
        let shown: Vec<_> = shown.iter().map(|(line, done)| (line.as_str(), *done)).collect();
        assert_eq!(
            shown,
            [("openhands-sdk", 1), ("jinja2", 2), ("jinja2", 2), ("writing files", 3), ("packages installed", 3)]
        );
    }

    #[test]
    fn progress_is_read_from_uv() {
        let mut output = InstallerOutput::new(3);
        let mut shown = Vec::new();
        for line in [
            "Using Python 3.12.1 environment at: venv",
            "Resolved 3 packages in 6.56s",
            "Downloading openai (2.3MiB)",
            "   Building func-timeout==4.3.5",
            " Downloaded openai",
            "      Built func-timeout==4.3.5",
            "Prepared 3 packages in 8.00s",
            "Installed 3 packages in 300ms",
            " + wsproto==1.3.2",
        ] {
            if let Some(Event::Installing { line, done, .. }) = output.read(line) {
                shown.push((line, done));
            }
        }
        let shown: Vec<_> = shown.iter().map(|(line, done)| (line.as_str(), *done)).collect();
        assert_eq!(
            shown,
            [
                ("versions chosen", 0),
                ("downloading openai", 1),
                ("building func-timeout", 2),
                ("downloaded openai", 2),
                ("built func-timeout", 2),
                ("writing files", 3),
                ("packages installed", 3)
            ]
        );
    }

    #[test]
    fn plain_lines_are_few() {
        let mut lines = PlainLines::default();
        let now = Instant::now();
        let event = |done| Event::Installing { line: "x".to_owned(), done, of: 9 };
        assert!(lines.line(&Event::Searching, None, now).is_none());
        assert!(lines.line(&event(1), None, now).unwrap().contains("(1/9)"));
        assert!(lines.line(&event(2), None, now + Duration::from_secs(1)).is_none());
        assert!(lines.line(&event(3), None, now + Duration::from_secs(6)).is_some());
        assert!(lines.line(&Event::Verifying, None, now + Duration::from_secs(7)).is_some());
        // Nothing was installed, so nothing is printed.
        assert!(lines.line(&Event::Done, None, now).is_none());
        assert!(lines.line(&Event::Done, Some(Duration::from_secs(9)), now).is_some());
    }
}
