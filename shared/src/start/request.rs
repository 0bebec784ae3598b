//! The start request (`AppConversationStartRequest`): parsing and validation of the client's body, and the form that start tasks show.

use secrecy::{ExposeSecret, SecretString};
use serde::ser::{SerializeMap, SerializeStruct};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::conversation::fields::{EventCallbackProcessor, Trigger, name, repository};
use crate::conversation::tags::Tags;
use crate::http::pydantic::body::{self, FromJson};
use crate::http::pydantic::validation::{
    Checked, Checker, Fields, boolean, choice, constant, dictionary, first_of, integer, list, literal, string,
    string_up_to, uuid, wire_enum,
};
use crate::http::secret::{self, MASK, MAX_SECRETS};
use crate::user::agent_profiles::AgentKind;
use crate::user::git::{ProviderType, Repository, normal_branch, without_credentials};
use crate::user::settings::ProviderTokens;

/// The most skills that one request disables.
pub const MAX_DISABLED_SKILLS: usize = 1000;
/// The most characters of a skill's name.
pub const MAX_SKILL_NAME: usize = 256;

wire_enum! {
    /// The agent that runs the conversation.
    #[derive(Default)]
    pub enum AgentType {
        /// The agent writes code.
        #[default]
        Default = "default",
        /// The agent writes a plan.
        Plan = "plan",
    }
}

wire_enum! {
    /// The kind of a suggested task.
    pub enum TaskType {
        /// A pull request conflicts with its target.
        MergeConflicts = "MERGE_CONFLICTS",
        /// Checks of a pull request fail.
        FailingChecks = "FAILING_CHECKS",
        /// A pull request has open comments.
        UnresolvedComments = "UNRESOLVED_COMMENTS",
        /// An issue is open.
        OpenIssue = "OPEN_ISSUE",
        /// A pull request is open.
        OpenPr = "OPEN_PR",
        /// A repository should get a microagent.
        CreateMicroagent = "CREATE_MICROAGENT",
    }
}

wire_enum! {
    /// The author of a message.
    pub enum Role {
        User = "user",
        System = "system",
        Assistant = "assistant",
        Tool = "tool",
    }
}

/// A request to start a conversation. The fields are in the order of the contract.
///
/// It serialises to the form that start tasks show: every field is present, null if not given; `secrets` is present only if given, and
/// masked. It deserialises from that form. Use [`StartRequest::from_body`] for the body of a client.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StartRequest {
    /// The sandbox to use. If it is `None` or empty, the start chooses one.
    pub sandbox_id: Option<String>,
    /// The requested id of the conversation; with dashes in JSON.
    pub conversation_id: Option<Uuid>,
    /// First message to the agent. It excludes `suggested_task`.
    pub initial_message: Option<SendMessageRequest>,
    /// Text that is appended to the system prompt.
    pub system_message_suffix: Option<String>,
    /// Processors of the conversation's events.
    pub processors: Option<Vec<EventCallbackProcessor>>,
    /// The model, instead of the one in the user's settings.
    pub llm_model: Option<String>,
    /// Repository to clone, `owner/repo`. [`StartRequest::from_body`] does not check it.
    pub selected_repository: Option<String>,
    /// Branch to check out. [`StartRequest::from_body`] does not check it.
    pub selected_branch: Option<String>,
    /// The host of the repository.
    pub git_provider: Option<ProviderType>,
    /// A suggested task, from which the first message is built.
    pub suggested_task: Option<SuggestedTask>,
    pub title: Option<String>,
    /// The event or user interface that caused the start.
    pub trigger: Option<Trigger>,
    /// Numbers of related pull requests.
    pub pr_number: Vec<i64>,
    /// The parent conversation; without dashes in JSON.
    #[serde(with = "uuid::serde::simple::option")]
    pub parent_conversation_id: Option<Uuid>,
    pub agent_type: AgentType,
    /// Marks the conversation as public: everyone may read it.
    pub public: Option<bool>,
    pub plugins: Option<Vec<PluginSpec>>,
    /// Secrets for the sandbox. An extension of the contract, so the key is absent unless a client sent it, as those of the fields below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secrets: Option<Secrets>,
    /// Tags of the conversation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Tags>,
    /// The system prompt, instead of the agent's own. Agent servers before 1.34 have no such field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_prompt: Option<String>,
    /// Skills that this conversation does not get, in addition to those that are disabled in the settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disabled_skills: Option<Vec<String>>,
    /// The agent profile to use, instead of the active one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_profile_id: Option<Uuid>,
    /// `openhands`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_kind: Option<AgentKind>,
}

