//! The update request of a conversation: `AppConversationUpdateRequest` of the contract.

use serde_json::Value;

use super::MAX_NAME;
use super::fields::repository;
use super::store::ConversationChange;
use crate::http::pydantic::body::{self, FromJson};
use crate::http::pydantic::validation::{Checked, Checker, Fields, boolean, choice, string_up_to};
use crate::user::git::ProviderType;
use crate::user::git::{self, Repository, Selection};
use crate::user::settings::ProviderTokens;

/// The requested changes. A field that is `None` was not sent and stays unchanged; `Some(None)` clears it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpdateRequest {
    pub title: Option<Option<String>>,
    /// Whether other users may read the conversation.
    pub public: Option<Option<bool>>,
    /// `owner/name`
    pub selected_repository: Option<Option<String>>,
    /// A branch of the repository.
    pub selected_branch: Option<Option<String>>,
    /// The provider that hosts the repository.
    pub git_provider: Option<Option<ProviderType>>,
}

impl UpdateRequest {
    /// Reads the body of a request; fields that the contract does not have are ignored.
    ///
    /// # Errors
    /// Every violation of the types and lengths of fields. [`UpdateRequest::normal`] checks their values.
    pub fn from_body(content_type: Option<&str>, bytes: &[u8]) -> Checked<Self> {
        body::read(content_type, bytes)
    }
}

impl FromJson for UpdateRequest {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        let name = |check: &mut Checker, value: &Value| string_up_to(MAX_NAME, check, value);
        let fields = Fields::of(check, value)?;
        let public = fields.nullable(check, "public", boolean);
        let selected_repository = fields.nullable(check, "selected_repository", repository);
        let selected_branch = fields.nullable(check, "selected_branch", name);
        let git_provider = fields.nullable(check, "git_provider", choice);
        let title = fields.nullable(check, "title", name);
        Some(Self {
            title: fields.has("title").then_some(title?),
            public: fields.has("public").then_some(public?),
            selected_repository: fields.has("selected_repository").then_some(selected_repository?),
            selected_branch: fields.has("selected_branch").then_some(selected_branch?),
            git_provider: fields.has("git_provider").then_some(git_provider?),
        })
    }
}

impl UpdateRequest {
    /// Whether it changes the repository, branch or provider, so that [`UpdateRequest::normal`] is needed.
    #[must_use]
    pub fn selects(&self) -> bool {
        self.selected_repository.is_some() || self.selected_branch.is_some() || self.git_provider.is_some()
    }

    /// Validates and normalises repository, branch and provider as a start does. `kept` contains the record's repository and provider;
    /// `tokens` are the user's settings for git providers.
    ///
    /// # Errors
    /// Every violation: `value_error` for an invalid value, and for a branch or provider without its repository.
    pub fn normal(
        mut self,
        (kept_repository, kept_provider): (Option<&str>, Option<ProviderType>),
        tokens: &ProviderTokens,
    ) -> Checked<Self> {
        let mut check = Checker::new("body");
        let repository = self.selected_repository.clone().flatten();
        let branch = self.selected_branch.clone().flatten();
        let mut given = (repository.as_deref(), branch.as_deref(), self.git_provider.unwrap_or(kept_provider));
        let mut place = "selected_repository";
        if self.selected_repository.is_none() && self.git_provider.is_some_and(|provider| provider.is_some()) {
            // The new provider must be able to host the record's repository. A repository that an earlier version accepted is kept.
            let is_normal = |text: &&str| Repository::read(text, None, tokens).is_ok_and(|read| read.name == **text);
            given.0 = kept_repository.filter(is_normal);
            place = "git_provider";
        }
        // The record's provider may not be the provider of the new repository.
        if let (Some(text), None) = (given.0, self.git_provider)
            && Repository::read(text, given.2, tokens).is_err()
            && Repository::read(text, None, tokens).is_ok()
        {
            given.2 = None;
        }
        let Some(read) = Selection::read(&mut check, &[place], given, tokens) else {
            return check.finish(None);
        };
        if self.selected_branch.is_some() || read.branch.is_some() {
            self.selected_branch = Some(read.branch);
        }
        let has_repository = match (&self.selected_repository, read.repository) {
            (Some(_), Some(repository)) => {
                (self.selected_repository, self.git_provider) = (Some(Some(repository)), Some(read.provider));
                true
            }
            (Some(_), None) => {
                self.selected_repository = Some(None);
                false
            }
            // Clients may set the fields one after the other, in any order.
            (None, _) => true,
        };
        if !has_repository {
            let branch = self.selected_branch.clone().flatten();
            git::report_without_repository(&mut check, branch.as_deref(), self.git_provider.flatten());
        }
        check.finish(Some(self))
    }

