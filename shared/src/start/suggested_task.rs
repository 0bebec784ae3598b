//! Builds the first message (prompt) of a conversation that is started from a suggested task.

use super::request::{SuggestedTask, TaskType};
use crate::user::git::ProviderType;

/// A suggested task that has no prompt.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuggestedTaskError {
    #[error("Provider {0} is not supported for suggested tasks")]
    Provider(ProviderType),
    #[error("Unsupported task type: {0}")]
    TaskType(TaskType),
}

struct Terms {
    /// The provider's name for a request to merge.
    request: &'static str,
    short: &'static str,
    verb: &'static str,
    api: &'static str,
    token: &'static str,
    ci: &'static str,
}

fn terms(provider: ProviderType) -> Option<Terms> {
    let pull = |api, token, ci| Terms { request: "Pull Request", short: "PR", verb: "pull request", api, token, ci };
    match provider {
        ProviderType::Github => Some(pull("GitHub API", "GITHUB_TOKEN", "GitHub Actions")),
        ProviderType::Bitbucket => Some(pull("Bitbucket API", "BITBUCKET_TOKEN", "Bitbucket Pipelines")),
        ProviderType::BitbucketDataCenter => {
            Some(pull("Bitbucket Data Center API", "BITBUCKET_DATA_CENTER_TOKEN", "Bitbucket Pipelines"))
        }
        ProviderType::Gitlab => Some(Terms {
            request: "Merge Request",
            short: "MR",
            verb: "merge request",
            api: "GitLab API",
            token: "GITLAB_TOKEN",
            ci: "CI pipelines",
        }),
        _ => None,
    }
}

/// Returns the prompt for a suggested task.
///
/// # Errors
/// [`SuggestedTaskError`] if the provider or the kind of task is not supported.
pub fn prompt(task: &SuggestedTask) -> Result<String, SuggestedTaskError> {
    let Terms { request, short, verb, api, token, ci } =
        terms(task.git_provider).ok_or(SuggestedTaskError::Provider(task.git_provider))?;
    let SuggestedTask { repo, issue_number: number, title, .. } = task;
    let read = format!("Read it through the {api}; the environment variable {token} holds a token for it.");
    let study = format!(
        "Then check out the branch of that {short}, and study its diff against the branch it is to be merged into, so that you \
         know what the {short} is meant to do."
    );
    Ok(match task.task_type {
        TaskType::MergeConflicts => format!(
            "You are working on {request} #{number} (\"{title}\") in the repository {repo}. Your task is to fix its merge \
             conflicts.\n{read} {study}\nMerge the target branch into it, resolve every conflict so that both sides' intent is \
             kept, make sure that the project still builds and its tests pass, and push the result to the {short}'s branch."
        ),
        TaskType::FailingChecks => format!(
            "You are working on {request} #{number} (\"{title}\") in the repository {repo}. Its CI checks fail, and your task \
             is to fix them.\n{read} {study}\nFind out with the {api} which checks of {ci} fail, and why. Reproduce each \
             failure locally, mend its cause, and push to the {short}'s branch. Then look at the state of {ci} every 30 \
             seconds until it is done, and go on in the same way while anything fails."
        ),
        TaskType::UnresolvedComments => format!(
            "You are working on {request} #{number} (\"{title}\") in the repository {repo}. Your task is to address its open \
             review comments.\n{read} {study}\nFetch the comments that are not resolved. Address each of them; where one asks \
             for a change that you think is wrong, answer it and say why. Push your changes to the {short}'s branch."
        ),
        TaskType::OpenIssue => format!(
            "You are working on issue #{number} (\"{title}\") in the repository {repo}. Your task is to fix the issue.\n{read} \
             Read its comments too. Then make a new branch, and do the work there. Once it is done and its tests pass, push the \
             branch and open a {verb} whose description refers to issue #{number}."
        ),
        other => return Err(SuggestedTaskError::TaskType(other)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(git_provider: ProviderType, task_type: TaskType) -> SuggestedTask {
        SuggestedTask { git_provider, task_type, repo: "o/r".into(), issue_number: 7, title: "T".into() }
    }

    #[test]
    fn a_message_speaks_its_providers_language() {
        let github = prompt(&task(ProviderType::Github, TaskType::FailingChecks)).expect("a prompt");
        for word in ["Pull Request #7", "o/r", "GITHUB_TOKEN", "GitHub Actions", "30 seconds"] {
            assert!(github.contains(word), "{word} in {github}");
        }
        let gitlab = prompt(&task(ProviderType::Gitlab, TaskType::OpenIssue)).expect("a prompt");
        assert!(
            gitlab.contains("open a merge request") && gitlab.contains("issue #7") && gitlab.contains("GITLAB_TOKEN")
        );
    }

    #[test]
    fn what_has_no_message_is_an_error() {
        assert_eq!(
            prompt(&task(ProviderType::Github, TaskType::OpenPr)).unwrap_err().to_string(),
            "Unsupported task type: OPEN_PR"
        );
        assert_eq!(
            prompt(&task(ProviderType::Forgejo, TaskType::OpenIssue)),
            Err(SuggestedTaskError::Provider(ProviderType::Forgejo))
        );
    }
}
