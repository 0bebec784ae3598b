//! The router table of `cargo lambda watch` in `Cargo.toml`: the function of each path and method, as API Gateway routes them.

use std::fmt::Write as _;

const BEGIN: &str = "# BEGIN GENERATED: cargo run -p generate\n";
const END: &str = "# END GENERATED\n";

/// Replaces the section between the markers.
pub(crate) fn in_manifest(manifest: &str) -> Result<String, String> {
    let missing = |marker: &str| format!("Cargo.toml has no line {marker:?}");
    let (before, rest) = manifest.split_once(BEGIN).ok_or_else(|| missing(BEGIN))?;
    let (_, after) = rest.split_once(END).ok_or_else(|| missing(END))?;
    Ok(format!("{before}{BEGIN}{}{END}{after}", table()))
}

fn table() -> String {
    let mut text = "[workspace.metadata.lambda.watch.router]\n".to_owned();
    let mut seen: Vec<&str> = Vec::new();
    for path in routes::routes().map(|route| route.path) {
        if seen.contains(&path) {
            continue;
        }
        seen.push(path);
        let of_path: Vec<_> = routes::routes().filter(|route| route.path == path).collect();
        let Some(first) = of_path.first() else { continue };
        // Where one function has all methods, it also answers unknown ones.
        if of_path.iter().all(|route| route.function == first.function) {
            let _infallible = writeln!(text, "{path:?} = {:?}", first.function);
            continue;
        }
        let _infallible = writeln!(text, "{path:?} = [");
        for route in of_path {
            let (method, function) = (route.method.as_str(), route.function);
            let _infallible = writeln!(text, "    {{ method = {method:?}, function = {function:?} }},");
        }
        text.push_str("]\n");
    }
    text
}