impl StartRequest {
    /// Parses and validates the body of a start request.
    ///
    /// # Errors
    /// All violations, at `["body", …]`; see [`body::json`] for violations of the body as a whole.
    pub fn from_body(content_type: Option<&str>, body: &[u8]) -> Checked<Self> {
        body::read(content_type, body)
    }
}

impl StartRequest {
    /// Normalises a start's repository, branch and provider. Invalid values stay unchanged, because starts and records of earlier versions
    /// may contain any value.
    pub(crate) fn use_normal_selection(&mut self, tokens: &ProviderTokens) {
        let given = self.selected_repository.as_deref();
        let Some(Ok(read)) = given.map(|text| Repository::read(text, self.git_provider, tokens)) else { return };
        (self.selected_repository, self.git_provider) = (Some(read.name), read.provider);
        if let Some(Ok(branch)) = self.selected_branch.as_deref().map(normal_branch) {
            self.selected_branch = branch;
        }
    }
}

impl FromJson for StartRequest {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        let fields = Fields::of(check, value)?;
        let sandbox_id = fields.nullable(check, "sandbox_id", string);
        let conversation_id = fields.nullable(check, "conversation_id", uuid);
        let initial_message = fields.nullable(check, "initial_message", SendMessageRequest::read);
        let system_message_suffix = fields.nullable(check, "system_message_suffix", string);
        let processors =
            fields.nullable(check, "processors", |check, value| list(check, value, EventCallbackProcessor::read));
        let llm_model = fields.nullable(check, "llm_model", name);
        let selected_repository = fields.nullable(check, "selected_repository", repository);
        let selected_branch = fields.nullable(check, "selected_branch", name);
        let git_provider = fields.nullable(check, "git_provider", choice);
        let suggested_task = fields.nullable(check, "suggested_task", SuggestedTask::read);
        let title = fields.nullable(check, "title", name);
        let trigger = fields.nullable(check, "trigger", choice);
        let pr_number = fields.or(check, "pr_number", Vec::new(), |check, value| list(check, value, integer));
        let parent_conversation_id = fields.nullable(check, "parent_conversation_id", uuid);
        let agent_type = fields.or(check, "agent_type", AgentType::Default, choice);
        let public = fields.nullable(check, "public", boolean);
        let plugins = fields.nullable(check, "plugins", |check, value| list(check, value, PluginSpec::read));
        let secrets = fields.nullable(check, "secrets", Secrets::read);
        let tags = fields.nullable(check, "tags", Tags::requested);
        let system_prompt = fields.nullable(check, "system_prompt", string);
        let disabled_skills = fields.nullable(check, "disabled_skills", read_skill_names);
        let agent_profile_id = fields.nullable(check, "agent_profile_id", uuid);
        let agent_kind = fields.nullable(check, "agent_kind", literal);
        fields.nullable(check, "acp_server", refuse_acp_server)?;
        Some(Self {
            sandbox_id: sandbox_id?,
            conversation_id: conversation_id?,
            initial_message: initial_message?,
            system_message_suffix: system_message_suffix?,
            processors: processors?,
            llm_model: llm_model?,
            selected_repository: selected_repository?,
            selected_branch: selected_branch?,
            git_provider: git_provider?,
            suggested_task: suggested_task?,
            title: title?,
            trigger: trigger?,
            pr_number: pr_number?,
            parent_conversation_id: parent_conversation_id?,
            agent_type: agent_type?,
            public: public?,
            plugins: plugins?,
            secrets: secrets?,
            tags: tags?,
            system_prompt: system_prompt?.filter(|text| !text.trim().is_empty()),
            disabled_skills: disabled_skills?,
            agent_profile_id: agent_profile_id?,
            agent_kind: agent_kind?,
        })
    }
}

