//! The files of the web UI, changed so that the page connects to this server and loads its editor from it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use axum::body::Bytes;
use axum::response::{IntoResponse as _, Response};
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde_json::{Value, json};

use super::package::{EDITOR, UI, install};
use super::{ASSETS, INDEX, WebUiError, content_type, file_error};

/// The prefix of the editor's translation files, which the UI never requests.
const EDITOR_TRANSLATION_PREFIX: &str = "nls.messages.";

/// The script that configures the UI for this server.
const SCRIPT: &str = include_str!("setup.js");
/// The script is inserted after this tag, so that it runs before any other script of the page.
const HEAD: &str = "<head>";

/// The server that the UI connects to.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The server's address; `None` for the address of the page.
    pub host: Option<String>,
    /// The text with which the page prompts for an API key; `None` if the server needs none.
    pub key_prompt: Option<&'static str>,
    /// Whether the server has a model; otherwise the UI first prompts for one.
    pub has_model: bool,
    /// Other addresses to which the page may connect, as sources of `connect-src`: agent servers have addresses of their own.
    pub connect_src: &'static str,
}

/// Sources for agent servers on this machine.
pub const LOOPBACK: &str = "http://127.0.0.1:* ws://127.0.0.1:* http://localhost:* ws://localhost:*";
/// Sources for agent servers at any address.
pub const ANYWHERE: &str = "http: ws: https: wss:";

/// The files of the UI, by their paths without the leading slash.
#[derive(Clone, Debug)]
pub struct Site(pub(super) BTreeMap<String, Bytes>);

impl Site {
    /// Reads the files of a built UI, and inserts the server's address and the location of the editor into its first page.
    pub(super) fn read(folder: &Path, connection: &Connection) -> Result<Self, WebUiError> {
        let mut files = files_below(folder)?;
        let replaced = with_own_editor(&files)?;
        let imports: BTreeMap<String, String> =
            replaced.iter().map(|(name, (own, _))| (format!("/{name}"), format!("/{own}"))).collect();
        files.extend(replaced.into_values());
        let index = files.get(INDEX).and_then(|bytes: &Bytes| std::str::from_utf8(bytes).ok());
        let (before, after) = index.and_then(|text| text.split_once(HEAD)).ok_or(WebUiError::Index)?;
        let index = format!(
            "{before}{HEAD}{}<script type=\"importmap\">{}</script><script>{}</script>{after}",
            content_security_policy(connection),
            in_script(&json!({"imports": imports})),
            script(connection)
        );
        files.insert(INDEX.to_owned(), index.into());
        Ok(Self(files))
    }

    /// Adds the editor. Fetches it first, if necessary.
    ///
    /// # Errors
    /// The editor cannot be fetched, or has an unexpected digest. The site is then unchanged: the UI works, but diffs are blank.
    pub async fn add_editor(&mut self, folder: &Path) -> Result<(), WebUiError> {
        let installed = install(&EDITOR, folder).await?;
        let path = editor_path();
        let mut files = EDITOR.licenses_from(&installed)?;
        for (name, bytes) in files_below(&installed.join(EDITOR.served))? {
            if !name.starts_with(EDITOR_TRANSLATION_PREFIX) {
                files.insert(format!("vs/{name}"), bytes);
            }
        }
        self.0.extend(files.into_iter().map(|(name, bytes)| (format!("{path}/{name}"), bytes)));
        Ok(())
    }

    pub(super) fn first_page(&self) -> Response {
        let bytes = self.0.get(INDEX).cloned().unwrap_or_default();
        ([(CONTENT_TYPE, content_type(INDEX)), (CACHE_CONTROL, "no-store")], bytes).into_response()
    }

    /// Writes the files to a folder, for hosting them from there.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), WebUiError> {
        for (name, bytes) in &self.0 {
            let path = folder.join(name);
            let parent = path.parent().unwrap_or(folder);
            fs::create_dir_all(parent).map_err(file_error(parent))?;
            fs::write(&path, bytes).map_err(file_error(&path))?;
        }
        Ok(())
    }

    #[must_use]
    pub fn file_count(&self) -> usize {
        self.0.len()
    }
}

