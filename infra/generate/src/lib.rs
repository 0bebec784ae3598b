//! Writes the files that follow from the route table (`infra/routes`): API Gateway's definition, the router table of
//! `cargo lambda watch`, and the OpenAPI document.
//!
//! `cargo run -p generate` writes them; `cargo run -p generate -- --check` compares them, and so does a test of `tests/it`.

mod api_gateway;
mod openapi;
pub mod schemas;
mod watch_router;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A generated file.
#[derive(Debug)]
pub struct Output {
    /// Its path in the repository.
    pub path: &'static str,
    /// What it must contain.
    pub text: String,
}

impl Output {
    /// Whether the file in the repository at this root has the text.
    #[must_use]
    pub fn is_current(&self, root: &Path) -> bool {
        fs::read_to_string(root.join(self.path)).is_ok_and(|text| text == self.text)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, root: &Path) -> io::Result<()> {
        fs::write(root.join(self.path), &self.text)
    }
}

/// The root of this repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Generates all files in memory. The router table is one section of `Cargo.toml`; the rest of that file is read from `root`.
///
/// # Errors
/// If `Cargo.toml` cannot be read or does not mark the section, or if a file cannot be serialised.
pub fn outputs(root: &Path) -> Result<Vec<Output>, Box<dyn std::error::Error>> {
    let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
    Ok(vec![
        Output { path: "infra/api-gateway.yaml", text: api_gateway::definition()? },
        Output { path: "Cargo.toml", text: watch_router::in_manifest(&manifest)? },
        Output { path: "docs/openapi.json", text: openapi::document()? },
    ])
}