fn read_skill_names(check: &mut Checker, value: &Value) -> Option<Vec<String>> {
    let names = list(check, value, |check, value| string_up_to(MAX_SKILL_NAME, check, value))?;
    if names.len() > MAX_DISABLED_SKILLS {
        check.report_too_long("List", MAX_DISABLED_SKILLS, names.len(), Value::Null);
        return None;
    }
    Some(names)
}

/// Agents of other makers, which speak the Agent Client Protocol, are not started here.
fn refuse_acp_server(check: &mut Checker, value: &Value) -> Option<()> {
    check.report_value_error("agents behind an ACP server cannot be started here: leave acp_server out", value.clone());
    None
}

/// A message to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SendMessageRequest {
    /// Defaults to `user`.
    pub role: Role,
    /// The parts of the message; may be empty.
    pub content: Vec<Content>,
    /// Whether the agent runs after the message. It has no effect in a start, which always runs the agent.
    pub run: bool,
}

impl SendMessageRequest {
    /// Parses a message in which every field is optional.
    pub fn read(check: &mut Checker, value: &Value) -> Option<Self> {
        let fields = Fields::of(check, value)?;
        let role = fields.or(check, "role", Role::User, literal);
        let content = fields.or(check, "content", Vec::new(), Content::read_list);
        let run = fields.or(check, "run", false, boolean);
        Some(Self { role: role?, content: content?, run: run? })
    }
}

/// A part of a message. In JSON: `{cache_prompt, type, text}` or `{cache_prompt, type, image_urls}`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// `type` is `text`.
    Text(TextContent),
    /// `type` is `image`.
    Image(ImageContent),
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct TextContent {
    /// Whether the model's provider should cache the prompt up to here.
    #[serde(default)]
    pub cache_prompt: bool,
    pub text: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ImageContent {
    /// Whether the model's provider should cache the prompt up to here.
    #[serde(default)]
    pub cache_prompt: bool,
    /// URLs of the images, or the images as `data:` URLs.
    pub image_urls: Vec<String>,
}

impl Content {
    /// Parses a list of parts.
    pub fn read_list(check: &mut Checker, value: &Value) -> Option<Vec<Self>> {
        list(check, value, Self::read)
    }

    /// Parses a part as text or, if that fails, as an image. If both fail, it reports the violations of both, under `TextContent` and
    /// `ImageContent`.
    pub fn read(check: &mut Checker, value: &Value) -> Option<Self> {
        let current = without_legacy_keys(value);
        let value = current.as_ref().unwrap_or(value);
        first_of(
            check,
            [
                ("TextContent", &|check| Self::read_text(check, value)),
                ("ImageContent", &|check| Self::read_image(check, value)),
            ],
        )
    }

    fn read_text(check: &mut Checker, value: &Value) -> Option<Self> {
        let fields = Fields::of(check, value)?;
        let cache_prompt = fields.or(check, "cache_prompt", false, boolean);
        let kind = fields.or(check, "type", (), |check, value| constant(check, value, "text"));
        let text = fields.required(check, "text", string);
        let clean = fields.forbid_others(check, &["cache_prompt", "type", "text"]);
        kind.filter(|()| clean)?;
        Some(Self::Text(TextContent { cache_prompt: cache_prompt?, text: text? }))
    }

    fn read_image(check: &mut Checker, value: &Value) -> Option<Self> {
        let fields = Fields::of(check, value)?;
        let cache_prompt = fields.or(check, "cache_prompt", false, boolean);
        let kind = fields.or(check, "type", (), |check, value| constant(check, value, "image"));
        let image_urls = fields.required(check, "image_urls", |check, value| list(check, value, string));
        kind?;
        Some(Self::Image(ImageContent { cache_prompt: cache_prompt?, image_urls: image_urls? }))
    }
}

/// Removes the key `enable_truncation`, which old clients send. The reference removes it before it parses either kind of part, so the
/// violations of both kinds show the part without it.
fn without_legacy_keys(value: &Value) -> Option<Value> {
    let mut entries = value.as_object().filter(|entries| entries.contains_key("enable_truncation"))?.clone();
    entries.shift_remove("enable_truncation");
    Some(Value::Object(entries))
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Content", 3)?;
        match self {
            Self::Text(text) => {
                out.serialize_field("cache_prompt", &text.cache_prompt)?;
                out.serialize_field("type", "text")?;
                out.serialize_field("text", &text.text)?;
            }
            Self::Image(image) => {
                out.serialize_field("cache_prompt", &image.cache_prompt)?;
                out.serialize_field("type", "image")?;
                out.serialize_field("image_urls", &image.image_urls)?;
            }
        }
        out.end()
    }
}