    /// Converts the request to an update of the record.
    #[must_use]
    pub fn change(&self) -> ConversationChange {
        let mut change = ConversationChange::default();
        if let Some(title) = &self.title {
            change = change.title(title.as_deref());
        }
        if let Some(public) = self.public {
            change = change.public(public);
        }
        if let Some(repository) = &self.selected_repository {
            change = change.selected_repository(repository.as_deref());
        }
        if let Some(branch) = &self.selected_branch {
            change = change.selected_branch(branch.as_deref());
        }
        if let Some(provider) = self.git_provider {
            change = change.git_provider(provider);
        }
        change
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Checked<UpdateRequest> {
        UpdateRequest::from_body(Some("application/json"), value.to_string().as_bytes())
    }

    #[test]
    fn absent_null_and_a_value_are_different_changes() {
        let request = read(&json!({"title": null, "public": "yes", "extra": 1})).expect("a request");
        let expected = UpdateRequest { title: Some(None), public: Some(Some(true)), ..UpdateRequest::default() };
        assert_eq!(request, expected);
        assert!(read(&json!({})).expect("a request").change().is_empty());
        assert!(!request.change().is_empty());
    }

    #[test]
    fn every_bad_value_is_named() {
        let long = "é".repeat(MAX_NAME + 1);
        for (body, fault) in [
            (json!({"selected_repository": "norepo"}), Some(("value_error", "selected_repository"))),
            (json!({"selected_repository": "a/b/c"}), Some(("value_error", "selected_repository"))),
            (json!({"selected_repository": "a/b/c", "git_provider": "gitlab"}), None),
            (json!({"selected_repository": "a/b/c d", "git_provider": "azure_devops"}), None),
            (
                json!({"selected_repository": "a/b c", "git_provider": "azure_devops"}),
                Some(("value_error", "selected_repository")),
            ),
            (json!({"git_provider": "azure_devops"}), Some(("value_error", "git_provider"))),
            (json!({"git_provider": "gitlab"}), None),
            (json!({"selected_repository": " ", "selected_branch": ""}), None),
            (json!({"selected_repository": "a/b;c"}), Some(("value_error", "selected_repository"))),
            (json!({"selected_branch": "a b"}), Some(("value_error", "selected_branch"))),
            (json!({"selected_branch": "a\nb"}), Some(("value_error", "selected_branch"))),
            (json!({"selected_repository": null, "selected_branch": "x"}), Some(("value_error", "selected_branch"))),
            (json!({"selected_repository": null, "git_provider": "github"}), Some(("value_error", "git_provider"))),
            (json!({"title": long}), Some(("string_too_long", "title"))),
            (json!({"title": "", "selected_repository": "a/b", "selected_branch": "feature/ä"}), None),
            (json!({"selected_repository": null, "selected_branch": null, "git_provider": null}), None),
        ] {
            let kept = (Some("octo/repo"), None);
            let found = read(&body).and_then(|request| request.normal(kept, &ProviderTokens::default())).err().map(
                |violations| {
                    let violation = serde_json::to_value(&violations[0]).expect("JSON");
                    assert_eq!(violations.len(), 1, "{body}");
                    (violations[0].kind, violation["loc"][1].as_str().expect("a field").to_owned())
                },
            );
            assert_eq!(found.as_ref().map(|(kind, field)| (*kind, field.as_str())), fault, "{body}");
        }
    }

    /// The record, the request, and the expected result: the refused field, or the stored provider.
    #[test]
    fn the_provider_is_that_of_the_new_repository() {
        use ProviderType::{Bitbucket, Forgejo, Github, Gitlab};
        let settings = json!({"provider_tokens": {"github": {"token": "t"}, "gitlab": {"token": "t"}}}).to_string();
        let tokens = crate::user::settings::Settings::from_json(&settings).expect("settings").provider_tokens;
        let one = Some("o/r");
        for (kept, body, expected) in [
            ((one, Some(Github)), json!({"selected_repository": "g/s/r"}), Ok(Some(None))),
            ((one, Some(Bitbucket)), json!({"selected_repository": "g/s/t/r"}), Ok(Some(None))),
            ((one, Some(Github)), json!({"selected_repository": "o/x"}), Ok(Some(Some(Github)))),
            ((one, Some(Gitlab)), json!({"selected_repository": "g/s/r"}), Ok(Some(Some(Gitlab)))),
            ((one, Some(Github)), json!({"selected_repository": "https://gitlab.com/g/s/r"}), Ok(Some(Some(Gitlab)))),
            (
                (one, Some(Github)),
                json!({"selected_repository": "https://github.com/o/x", "git_provider": null}),
                Ok(Some(Some(Github))),
            ),
            ((one, Some(Forgejo)), json!({"selected_repository": "o/x", "git_provider": null}), Ok(Some(None))),
            ((one, None), json!({"selected_repository": "github:o/x"}), Ok(Some(Some(Github)))),
            (
                (one, Some(Github)),
                json!({"selected_repository": "g/s/r", "git_provider": "github"}),
                Err("selected_repository"),
            ),
            ((one, Some(Github)), json!({"selected_branch": "main"}), Ok(None)),
            ((one, Some(Github)), json!({"selected_branch": "HEAD"}), Ok(None)),
            ((None, None), json!({"selected_branch": "HEAD"}), Ok(None)),
            ((None, None), json!({"selected_branch": null, "git_provider": null}), Ok(Some(None))),
            ((None, None), json!({"selected_branch": "main"}), Ok(None)),
            ((None, None), json!({"git_provider": "gitlab"}), Ok(Some(Some(Gitlab)))),
            ((one, None), json!({"selected_repository": null, "selected_branch": "main"}), Err("selected_branch")),
            ((one, None), json!({"selected_repository": " ", "git_provider": "gitlab"}), Err("git_provider")),
        ] {
            let found = read(&body).and_then(|request| request.normal(kept, &tokens));
            let found = found.map(|request| request.git_provider).map_err(|violations| {
                serde_json::to_value(&violations[0]).expect("JSON")["loc"][1].as_str().expect("a field").to_owned()
            });
            assert_eq!(found, expected.map_err(ToOwned::to_owned), "{kept:?} {body}");
        }
    }

    /// The reference responds with 500 where [`UpdateRequest::normal`] refuses.
    #[test]
    fn answers_recorded_updates() {
        let file = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/replay-patch.jsonl"));
        let cases = file.lines().map(|line| serde_json::from_str::<Value>(line).expect("a case"));
        let normal = |request: UpdateRequest| {
            request.normal((Some("octo/repo"), Some(ProviderType::Github)), &ProviderTokens::default())
        };
        let (mut refused, mut failed) = (0, 0);
        for case in cases.filter(|case| case["request"]["method"] == "PATCH") {
            let label = case["label"].as_str().expect("a label");
            let bytes: Vec<u8> = match &case["request"]["body"] {
                Value::Null => Vec::new(),
                // The recording contains raw bytes, one character for each byte.
                Value::String(raw) => raw.chars().map(|c| u8::try_from(u32::from(c)).expect("a byte")).collect(),
                body => body.to_string().into_bytes(),
            };
            let content_type = case["request"]["headers"].get("content-type").and_then(Value::as_str);
            let read = UpdateRequest::from_body(content_type, &bytes);
            match (case["response"]["status"].as_i64().expect("a status"), read) {
                (422, Err(violations)) => {
                    let detail = serde_json::to_value(violations).expect("JSON");
                    assert_eq!(detail, case["response"]["body"]["detail"], "{label}");
                    refused += 1;
                }
                // The reference cannot serialise a NaN in its response.
                (500, Err(violations)) => {
                    assert_eq!((label, violations[0].kind), ("raw: NaN", "json_invalid"));
                }
                (500, Ok(request)) => {
                    assert!(normal(request).is_err(), "{label}");
                    failed += 1;
                }
                (200, Ok(request)) => assert!(normal(request).is_ok(), "{label}"),
                (status, read) => panic!("{label}: {status}, {read:?}"),
            }
        }
        assert!(refused > 10 && failed > 3, "only {refused} and {failed}");
    }
}