/// The files below a folder, by their relative paths.
fn files_below(folder: &Path) -> Result<BTreeMap<String, Bytes>, WebUiError> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(current) = folders.pop() {
        for entry in fs::read_dir(&current).map_err(file_error(&current))? {
            let path = entry.map_err(file_error(&current))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Some(name) = path.strip_prefix(folder).ok().and_then(Path::to_str) {
                let bytes = fs::read(&path).map_err(file_error(&path))?;
                files.insert(name.to_owned(), bytes.into());
            }
        }
    }
    Ok(files)
}

/// The URL from which the unchanged UI loads its editor.
pub(super) fn editor_origin() -> String {
    format!("https://cdn.jsdelivr.net/npm/{}@{}/{}", EDITOR.name, EDITOR.version, EDITOR.served)
}

/// The path at which this server serves the editor.
fn editor_path() -> String {
    format!("{ASSETS}{}-{}", EDITOR.name, EDITOR.version)
}

/// Finds the scripts that load the editor. Returns for each a changed copy, which loads the editor from this server, under a new name.
///
/// Browsers cache assets by name for a year. An import map in the first page, which is not cached, maps the old names to the new ones;
/// with the old names, a browser that has visited the page before would continue to use its cached script and load the editor from
/// the CDN.
fn with_own_editor(files: &BTreeMap<String, Bytes>) -> Result<BTreeMap<String, (String, Bytes)>, WebUiError> {
    let (origin, own) = (editor_origin(), format!("/{}/vs", editor_path()));
    let mut replaced = BTreeMap::new();
    for (name, bytes) in files {
        let Some(stem) = name.strip_suffix(".js") else { continue };
        let Ok(text) = std::str::from_utf8(bytes) else { continue };
        if text.contains(&origin) {
            let changed = format!("{stem}.{}-{}.js", EDITOR.name, EDITOR.version);
            replaced.insert(name.clone(), (changed, text.replace(&origin, &own).into()));
        }
    }
    if replaced.is_empty() { Err(WebUiError::Editor) } else { Ok(replaced) }
}

/// The Content-Security-Policy of the page: it loads nothing from other servers, and connects only to this server and to agent servers,
/// as far as their addresses are known. The unchanged UI would also load fonts and the logos of MCP servers, check for newer versions
/// of itself, and send telemetry to its vendor.
fn content_security_policy(connection: &Connection) -> String {
    let host = connection.host.as_deref().and_then(|host| host.parse::<reqwest::Url>().ok());
    let host = host.map(|host| host.origin().ascii_serialization()).unwrap_or_default();
    let connect_src = connection.connect_src;
    format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:; \
         style-src 'self' 'unsafe-inline'; font-src 'self' data:; img-src 'self' data: blob:; \
         worker-src 'self' blob:; \
         connect-src 'self' data: blob: {host} {connect_src}\">"
    )
}

fn script(connection: &Connection) -> String {
    let server = json!({
        "host": connection.host,
        "needs_key": connection.key_prompt.is_some(),
        "key_prompt": connection.key_prompt,
        "has_model": connection.has_model,
    });
    SCRIPT.replace("__SERVER__", &in_script(&server))
}

/// JSON for a script element, which the character `<` could end.
fn in_script(value: &Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

/// Returns the UI in this folder, without its editor. Fetches it first, if necessary.
///
/// # Errors
/// The UI cannot be fetched, or has an unexpected digest. Nothing of it then stays in the folder.
pub async fn ensure(folder: &Path, connection: &Connection) -> Result<Site, WebUiError> {
    let installed = install(&UI, folder).await?;
    let mut site = Site::read(&installed.join(UI.served), connection)?;
    site.0.extend(UI.licenses_from(&installed)?);
    Ok(site)
}