/// A task that a client suggests to the user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuggestedTask {
    /// The host of the repository.
    pub git_provider: ProviderType,
    pub task_type: TaskType,
    /// `owner/repo`.
    pub repo: String,
    /// Number of the issue or pull request.
    pub issue_number: i64,
    pub title: String,
}

impl SuggestedTask {
    fn read(check: &mut Checker, value: &Value) -> Option<Self> {
        // Violations may contain the whole task, so the copy has no URL credentials.
        let mut shown = value.clone();
        if let Some(Value::String(repo)) = shown.get_mut("repo") {
            *repo = without_credentials(repo);
        }
        let fields = Fields::of(check, &shown)?;
        let git_provider = fields.required(check, "git_provider", choice);
        let task_type = fields.required(check, "task_type", choice);
        let repo = fields.required(check, "repo", repository);
        let issue_number = fields.required(check, "issue_number", integer);
        let title = fields.required(check, "title", string);
        Some(Self {
            git_provider: git_provider?,
            task_type: task_type?,
            repo: repo?,
            issue_number: issue_number?,
            title: title?,
        })
    }
}

/// A plugin to load into the conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PluginSpec {
    /// `github:owner/repo`, a git URL or a path.
    pub source: String,
    /// Branch, tag or commit.
    pub r#ref: Option<String>,
    /// Folder in the repository: a relative path without `..` (path traversal check).
    pub repo_path: Option<String>,
    /// The user's values of the plugin's inputs.
    pub parameters: Option<Map<String, Value>>,
}

impl PluginSpec {
    /// Display name: the part of the source after its last slash.
    #[must_use]
    pub fn display_name(&self) -> &str {
        self.source.rsplit_once('/').map_or(&self.source, |(_, name)| name)
    }

    fn read(check: &mut Checker, value: &Value) -> Option<Self> {
        let fields = Fields::of(check, value)?;
        let source = fields.required(check, "source", string);
        let r#ref = fields.nullable(check, "ref", string);
        let repo_path = fields.nullable(check, "repo_path", read_repo_path);
        let parameters = fields.nullable(check, "parameters", dictionary);
        Some(Self { source: source?, r#ref: r#ref?, repo_path: repo_path?, parameters: parameters? })
    }
}

fn read_repo_path(check: &mut Checker, value: &Value) -> Option<String> {
    let path = string(check, value)?;
    if path.starts_with('/') {
        check.report_value_error("repo_path must be relative, not absolute", value.clone());
        return None;
    }
    if path.split('/').any(|part| part == "..") {
        check.report_value_error("repo_path cannot contain '..' (parent directory traversal)", value.clone());
        return None;
    }
    Some(path)
}

/// Secrets by name, in the order of the request.
///
/// Values are never serialised, only a mask is. Deserialised secrets therefore have names without values; a caller that needs the values
/// later must store them elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Secrets(Vec<(String, Option<SecretString>)>);

impl Secrets {
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// The secrets that have values.
    pub fn values(&self) -> impl Iterator<Item = (&str, &SecretString)> {
        self.0.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_ref()?)))
    }

    /// Parses the secrets. Violations: `dict_type`, `string_type`, and `too_long` or `string_too_long` at the limits. None contains a
    /// value.
    fn read(check: &mut Checker, value: &Value) -> Option<Self> {
        let Value::Object(entries) = value else {
            check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
            return None;
        };
        if entries.len() > MAX_SECRETS {
            secret::report_too_long(check, "Dictionary", MAX_SECRETS, entries.len());
            return None;
        }
        let read: Vec<_> = entries
            .iter()
            .map(|(name, value)| {
                let value = check.within(name.clone(), |check| read_secret(check, name, value))?;
                Some((name.clone(), Some(value)))
            })
            .collect();
        read.into_iter().collect::<Option<_>>().map(Self)
    }
}

