//! A test: the top-level modules of this crate depend on each other in one direction only, without cycles.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

/// For each module that uses another one, the lines that do.
type Graph = BTreeMap<String, BTreeMap<String, Vec<String>>>;

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The path of a file's module from the root of the crate: `user/git/mod.rs` is `["user", "git"]`.
fn module_path(file: &Path) -> Vec<String> {
    let relative = file.strip_prefix(sources()).unwrap().with_extension("");
    let mut path: Vec<String> = relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if path.last().is_some_and(|last| last == "mod") {
        path.pop();
    }
    path
}

/// The module that each name at the root of the crate belongs to: a module's own name, and what `lib.rs` re-exports.
fn root_names(lib: &str) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    for line in lib.lines() {
        if let Some(module) = line.strip_prefix("pub mod ").or_else(|| line.strip_prefix("mod ")) {
            let module = module.trim_end_matches(';');
            names.insert(module.to_owned(), module.to_owned());
        } else if let Some((module, items)) = line.strip_prefix("pub use ").and_then(|path| path.split_once("::")) {
            for item in identifiers(items) {
                names.insert(item, module.to_owned());
            }
        }
    }
    names
}

fn identifiers(text: &str) -> Vec<String> {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    text.split(|c| !is_part(c)).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

/// The code of a file without comments and unit tests. Removed lines stay, empty, so that line numbers hold.
fn code(text: &str) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut is_in_test_module = false;
    let mut rest = text.lines().peekable();
    while let Some(line) = rest.next() {
        if is_in_test_module {
            is_in_test_module = line != "}";
            lines.push("");
            continue;
        }
        let starts_tests = line == "#[cfg(test)]" && rest.peek().is_some_and(|next| next.contains("mod "));
        if starts_tests {
            is_in_test_module = rest.peek().is_some_and(|next| next.ends_with('{'));
            lines.push("");
            if !is_in_test_module {
                rest.next();
                lines.push("");
            }
            continue;
        }
        lines.push(if line.trim_start().starts_with("//") { "" } else { line });
    }
    lines
}

/// The names at the root of the crate that a line of a module of this depth mentions: `crate::x`, `crate::{x::…, y::…}`, or a
/// `super::x` that reaches the root.
fn mentioned(line: &str, depth: usize) -> Vec<String> {
    let mut found = Vec::new();
    let to_root = format!("{}::", vec!["super"; depth].join("::"));
    for prefix in ["crate::", to_root.as_str()] {
        for (at, _) in line.match_indices(prefix) {
            let before = line[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
                continue;
            }
            let rest = &line[at + prefix.len()..];
            match rest.strip_prefix('{') {
                None => found.extend(identifiers(rest).into_iter().take(1).filter(|name| name != "super")),
                Some(group) => found.extend(first_names(group)),
            }
        }
    }
    found
}

/// The first name of each path in a group of imports, up to its closing brace.
fn first_names(group: &str) -> Vec<String> {
    let (mut names, mut nesting, mut is_start) = (Vec::new(), 0, true);
    let mut name = String::new();
    for c in group.chars() {
        match c {
            '{' => nesting += 1,
            '}' if nesting == 0 => break,
            '}' => nesting -= 1,
            ',' if nesting == 0 => {
                names.push(std::mem::take(&mut name));
                is_start = true;
            }
            ':' if nesting == 0 => is_start = false,
            c if nesting == 0 && is_start && (c.is_alphanumeric() || c == '_') => name.push(c),
            _ => {}
        }
    }
    names.push(name);
    names.retain(|name| !name.is_empty());
    names
}

fn graph() -> Graph {
    let names = root_names(&fs::read_to_string(sources().join("lib.rs")).unwrap());
    let mut found = Vec::new();
    files(&sources(), &mut found);
    found.sort();
    let mut graph = Graph::new();
    for file in found {
        let path = module_path(&file);
        let top = path[0].as_str();
        let is_test = path.last().is_some_and(|last| last == "tests") || top == "module_graph";
        if top == "lib" || is_test {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        for (index, line) in code(&text).into_iter().enumerate() {
            for name in mentioned(line, path.len()) {
                let Some(used) = names.get(&name).filter(|used| *used != top) else { continue };
                let place = format!("{}:{}: {}", file.display(), index + 1, line.trim());
                let edges = graph.entry(top.to_owned()).or_default();
                edges.entry(used.clone()).or_default().push(place);
            }
        }
    }
    graph
}

/// The shortest way from a module to itself, without the module at its end.
fn cycle(graph: &Graph, module: &str) -> Option<Vec<String>> {
    let mut ways = VecDeque::from([vec![module.to_owned()]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        for used in graph.get(way.last()?).into_iter().flat_map(BTreeMap::keys) {
            if used == module {
                return Some(way);
            }
            if seen.insert(used.clone()) {
                ways.push_back([way.as_slice(), std::slice::from_ref(used)].concat());
            }
        }
    }
    None
}

/// Every shortest cycle once, each with the lines that make it.
fn cycles(graph: &Graph) -> Vec<String> {
    let mut known = BTreeSet::new();
    let mut found = Vec::new();
    for module in graph.keys() {
        let Some(cycle) = cycle(graph, module) else { continue };
        if !known.insert(cycle.iter().cloned().collect::<BTreeSet<_>>()) {
            continue;
        }
        let mut text = format!("{} -> {}", cycle.join(" -> "), cycle[0]);
        for (from, to) in cycle.iter().zip(cycle.iter().cycle().skip(1)) {
            for line in &graph[from][to] {
                text += &format!("\n  {from} -> {to}: {line}");
            }
        }
        found.push(text);
    }
    found
}

#[test]
fn no_module_depends_on_one_that_depends_on_it() {
    let graph = graph();
    assert!(graph.len() > 15, "the sources were not read: {:?}", graph.keys());
    assert!(graph["start"].contains_key("conversation"), "uses are not found");
    let cycles = cycles(&graph);
    assert!(cycles.is_empty(), "modules of `shared` depend on each other:\n{}", cycles.join("\n"));
}

#[test]
fn uses_are_read_from_code_alone() {
    let text = "use crate::a::B;\n// crate::b\n#[cfg(test)]\nmod tests {\n    use crate::c;\n}\nuse crate::{d::{E, F}, g};\n\
                fn f() { super::h::i(); super::super::j(); }";
    let found: Vec<String> = code(text).into_iter().flat_map(|line| mentioned(line, 1)).collect();
    assert_eq!(found, ["a", "d", "g", "h"]);
}

#[test]
fn a_cycle_is_reported_with_its_lines() {
    let uses = |to: &str, line: &str| BTreeMap::from([(to.to_owned(), vec![line.to_owned()])]);
    let graph = Graph::from([
        ("a".to_owned(), uses("b", "a.rs:1: use crate::b;")),
        ("b".to_owned(), uses("c", "b.rs:2: use crate::c;")),
        ("c".to_owned(), uses("a", "c.rs:3: use crate::a;")),
    ]);
    let expected = "a -> b -> c -> a\n  a -> b: a.rs:1: use crate::b;\n  b -> c: b.rs:2: use crate::c;\n  c -> a: c.rs:3: use crate::a;";
    assert_eq!(cycles(&graph), [expected]);
}
