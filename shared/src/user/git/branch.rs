//! Names of branches.

/// Why a text is not the name of a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BranchError {
    /// A blank, a control character, or one that means something to git or a shell.
    #[error("it holds a character that names do not have")]
    Character,
    /// It breaks another of git's rules (`git check-ref-format`).
    #[error("git has no branch of this name: see git check-ref-format")]
    Form,
}

/// The name of the branch without blanks around it and without `refs/heads/`; `None` if it is blank.
///
/// # Errors
/// When git cannot have a branch of this name.
pub fn normal_branch(text: &str) -> Result<Option<String>, BranchError> {
    let name = text.trim();
    let name = name.strip_prefix("refs/heads/").or_else(|| name.strip_prefix("refs/remotes/origin/")).unwrap_or(name);
    if name.is_empty() && text.trim().is_empty() {
        return Ok(None);
    }
    // The first are git's, the second the contract's.
    let odd = |c: char| c.is_ascii_control() || " ~^:?*[\\".contains(c) || ";&|$`\n\r".contains(c);
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

    const NAMES: [(&str, Result<Option<&str>, BranchError>); 36] = [
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
        assert_eq!(normal_branch("HEAD"), Err(BranchError::Form));
    }

    /// git itself agrees, but for the characters that the contract refuses on top.
    #[test]
    fn git_agrees() {
        for (text, _) in NAMES {
            let name = text.trim();
            let name = name.strip_prefix("refs/heads/").unwrap_or(name);
            if name.is_empty() || name.contains([';', '&', '|', '$', '`']) {
                continue;
            }
            let ran = std::process::Command::new("git").args(["check-ref-format", "--branch", name]).output();
            let ran = ran.expect("git");
            assert_eq!(normal_branch(name).is_ok(), ran.status.success(), "{text:?}: {ran:?}");
        }
    }
}
