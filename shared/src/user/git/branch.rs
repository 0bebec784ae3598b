//! Names of branches.

use super::address;

/// Why a text is not the name of a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BranchError {
    /// The name contains a blank, a control character, an invisible character, or one with a meaning for git or a shell.
    #[error("contains an invalid character")]
    Character,
    /// The name breaks another rule of git (`git check-ref-format`).
    #[error("not a valid branch name; see git check-ref-format")]
    Form,
}

/// Normalises the name of a branch: removes `refs/heads/` and the blanks and quotes around it. `None` if it is blank, or `HEAD` for the
/// default branch.
///
/// # Errors
/// When git does not accept the name.
pub fn normal_branch(text: &str) -> Result<Option<String>, BranchError> {
    let text = address::unwrapped(text);
    if matches!(text, "" | "@" | "HEAD" | "origin/HEAD" | "refs/remotes/origin/HEAD") {
        return Ok(None);
    }
    let name = text.strip_prefix("refs/heads/").or_else(|| text.strip_prefix("refs/remotes/origin/")).unwrap_or(text);
    // The first text has git's characters, the second the contract's. Users copy the invisible ones without seeing them.
    let odd = |c: char| {
        c.is_ascii_control() || " ~^:?*[\\".contains(c) || ";&|$`\n\r".contains(c) || address::is_invisible(c)
    };
    if name.contains(odd) {
        return Err(BranchError::Character);
    }
    let is_odd_part = |part: &str| part.is_empty() || part.starts_with('.') || part.ends_with(".lock");
    let is_odd = name.starts_with('-')
        || name.ends_with('.')
        || name.contains("..")
        || name.contains("@{")
        || matches!(name, "@" | "HEAD")
        || name.split('/').any(is_odd_part);
    if is_odd { Err(BranchError::Form) } else { Ok(Some(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [(&str, Result<Option<&str>, BranchError>); 48] = [
        ("main", Ok(Some("main"))),
        (" main\n", Ok(Some("main"))),
        ("", Ok(None)),
        (" \t", Ok(None)),
        ("refs/heads/main", Ok(Some("main"))),
        ("refs/heads/feature/a", Ok(Some("feature/a"))),
        ("refs/remotes/origin/main", Ok(Some("main"))),
        ("feature/ä", Ok(Some("feature/ä"))),
        ("feature/#12", Ok(Some("feature/#12"))),
        ("a'b\"c", Ok(Some("a'b\"c"))),
        ("a@b", Ok(Some("a@b"))),
        ("v1.0", Ok(Some("v1.0"))),
        ("a,b(c){d}!%+=", Ok(Some("a,b(c){d}!%+="))),
        ("refs/tags/v1", Ok(Some("refs/tags/v1"))),
        ("head", Ok(Some("head"))),
        ("HEAD", Ok(None)),
        (" @ ", Ok(None)),
        ("origin/HEAD", Ok(None)),
        ("\"main\"", Ok(Some("main"))),
        ("'feature/a'", Ok(Some("feature/a"))),
        ("\u{feff}main", Ok(Some("main"))),
        ("main\u{200b}", Ok(Some("main"))),
        ("\u{202a}refs/heads/main\u{202c}", Ok(Some("main"))),
        ("a\u{200d}b", Ok(Some("a\u{200d}b"))),
        ("ma\u{200b}in", Err(BranchError::Character)),
        ("a\u{202e}b", Err(BranchError::Character)),
        ("refs/heads/HEAD", Err(BranchError::Form)),
        ("a b", Err(BranchError::Character)),
        ("a;b", Err(BranchError::Character)),
        ("a\nb", Err(BranchError::Character)),
        ("a~1", Err(BranchError::Character)),
        ("a^", Err(BranchError::Character)),
        ("a:b", Err(BranchError::Character)),
        ("a?", Err(BranchError::Character)),
        ("a*", Err(BranchError::Character)),
        ("a[b", Err(BranchError::Character)),
        ("a\\b", Err(BranchError::Character)),
        ("$(id)", Err(BranchError::Character)),
        ("\u{7f}", Err(BranchError::Character)),
        ("-b", Err(BranchError::Form)),
        ("a..b", Err(BranchError::Form)),
        ("a.", Err(BranchError::Form)),
        ("a//b", Err(BranchError::Form)),
        ("a/", Err(BranchError::Form)),
        ("a/.b", Err(BranchError::Form)),
        ("a.lock/b", Err(BranchError::Form)),
        ("a@{b", Err(BranchError::Form)),
        ("refs/heads/", Err(BranchError::Form)),
    ];

    #[test]
    fn names_are_read_by_gits_rules() {
        for (text, expected) in NAMES {
            assert_eq!(normal_branch(text), expected.map(|name| name.map(ToOwned::to_owned)), "{text:?}");
        }
    }

    /// git itself agrees, but for the characters that the contract refuses on top.
    #[test]
    fn git_agrees() {
        for (text, _) in NAMES {
            let name = address::unwrapped(text);
            let name = name.strip_prefix("refs/heads/").unwrap_or(name);
            let is_default = matches!(normal_branch(name), Ok(None));
            if is_default || name.is_empty() || name.contains(|c| ";&|$`".contains(c) || address::is_invisible(c)) {
                continue;
            }
            let ran = std::process::Command::new("git").args(["check-ref-format", "--branch", name]).output();
            let ran = ran.expect("git");
            assert_eq!(normal_branch(name).is_ok(), ran.status.success(), "{text:?}: {ran:?}");
        }
    }
}