fn read_secret(check: &mut Checker, name: &str, value: &Value) -> Option<SecretString> {
    if name.chars().count() > secret::MAX_NAME {
        let most = secret::MAX_NAME;
        let msg = format!("String should have at most {most} characters");
        let ctx = json!({"max_length": most});
        check.within("[key]", |check| {
            check.report("string_too_long", msg, name.into(), Some(ctx));
        });
        return None;
    }
    if let Some(fault) = secret::fault_of_name(name) {
        check.within("[key]", |check| check.report_value_error(fault, name.into()));
        return None;
    }
    secret::value_of_variable(check, value).map(Into::into)
}

impl FromIterator<(String, SecretString)> for Secrets {
    fn from_iter<I: IntoIterator<Item = (String, SecretString)>>(secrets: I) -> Self {
        Self(secrets.into_iter().map(|(name, value)| (name, Some(value))).collect())
    }
}

impl Serialize for Secrets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            // An empty secret serialises as an empty text, as in pydantic.
            let empty = value.as_ref().is_some_and(|value| value.expose_secret().is_empty());
            out.serialize_entry(name, if empty { "" } else { MASK })?;
        }
        out.end()
    }
}

impl<'de> Deserialize<'de> for Secrets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let masked: Map<String, Value> = Map::deserialize(deserializer)?;
        let secret = |(name, value): (String, Value)| (name, (value == "").then(SecretString::default));
        Ok(Self(masked.into_iter().map(secret).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::pydantic::validation::{Violation, float};

    const JSON: Option<&str> = Some("application/json");

    fn lines(file: &str) -> impl Iterator<Item = Value> {
        file.lines().map(|line| serde_json::from_str(line).unwrap())
    }

    fn coercions() -> impl Iterator<Item = Value> {
        lines(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/coercions.jsonl")))
    }

    fn detail(violations: Vec<Violation>) -> Value {
        serde_json::to_value(violations).unwrap()
    }

    fn read(body: &Value) -> Checked<StartRequest> {
        StartRequest::from_body(JSON, body.to_string().as_bytes())
    }

    #[test]
    fn answers_recorded_requests() {
        let file = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/replay-post.jsonl"));
        let mut refused = 0;
        for case in lines(file) {
            let label = case["label"].as_str().unwrap();
            let body = &case["request"]["body"];
            let bytes = match body {
                Value::Null => String::new(),
                // These cases hold the raw body.
                Value::String(raw) if label.starts_with("raw: ") => raw.clone(),
                body => body.to_string(),
            };
            let content_type = case["request"]["headers"].get("content-type").and_then(Value::as_str);
            let read = StartRequest::from_body(content_type, bytes.as_bytes());
            let response = &case["response"];
            match (response["status"].as_i64().unwrap(), read) {
                (422, Err(violations)) => {
                    assert_eq!(detail(violations), response["body"]["detail"], "{label}");
                    refused += 1;
                }
                (200, Ok(mut request)) => {
                    if label == "parent ok" {
                        // The sandbox is inherited from the parent.
                        request.sandbox_id = Some("sbx-a".to_owned());
                    }
                    let shown = serde_json::to_string(&request).unwrap();
                    assert_eq!(shown, response["body"]["request"].to_string(), "{label}");
                    let again: StartRequest = serde_json::from_str(&shown).unwrap();
                    assert_eq!(serde_json::to_string(&again).unwrap(), shown, "{label}");
                }
                // This fails during the creation of the task, not during the parsing of the body.
                (500, Ok(request)) => assert!(request.suggested_task.is_some(), "{label}"),
                (status, read) => panic!("{label}: {status}, {read:?}"),
            }
        }
        assert!(refused > 15, "only {refused}");
    }

    /// Recorded with pydantic 2.12.5 under FastAPI 0.128, from models with the contract's fields.
    #[test]
    fn coerces_as_recorded() {
        let mut wrong = Vec::new();
        for case in coercions().filter(|case| case["at"] == "start") {
            let body = case["body"].as_str().unwrap();
            let content_type =
                case.get("type").map_or("application/json", |content_type| content_type.as_str().unwrap());
            let found = match StartRequest::from_body(Some(content_type), body.as_bytes()) {
                Ok(request) => serde_json::to_value(request).unwrap(),
                Err(violations) => detail(violations),
            };
            let expected = match case.get("value") {
                Some(value) => {
                    let mut expected = serde_json::to_value(StartRequest::default()).unwrap();
                    expected.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
                    expected
                }
                None => case["detail"].clone(),
            };
            if found != expected {
                wrong.push(format!("{body}: {found} instead of {expected}"));
            }
        }
        assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn reads_floats_as_recorded() {
        for case in coercions().filter(|case| case["at"] == "float") {
            let body: Value = serde_json::from_str(case["body"].as_str().unwrap()).unwrap();
            let Some(value) = body.get("f").filter(|value| !value.is_null()) else {
                continue;
            };
            let mut check = Checker::new("body");
            let read = check.within("f", |check| float(check, value));
            match check.finish(read) {
                Ok(float) => assert_eq!(Some(float), case["value"].as_f64(), "{body}"),
                Err(violations) => assert_eq!(detail(violations), case["detail"], "{body}"),
            }
        }
    }

    #[test]
    fn refuses_what_python_reads_and_we_cannot() {
        let cases: [(&[u8], i64); 6] = [
            (b"{\"a\": NaN}", 6),
            (b"{\"a\": -Infinity}", 6),
            (b"[1e999]", 1),
            (b"\"\\ud800\"", 2),
            (b"{\"\xc3\xa9\": \"\xff\"}", 7),
            // A body in UTF-16.
            (b"\xff\xfe{}", 0),
        ];
        for (body, at) in cases {
            let violations = detail(StartRequest::from_body(JSON, body).unwrap_err());
            assert_eq!(violations[0]["type"], "json_invalid");
            assert_eq!(violations[0]["loc"], json!(["body", at]), "{body:?}");
        }
    }

    #[test]
    fn survives_deep_nesting() {
        for body in ["[".repeat(1_000_000), "{\"a\":".repeat(1_000_000)] {
            let violations = StartRequest::from_body(JSON, body.as_bytes()).unwrap_err();
            assert_eq!(violations[0].kind, "json_invalid");
        }
        let fine = format!("{{\"x\":{}{}}}", "[".repeat(120), "]".repeat(120));
        StartRequest::from_body(JSON, fine.as_bytes()).unwrap();
    }

    #[test]
    fn never_shows_a_secret() {
        let request = read(&json!({"secrets": {"B": "hunter2", "A": ""}, "title": "t"})).unwrap();
        let values: Vec<(&str, &str)> = request
            .secrets
            .iter()
            .flat_map(Secrets::values)
            .map(|(name, value)| (name, value.expose_secret()))
            .collect();
        assert_eq!(values, [("B", "hunter2"), ("A", "")]);
        let shown = serde_json::to_string(&request).unwrap();
        assert!(shown.ends_with(r#""plugins":null,"secrets":{"B":"**********","A":""}}"#), "{shown}");
        assert!(!format!("{request:?}").contains("hunter2"));

        let again: StartRequest = serde_json::from_str(&shown).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), shown);
        let secrets = again.secrets.unwrap();
        assert_eq!(secrets.names().collect::<Vec<_>>(), ["B", "A"]);
        assert_eq!(secrets.values().count(), 1, "a mask is not a value");

        let absent = serde_json::to_string(&read(&json!({"secrets": null})).unwrap()).unwrap();
        assert!(!absent.contains("secrets"));
    }

    #[test]
    fn fields_of_later_versions_are_read_or_refused() {
        let profile = "b704a292-9166-4871-83f0-f2c3a805d5d4";
        let body = json!({"tags": {"team": "a"}, "system_prompt": "Be brief.", "disabled_skills": ["docker"],
            "agent_profile_id": profile, "agent_kind": "openhands", "acp_server": null});
        let request = read(&body).unwrap();
        let shown = serde_json::to_value(&request).unwrap();
        for field in ["tags", "system_prompt", "disabled_skills", "agent_profile_id", "agent_kind"] {
            assert_eq!(shown[field], body[field], "{field}");
        }
        let again: StartRequest = serde_json::from_value(shown.clone()).unwrap();
        assert_eq!(serde_json::to_value(again).unwrap(), shown);
        let empty = json!({"tags": null, "system_prompt": " ", "disabled_skills": null, "agent_profile_id": null, "agent_kind": null});
        let shown = serde_json::to_value(read(&empty).unwrap()).unwrap();
        assert!(empty.as_object().unwrap().keys().all(|field| shown.get(field).is_none()), "{shown}");
        for (body, kind, loc) in [
            (json!({"tags": {"A": "x"}}), "value_error", json!(["body", "tags", "A", "[key]"])),
            (json!({"system_prompt": 1}), "string_type", json!(["body", "system_prompt"])),
            (json!({"disabled_skills": "docker"}), "list_type", json!(["body", "disabled_skills"])),
            (json!({"disabled_skills": vec!["a"; 1001]}), "too_long", json!(["body", "disabled_skills"])),
            (json!({"disabled_skills": ["a".repeat(257)]}), "string_too_long", json!(["body", "disabled_skills", 0])),
            (json!({"agent_profile_id": "default"}), "uuid_parsing", json!(["body", "agent_profile_id"])),
            (json!({"agent_kind": "acp"}), "literal_error", json!(["body", "agent_kind"])),
            (json!({"acp_server": "codex"}), "value_error", json!(["body", "acp_server"])),
        ] {
            let violations = detail(read(&body).unwrap_err());
            assert_eq!((&violations[0]["type"], &violations[0]["loc"]), (&json!(kind), &loc));
        }
    }

    #[test]
    fn limits_secrets() {
        let many: Map<String, Value> = (0..51).map(|i| (format!("S{i}"), "hunter2".into())).collect();
        let cases = [
            (json!(many), "too_long", json!(["body", "secrets"])),
            (json!("hunter2"), "dict_type", json!(["body", "secrets"])),
            (json!({"A": "hunter2".repeat(10_000)}), "too_long", json!(["body", "secrets", "A"])),
            (json!({"A": ["hunter2"]}), "string_type", json!(["body", "secrets", "A"])),
            (json!({"A".repeat(257): "x"}), "string_too_long", json!(["body", "secrets", "A".repeat(257), "[key]"])),
            (json!({"A-B": "hunter2"}), "value_error", json!(["body", "secrets", "A-B", "[key]"])),
            (json!({"A": "x", "PATH": "hunter2"}), "value_error", json!(["body", "secrets", "PATH", "[key]"])),
            (json!({"A": "hunter2\u{1a}"}), "value_error", json!(["body", "secrets", "A"])),
        ];
        for (secrets, kind, loc) in cases {
            let violations = detail(read(&json!({"secrets": secrets})).unwrap_err());
            assert_eq!(violations[0]["type"], kind);
            assert_eq!(violations[0]["loc"], loc);
            assert!(!violations.to_string().contains("hunter2"), "{violations}");
        }
        let most: Map<String, Value> = (0..50).map(|i| (format!("S{i}"), "x".repeat(65536).into())).collect();
        read(&json!({"secrets": most})).unwrap();
    }

    #[test]
    fn refuses_processors_that_are_no_objects() {
        for value in [json!(1), json!(null), json!([]), json!("SetTitleCallbackProcessor")] {
            let violations = detail(read(&json!({"processors": [value]})).unwrap_err());
            assert_eq!(violations[0]["type"], "model_attributes_type");
            assert_eq!(violations[0]["loc"], json!(["body", "processors", 0]));
        }
    }

    #[test]
    fn names_plugins_by_the_end_of_their_source() {
        for (source, name) in [("github:owner/repo", "repo"), ("plain", "plain"), ("/a/b/", "")] {
            let plugin = PluginSpec { source: source.into(), r#ref: None, repo_path: None, parameters: None };
            assert_eq!(plugin.display_name(), name);
        }
    }
}
