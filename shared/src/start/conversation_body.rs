//! Builds the body of the agent server's `POST /api/conversations`: the same body that the reference sends for the same settings and the
//! same request.
//!
//! The agent server has defaults for most fields, but the body contains every field, as in the reference. The control plane then determines
//! the conversation's configuration, and the agent server's version does not change it.

use std::collections::{BTreeMap, BTreeSet};

use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::llm_body::{LlmUse, llm_body};
use super::request::{AgentType, Content, Secrets, SendMessageRequest, StartRequest};
use crate::agent_server::SkillInfo;
use crate::clock::Time;
use crate::config::StartConfig;
use crate::error::Result;
use crate::http::secret::{self, InTerminal};
use crate::id::{self, UserId};
use crate::user::agent_profiles::AgentProfile;
use crate::user::git::ProviderType;
use crate::user::llm::Llm;
use crate::user::settings::Settings;
use crate::user::token::TokenKey;

/// Default of `condenser_max_size`.
const CONDENSER_MAX_SIZE: u32 = 240;

/// Default of `max_iterations`.
const MAX_ITERATIONS: i64 = 500;

/// The fields of the condenser that the settings may replace, besides its size.
const OWN_CONDENSER_FIELDS: [&str; 5] = [
    "max_tokens",
    "keep_first",
    "minimum_progress",
    "hard_context_reset_max_retries",
    "hard_context_reset_context_scaling",
];

const BROWSER: &str = "browser_tool_set";

/// The template of the system prompt of agents that write code.
const DEFAULT_PROMPT: &str = "system_prompt.j2";

/// The name of the search service's MCP server. A search key adds it.
const SEARCH_SERVER: &str = "tavily";

/// A text for the agent that is appended to the description of a secret that is too long together with others.
const NAME_ALONE: &str =
    "long: name it once in a command of its own, where it is the only long one; it then stays set in the terminal";

/// The inputs of [`conversation_body`].
#[derive(Debug)]
pub struct ConversationInputs<'a> {
    /// The owner of the conversation.
    pub user: &'a UserId,
    pub sandbox_id: &'a str,
    pub conversation_id: Uuid,
    pub request: &'a StartRequest,
    pub settings: &'a Settings,
    /// The working directory of the agent.
    pub project_dir: &'a str,
    /// The skills that apply, disabled ones included.
    pub skills: &'a [SkillInfo],
    /// The project's hooks in the agent server's form.
    pub hooks: Option<Value>,
    /// Whether the sandbox has a browser.
    pub browser: bool,
    /// Whether the agent's model streams its output to connected clients, see
    /// [`crate::agent_server::version::AgentServerVersion::streams_to_clients_only`]. Condensers never stream: no client reads their
    /// output.
    pub streaming: bool,
    /// Whether the agent server reads a security analyzer and a system prompt, see
    /// [`crate::agent_server::version::AgentServerVersion::has_extended_create`].
    pub extended: bool,
    /// Names of enabled MCP servers that are left out.
    pub mcp_servers_left_out: &'a [String],
    pub config: &'a StartConfig,
    /// Signs the tokens with which agents fetch secrets.
    pub token_key: &'a TokenKey,
    pub now: Time,
}

/// A request body with the values that the saga uses later.
#[derive(Debug)]
pub struct ConversationBody {
    /// The body, with secrets in clear text.
    pub json: Value,
    /// The model name that the agent uses.
    pub llm_model: String,
    /// The secrets that the agent does not get, with reasons, and the secrets that it cannot use in one command.
    pub secrets_in_terminal: InTerminal,
}

/// Neither the request nor the settings name a model.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("No model: set LLM_MODEL (or llm_model in the settings), or name one in the request's llm_model")]
pub struct MissingModel;

/// Builds the request body.
///
/// # Errors
/// The inner error is [`MissingModel`]; [`crate::Error::Internal`] if a token cannot be signed.
pub fn conversation_body(
    inputs: &ConversationInputs<'_>,
) -> Result<std::result::Result<ConversationBody, MissingModel>> {
    let ConversationInputs { request, settings, .. } = inputs;
    let llm = match llm_of_start(request, settings) {
        Ok(llm) => llm,
        Err(missing) => return Ok(Err(missing)),
    };
    let usage = LlmUse { user: inputs.user, conversation_id: inputs.conversation_id, config: inputs.config };
    let profile = profile_of(settings);
    let plan = request.agent_type == AgentType::Plan;
    let mut agent_llm = llm_body(usage, &llm, "agent");
    agent_llm["stream"] = inputs.streaming.into();
    let llm_model = agent_llm["model"].as_str().unwrap_or_default().to_owned();
    let (secrets, secrets_in_terminal) = secrets(inputs)?;
    let (tools, prompt, prompt_arguments) = if plan {
        let path = format!("{}/{}/PLAN.md", inputs.project_dir, plan_folder(request.git_provider));
        (
            json!([tool("glob"), tool("grep"), {"name": "planning_file_editor", "params": {"plan_path": path}}]),
            "system_prompt_planning.j2",
            json!({"plan_structure": PLAN_STRUCTURE, "llm_security_analyzer": true}),
        )
    } else {
        (tools(inputs), DEFAULT_PROMPT, json!({"cli_mode": false, "llm_security_analyzer": true}))
    };
    let mut json = json!({
        "workspace": {"working_dir": inputs.project_dir, "kind": "LocalWorkspace"},
        "conversation_id": id::dashed(inputs.conversation_id),
        "confirmation_policy": confirmation_policy(settings),
        "initial_message": initial_message(request),
        "max_iterations": settings.max_iterations.filter(|most| *most > 0).unwrap_or(MAX_ITERATIONS),
        "stuck_detection": true,
        "secrets": secrets,
        "tool_module_qualnames": {},
        "agent_definitions": [],
        "plugins": plugins(request),
        "hook_config": inputs.hooks,
        "autotitle": true,
        "agent": {
            "llm": agent_llm,
            "tools": tools,
            "mcp_config": mcp_config(inputs),
            "filter_tools_regex": null,
            "include_default_tools": ["FinishTool", "ThinkTool"],
            "agent_context": {
                "skills": wire_skills(inputs.skills, request, settings),
                "system_message_suffix": system_message_suffix(request, profile),
                "user_message_suffix": null,
                "load_user_skills": false,
                "load_public_skills": false,
                "marketplace_path": "marketplaces/default.json",
                "secrets": secrets,
                "current_datetime": inputs.now.naive(),
            },
            "system_prompt_filename": prompt,
            "security_policy_filename": "security_policy.j2",
            "system_prompt_kwargs": prompt_arguments,
            "condenser": condenser(inputs, &llm_body(usage, &llm, if plan { "planning_condenser" } else { "condenser" })),
            "critic": null,
            "tool_concurrency_limit": profile.and_then(AgentProfile::tool_concurrency_limit).unwrap_or(1),
            "kind": "Agent",
        },
    });
    // Versions that do not know tags ignore them.
    if let Some(tags) = &request.tags {
        json["tags"] = json!(tags);
    }
    if inputs.extended {
        extend(&mut json, request, settings);
    }
    Ok(Ok(ConversationBody { json, llm_model, secrets_in_terminal }))
}

/// Adds the security analyzer and the system prompt of the request.
fn extend(body: &mut Value, request: &StartRequest, settings: &Settings) {
    body["security_analyzer"] = match uses_llm_analyzer(settings) {
        true => json!({"kind": "LLMSecurityAnalyzer"}),
        false => Value::Null,
    };
    if let Some(prompt) = given(request.system_prompt.as_deref()) {
        let agent = &mut body["agent"];
        agent["system_prompt"] = prompt.into();
        // An agent server refuses a prompt together with any template but the default one.
        agent["system_prompt_filename"] = DEFAULT_PROMPT.into();
    }
}

/// The model of a start: that of the request, or else of the active profile, or else of the settings.
///
/// # Errors
/// [`MissingModel`] if none of them names a model.
pub fn llm_of_start(request: &StartRequest, settings: &Settings) -> std::result::Result<Llm, MissingModel> {
    let llm = settings.llm_of_start(request.llm_model.as_deref());
    if llm.model().is_some() { Ok(llm) } else { Err(MissingModel) }
}

/// The condenser of the conversation's history with this model; null if the user has turned it off.
fn condenser(inputs: &ConversationInputs<'_>, llm: &Value) -> Value {
    let settings = inputs.settings;
    let own = &settings.condenser;
    if settings.enable_default_condenser == Some(false) || own.get("condenser_kind").is_some_and(|kind| kind == "no_op")
    {
        return Value::Null;
    }
    let mut condenser = json!({
        "llm": llm,
        "max_size": settings.condenser_max_size.unwrap_or(CONDENSER_MAX_SIZE),
        "max_tokens": null,
        "keep_first": 2,
        "minimum_progress": 0.1,
        "hard_context_reset_max_retries": 5,
        "hard_context_reset_context_scaling": 0.8,
        "kind": "LLMSummarizingCondenser",
    });
    for name in OWN_CONDENSER_FIELDS {
        if let Some(value) = own.get(name) {
            condenser[name] = value.clone();
        }
    }
    condenser
}

fn given(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.trim().is_empty())
}

fn profile_of(settings: &Settings) -> Option<&AgentProfile> {
    settings.agent_profile.as_ref().map(|launch| &launch.profile)
}

/// The tools of an agent that writes code: those of its profile, or else the usual ones. A browser is left out where there is none.
fn tools(inputs: &ConversationInputs<'_>) -> Value {
    let usual = || ["terminal", "file_editor", "task_tracker", BROWSER].map(tool).to_vec();
    let chosen = profile_of(inputs.settings).and_then(AgentProfile::tools).and_then(Value::as_array).cloned();
    let mut tools = chosen.unwrap_or_else(usual);
    tools.retain(|tool| inputs.browser || tool["name"] != BROWSER);
    for tool in &mut tools {
        if tool["params"].is_null() {
            tool["params"] = json!({});
        }
    }
    tools.into()
}

fn tool(name: &str) -> Value {
    json!({"name": name, "params": {}})
}

fn exposed(secret: Option<&SecretString>) -> Option<&str> {
    given(secret.map(secrecy::ExposeSecret::expose_secret))
}

/// Custom secrets, then provider tokens under `<PROVIDER>_TOKEN`, of both those that the agent profile chooses, then the request's secrets;
/// later ones override earlier ones. Secrets that were stored before their names and values were validated, and cannot be environment
/// variables, are left out: they would make the agent lose other secrets as well.
fn secrets(inputs: &ConversationInputs<'_>) -> Result<(Map<String, Value>, InTerminal)> {
    let ConversationInputs { request, settings, config, .. } = inputs;
    let fixed = |value: &SecretString, description: Option<&str>| json!({"description": description, "value": value.expose_secret(), "kind": "StaticSecret"});
    let (mut sources, mut values) = (Map::new(), BTreeMap::new());
    for (name, secret) in &settings.custom_secrets {
        sources.insert(name.clone(), fixed(&secret.secret, given(secret.description.as_deref())));
        values.insert(name.clone(), &secret.secret);
    }
    for (provider, token) in &settings.provider_tokens.0 {
        let Some(value) = token.token.as_ref().filter(|token| !token.expose_secret().is_empty()) else { continue };
        let provider_name = provider.as_str().to_uppercase();
        let description = format!("{provider_name} authentication token");
        let source = match &config.web_url {
            // The agent fetches the token at each use, so that a renewed token reaches running agents.
            Some(web_url) => {
                let (sandbox, lifetime) = (inputs.sandbox_id, config.access_token_lifetime);
                let token = inputs.token_key.sign(inputs.user, *provider, sandbox, lifetime)?;
                json!({
                    "description": description,
                    "url": format!("{}/api/v1/webhooks/secrets", web_url.trim_end_matches('/')),
                    "headers": {"X-Access-Token": token.expose_secret()},
                    "kind": "LookupSecret",
                })
            }
            None => fixed(value, Some(&description)),
        };
        let name = format!("{provider_name}_TOKEN");
        sources.insert(name.clone(), source);
        values.insert(name, value);
    }
    if let Some(chosen) = profile_of(settings).and_then(AgentProfile::secrets) {
        sources.retain(|name, _| chosen.contains(name.as_str()));
        values.retain(|name, _| chosen.contains(name.as_str()));
    }
    for (name, value) in request.secrets.iter().flat_map(Secrets::values) {
        sources.insert(name.to_owned(), fixed(value, None));
        values.insert(name.to_owned(), value);
    }
    let found = secret::in_terminal(values.iter().map(|(name, value)| (name.as_str(), value.expose_secret())));
    sources.retain(|name, _| !found.left_out.values().flatten().any(|left_out| left_out == name));
    for name in &found.too_long_together {
        if let Some(source) = sources.get_mut(name) {
            let described = source["description"].as_str().map(|description| format!("{description}; {NAME_ALONE}"));
            source["description"] = described.unwrap_or_else(|| NAME_ALONE.to_owned()).into();
        }
    }
    Ok((sources, found))
}

/// The MCP servers of the agent.
fn mcp_config(inputs: &ConversationInputs<'_>) -> Map<String, Value> {
    let mut servers = mcp_servers(inputs.settings, inputs.config);
    servers.retain(|name, _| !inputs.mcp_servers_left_out.contains(name));
    servers
}

/// The user's MCP servers and the search service's, by name, with secrets. A user's server with the search service's name replaces it, even
/// if the user's server is disabled.
#[must_use]
pub fn mcp_servers(settings: &Settings, config: &StartConfig) -> Map<String, Value> {
    let mut servers = Map::new();
    let key = exposed(settings.search_api_key.as_ref()).or_else(|| exposed(config.tavily_api_key.as_ref()));
    if let Some(key) = key.filter(|_| !settings.mcp_config.names().any(|name| name == SEARCH_SERVER)) {
        let url = format!("https://mcp.tavily.com/mcp/?tavilyApiKey={key}");
        servers.insert(SEARCH_SERVER.to_owned(), json!({"url": url}));
    }
    servers.extend(settings.mcp_config.for_agent());
    if let Some(chosen) = profile_of(settings).and_then(AgentProfile::mcp_servers) {
        servers.retain(|name, _| chosen.contains(name.as_str()));
    }
    servers
}

fn confirmation_policy(settings: &Settings) -> Value {
    if !settings.confirmation_mode.unwrap_or_default() {
        return json!({"kind": "NeverConfirm"});
    }
    if uses_llm_analyzer(settings) {
        return json!({"kind": "ConfirmRisky", "threshold": "HIGH", "confirm_unknown": true});
    }
    json!({"kind": "AlwaysConfirm"})
}

/// Whether the user's settings select the model as security analyzer.
#[must_use]
pub fn uses_llm_analyzer(settings: &Settings) -> bool {
    settings.security_analyzer.as_deref().is_some_and(|analyzer| analyzer.eq_ignore_ascii_case("llm"))
}

/// The skills of the agent: none of those that the settings or the request disable.
fn wire_skills(skills: &[SkillInfo], request: &StartRequest, settings: &Settings) -> Vec<Value> {
    let lists = [&settings.disabled_skills, &request.disabled_skills];
    let disabled: BTreeSet<&String> = lists.into_iter().flatten().flatten().collect();
    let mut by_name: Vec<&SkillInfo> = Vec::new();
    for skill in skills.iter().filter(|skill| !disabled.contains(&skill.name)) {
        match by_name.iter_mut().find(|known| known.name == skill.name) {
            Some(known) => *known = skill,
            None => by_name.push(skill),
        }
    }
    by_name.into_iter().map(wire_skill).collect()
}

fn wire_skill(skill: &SkillInfo) -> Value {
    let trigger = if skill.triggers.is_empty() {
        Value::Null
    } else if skill.triggers.iter().any(|trigger| trigger.starts_with('/')) {
        json!({"type": "task", "triggers": skill.triggers})
    } else {
        json!({"type": "keyword", "keywords": skill.triggers})
    };
    json!({
        "name": skill.name,
        "content": skill.content,
        "trigger": trigger,
        "source": skill.source,
        "mcp_tools": null,
        "inputs": [],
        "is_agentskills_format": skill.is_agentskills_format,
        "description": skill.description,
        "license": null,
        "compatibility": null,
        "metadata": null,
        "allowed_tools": null,
        "resources": null,
    })
}

fn plugins(request: &StartRequest) -> Value {
    let Some(plugins) = request.plugins.as_ref().filter(|plugins| !plugins.is_empty()) else { return Value::Null };
    plugins
        .iter()
        .map(|plugin| json!({"source": plugin.source, "ref": plugin.r#ref, "repo_path": plugin.repo_path}))
        .collect()
}

/// The first message followed by the plugins' parameters, or the parameters alone if there is no message.
fn initial_message(request: &StartRequest) -> Value {
    let Some(parameters) = plugin_parameters(request) else { return json!(request.initial_message) };
    let Some(message) = &request.initial_message else {
        return json!({
            "role": "user",
            "content": [{"cache_prompt": false, "type": "text", "text": parameters.trim()}],
            "run": true,
        });
    };
    let SendMessageRequest { role, content, run } = message.clone();
    let mut content = content;
    match content.last_mut() {
        Some(Content::Text(text)) => text.text.push_str(&parameters),
        _ => content.push(Content::Text(super::request::TextContent {
            cache_prompt: false,
            text: parameters.trim().to_owned(),
        })),
    }
    json!(SendMessageRequest { role, content, run })
}

fn plugin_parameters(request: &StartRequest) -> Option<String> {
    let plugins = request.plugins.as_deref()?;
    let with_parameters: Vec<_> = plugins
        .iter()
        .filter_map(|plugin| Some((plugin, plugin.parameters.as_ref().filter(|parameters| !parameters.is_empty())?)))
        .collect();
    if with_parameters.is_empty() {
        return None;
    }
    let line = |(key, value): (&String, &Value)| format!("- {key}: {}", python_text(value));
    let lines: Vec<String> = match with_parameters.as_slice() {
        [(_, parameters)] => parameters.iter().map(line).collect(),
        several => several
            .iter()
            .flat_map(|(plugin, parameters)| {
                std::iter::once(format!("{}:", plugin.display_name()))
                    .chain(parameters.iter().map(|entry| format!("  {}", line(entry))))
            })
            .collect(),
    };
    Some(format!("\n\nPlugin Configuration Parameters:\n{}", lines.join("\n")))
}

/// A value in the form of Python's `str`, which agents have received so far.
fn python_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => python_repr(other),
    }
}

fn python_repr(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if text.contains('\'') && !text.contains('"') => format!("\"{text}\""),
        Value::String(text) => format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n")),
        Value::Array(items) => format!("[{}]", items.iter().map(python_repr).collect::<Vec<_>>().join(", ")),
        Value::Object(entries) => {
            let entries: Vec<_> = entries
                .iter()
                .map(|(key, value)| format!("{}: {}", python_repr(&Value::String(key.clone())), python_repr(value)))
                .collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

fn system_message_suffix(request: &StartRequest, profile: Option<&AgentProfile>) -> Option<String> {
    let suffix = request.system_message_suffix.clone();
    let suffix = match profile.and_then(AgentProfile::system_message_suffix) {
        Some(of_profile) => Some(match given(suffix.as_deref()) {
            Some(suffix) => format!("{of_profile}\n\n{suffix}"),
            None => of_profile.to_owned(),
        }),
        None => suffix,
    };
    if request.agent_type != AgentType::Plan {
        return suffix;
    }
    Some(match given(suffix.as_deref()) {
        Some(suffix) => format!("{PLANNING_BOUNDARIES}\n\n{suffix}"),
        None => PLANNING_BOUNDARIES.to_owned(),
    })
}

/// The folder of the project in which the plan is stored.
#[must_use]
pub fn plan_folder(provider: Option<ProviderType>) -> &'static str {
    match provider {
        // Some views of these providers hide folders with a leading dot.
        Some(ProviderType::Gitlab | ProviderType::AzureDevops) => "agents-tmp-config",
        _ => ".agents_tmp",
    }
}

const PLANNING_BOUNDARIES: &str = "<IMPORTANT_PLANNING_BOUNDARIES>
You write plans in this conversation, and nothing else. Read, ask and think, then put the plan into PLAN.md.
Do not carry the plan out, do not change any other file, and do not offer to do so: you have no means for it here.
Once the plan is complete, or whenever the user asks you to carry it out, tell them to press the **Build** button, or to
switch to the code agent with Shift+Tab: that agent will do the work that the plan describes.
</IMPORTANT_PLANNING_BOUNDARIES>";

const PLAN_STRUCTURE: &str = "The plan must follow this structure exactly:

1. OBJECTIVE
   - What is to be reached, in one or two sentences
   - What counts as done
2. CONTEXT SUMMARY
   - The parts of the project that matter here, with their paths
   - Constraints and conventions to keep
3. APPROACH OVERVIEW
   - The way chosen, and why
   - Other ways, and why they were not chosen
4. IMPLEMENTATION STEPS
   - The steps in order, each with its goal, its files and what it changes
   - What depends on what
5. TESTING AND VALIDATION
   - How each step is checked
   - Which commands show that the whole works";

#[cfg(test)]
mod tests {
    use secrecy::SecretSlice;

    use super::*;

    const RECORDED: &str =
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/agent-server/create-conversation.json"));

    struct Case {
        request: Value,
        settings: Value,
        config: StartConfig,
        skills: Vec<SkillInfo>,
        browser: bool,
        streaming: bool,
        extended: bool,
        mcp_servers_left_out: Vec<String>,
    }

    impl Case {
        fn new(request: Value, settings: Value) -> Self {
            Self {
                request,
                settings,
                config: StartConfig::default(),
                skills: Vec::new(),
                browser: true,
                streaming: false,
                extended: false,
                mcp_servers_left_out: Vec::new(),
            }
        }

        fn body(&self) -> Value {
            self.whole().json
        }

        fn whole(&self) -> ConversationBody {
            let request = self.request.to_string();
            let request = StartRequest::from_body(Some("application/json"), request.as_bytes()).expect("a request");
            let inputs = ConversationInputs {
                user: &UserId::local(),
                sandbox_id: "box",
                conversation_id: Uuid::parse_str("0513cae8-43c0-4dd7-aebc-f1c2dc0f9b8f").expect("an id"),
                request: &request,
                settings: &Settings::from_json(&self.settings.to_string())
                    .expect("settings")
                    .with_agent_profile(None)
                    .expect("a profile"),
                project_dir: "/workspace/project",
                skills: &self.skills,
                hooks: None,
                browser: self.browser,
                streaming: self.streaming,
                extended: self.extended,
                mcp_servers_left_out: &self.mcp_servers_left_out,
                config: &self.config,
                token_key: &SecretSlice::from(vec![7; 32]).into(),
                now: serde_json::from_str("\"2026-11-22T15:38:03.220904Z\"").expect("a time"),
            };
            conversation_body(&inputs).expect("a body").expect("a model")
        }
    }

    fn settings() -> Value {
        json!({"llm_model": "openai/stub", "llm_api_key": "sk-fake", "llm_base_url": "http://127.0.0.1:8099/v1"})
    }

    fn skill(name: &str, triggers: &[&str]) -> SkillInfo {
        SkillInfo {
            name: name.into(),
            content: format!("about {name}"),
            triggers: triggers.iter().map(ToString::to_string).collect(),
            source: None,
            description: None,
            is_agentskills_format: false,
        }
    }

    #[test]
    fn the_body_is_the_recorded_one_for_the_same_settings_and_request() {
        let recorded: Value = serde_json::from_str(RECORDED).expect("the recorded body");
        let case = Case::new(json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}}), settings());
        assert_eq!(case.body(), recorded);
    }

    #[test]
    fn only_the_agents_own_model_streams_and_only_where_it_is_wanted() {
        for (request, streaming) in [(json!({}), true), (json!({"agent_type": "plan"}), true), (json!({}), false)] {
            let case = Case { streaming, ..Case::new(request, settings()) };
            let agent = case.body()["agent"].clone();
            assert_eq!(
                (&agent["llm"]["stream"], &agent["condenser"]["llm"]["stream"]),
                (&json!(streaming), &json!(false))
            );
        }
    }

    #[test]
    fn newer_agent_servers_get_the_analyzer_and_the_prompt_at_once() {
        let request = json!({"agent_type": "plan", "tags": {"team": "a"}, "system_prompt": "Be brief."});
        let mut settings = settings();
        settings["security_analyzer"] = "llm".into();
        let mut case = Case::new(request, settings);
        let body = case.body();
        assert!(body.get("security_analyzer").is_none(), "{body}");
        assert_eq!(body["tags"], json!({"team": "a"}), "an older one ignores them");
        assert!(body["agent"].get("system_prompt").is_none());
        case.extended = true;
        let body = case.body();
        assert_eq!(body["security_analyzer"], json!({"kind": "LLMSecurityAnalyzer"}));
        assert_eq!(body["agent"]["system_prompt"], "Be brief.");
        assert_eq!(body["agent"]["system_prompt_filename"], "system_prompt.j2");
        let suffix = body["agent"]["agent_context"]["system_message_suffix"].as_str().expect("a suffix");
        assert!(suffix.starts_with("<IMPORTANT_PLANNING_BOUNDARIES>"), "{suffix}");
        case.request = json!({});
        case.settings["security_analyzer"] = Value::Null;
        let body = case.body();
        assert_eq!((&body["security_analyzer"], body.get("tags")), (&Value::Null, None));
    }

    #[test]
    fn an_agent_profile_chooses_tools_servers_secrets_and_text() {
        let mut settings = settings();
        settings["custom_secrets"] = json!({"A": {"secret": "a"}, "B": {"secret": "b"}});
        settings["provider_tokens"] = json!({"github": {"token": "ghp"}});
        settings["mcp_config"] = json!({"one": {"url": "https://one.example"}, "two": {"url": "https://two.example"}});
        settings["agent_profiles"] = json!({"active": "b704a292-9166-4871-83f0-f2c3a805d5d4", "profiles": {"p": {
            "id": "b704a292-9166-4871-83f0-f2c3a805d5d4", "revision": 1, "llm_profile_ref": "default",
            "tools": [{"name": "terminal"}, {"name": "browser_tool_set", "params": {"x": 1}}], "mcp_server_refs": ["two"],
            "secret_refs": ["B"], "system_message_suffix": "Be brief.", "tool_concurrency_limit": 3,
        }}});
        let request = json!({"secrets": {"C": "c"}, "system_message_suffix": "Answer in German."});
        let mut case = Case::new(request, settings);
        case.config.tavily_api_key = Some("key".into());
        let body = case.body();
        let agent = &body["agent"];
        assert_eq!(
            agent["tools"],
            json!([{"name": "terminal", "params": {}}, {"name": "browser_tool_set", "params": {"x": 1}}])
        );
        assert_eq!(agent["mcp_config"], json!({"two": {"url": "https://two.example"}}));
        assert_eq!(agent["tool_concurrency_limit"], 3);
        assert_eq!(agent["agent_context"]["system_message_suffix"], "Be brief.\n\nAnswer in German.");
        assert_eq!(body["secrets"].as_object().expect("secrets").keys().collect::<Vec<_>>(), ["B", "C"]);
        case.browser = false;
        case.request = json!({});
        let agent = case.body()["agent"].clone();
        assert_eq!(agent["tools"], json!([{"name": "terminal", "params": {}}]));
        assert_eq!(agent["agent_context"]["system_message_suffix"], "Be brief.");
        case.request = json!({"agent_type": "plan"});
        assert_eq!(case.body()["agent"]["tools"][0]["name"], "glob", "a planning agent has its own tools");
    }

    #[test]
    fn without_a_browser_its_tool_is_left_out() {
        let mut case = Case::new(json!({}), settings());
        case.browser = false;
        let tools = case.body()["agent"]["tools"].clone();
        assert_eq!(tools.as_array().map(Vec::len), Some(3));
        assert!(!tools.to_string().contains("browser"));
    }

    #[test]
    fn a_plan_agent_has_its_own_tools_prompt_and_place_for_the_plan() {
        let suffix = "Answer in German.";
        let request = json!({"agent_type": "plan", "git_provider": "gitlab", "system_message_suffix": suffix});
        let agent = Case::new(request, settings()).body()["agent"].clone();
        let names: Vec<_> = agent["tools"].as_array().expect("tools").iter().map(|tool| &tool["name"]).collect();
        assert_eq!(names, ["glob", "grep", "planning_file_editor"]);
        assert_eq!(agent["tools"][2]["params"]["plan_path"], "/workspace/project/agents-tmp-config/PLAN.md");
        assert_eq!(agent["system_prompt_filename"], "system_prompt_planning.j2");
        assert_eq!(agent["condenser"]["llm"]["usage_id"], "planning_condenser");
        let system_suffix = agent["agent_context"]["system_message_suffix"].as_str().expect("a suffix");
        assert!(
            system_suffix.starts_with("<IMPORTANT_PLANNING_BOUNDARIES>") && system_suffix.ends_with(suffix),
            "{system_suffix}"
        );
    }

    #[test]
    fn models_of_the_openhands_provider_are_rewritten_and_traced() {
        let mut case = Case::new(json!({"llm_model": "openhands/m"}), settings());
        let llm = case.body()["agent"]["llm"].clone();
        assert_eq!((&llm["model"], &llm["base_url"]), (&json!("litellm_proxy/m"), &json!("http://127.0.0.1:8099/v1")));
        assert_eq!(llm["litellm_extra_body"]["metadata"]["session_id"], "0513cae8-43c0-4dd7-aebc-f1c2dc0f9b8f");
        case.settings = json!({});
        assert_eq!(case.body()["agent"]["llm"]["base_url"], "https://llm-proxy.app.all-hands.dev/");
        case.request = json!({"llm_model": "azure/gpt"});
        assert_eq!(case.body()["agent"]["llm"]["api_version"], "2024-12-01-preview");
    }

    #[test]
    fn a_start_uses_the_requests_model_or_the_active_profile_or_the_settings() {
        let profiles = json!({"profiles": {
            "fast": {"model": "openai/fast", "api_key": "key-fast", "base_url": "http://fast"},
            "slow": {"model": "openai/slow", "api_key": "key-slow", "temperature": 0.5},
        }, "active": "fast"});
        let mut settings = settings();
        settings["llm_profiles"] = profiles;
        let llm = |request: Value, settings: &Value| {
            let body = Case::new(request, settings.clone()).whole();
            let llm = body.json["agent"]["llm"].clone();
            assert_eq!(body.llm_model, llm["model"]);
            assert_eq!(body.json["agent"]["condenser"]["llm"]["api_key"], llm["api_key"]);
            (llm["model"].clone(), llm["api_key"].clone(), llm["base_url"].clone(), llm["temperature"].clone())
        };
        let fast = (json!("openai/fast"), json!("key-fast"), json!("http://fast"), json!(null));
        assert_eq!(llm(json!({}), &settings), fast);
        let slow = (json!("openai/slow"), json!("key-slow"), json!(null), json!(0.5));
        assert_eq!(llm(json!({"llm_model": "openai/slow"}), &settings), slow);
        let other = (json!("openai/other"), json!("key-fast"), json!("http://fast"), json!(null));
        assert_eq!(llm(json!({"llm_model": "openai/other"}), &settings), other);
        settings["llm_profiles"]["active"] = Value::Null;
        let of_settings = (json!("openai/stub"), json!("sk-fake"), json!("http://127.0.0.1:8099/v1"), json!(null));
        assert_eq!(llm(json!({}), &settings), of_settings);
        assert_eq!(llm(json!({"llm_model": " "}), &settings), of_settings);
    }

    #[test]
    fn the_condenser_and_the_iterations_follow_the_settings() {
        let mut settings = settings();
        settings["agent_settings"] = json!({"condenser": {"keep_first": 4, "max_size": 100}});
        settings["conversation_settings"] = json!({"max_iterations": 7});
        let body = Case::new(json!({}), settings.clone()).body();
        let condenser = &body["agent"]["condenser"];
        assert_eq!(
            (&condenser["keep_first"], &condenser["max_size"], &body["max_iterations"]),
            (&json!(4), &json!(100), &json!(7))
        );
        settings["agent_settings"]["condenser"]["enabled"] = false.into();
        settings["max_iterations"] = 0.into();
        let body = Case::new(json!({}), settings).body();
        assert_eq!((&body["agent"]["condenser"], &body["max_iterations"]), (&Value::Null, &json!(500)));
    }

    #[test]
    fn confirmation_follows_the_settings() {
        for (mode, analyzer, kind) in [
            (json!(false), json!("llm"), "NeverConfirm"),
            (json!(null), json!(null), "NeverConfirm"),
            (json!(true), json!("LLM"), "ConfirmRisky"),
            (json!(true), json!("none"), "AlwaysConfirm"),
        ] {
            let mut settings = settings();
            settings["confirmation_mode"] = mode;
            settings["security_analyzer"] = analyzer;
            assert_eq!(Case::new(json!({}), settings).body()["confirmation_policy"]["kind"], kind);
        }
    }

    #[test]
    fn plugin_parameters_follow_the_first_message() {
        let plugin = |parameters: Value| json!({"source": "github:o/p", "parameters": parameters});
        let message = json!({"content": [{"type": "text", "text": "go", "cache_prompt": true}]});
        let text = |plugins: Value, message: Value| {
            let body = Case::new(json!({"plugins": plugins, "initial_message": message}), settings()).body();
            body["initial_message"]["content"][0]["text"].as_str().expect("a text").to_owned()
        };
        assert_eq!(
            text(json!([plugin(json!({"a": 1, "b": true}))]), message.clone()),
            "go\n\nPlugin Configuration Parameters:\n- a: 1\n- b: True"
        );
        assert_eq!(
            text(json!([plugin(json!({"a": "x"})), plugin(json!({"b": null}))]), json!(null)),
            "Plugin Configuration Parameters:\np:\n  - a: x\np:\n  - b: None"
        );
        assert_eq!(text(json!([{"source": "github:o/p"}]), message), "go");
    }

    #[test]
    fn secrets_are_looked_up_where_there_is_a_public_address_and_given_where_there_is_none() {
        let mut settings = settings();
        settings["provider_tokens"] = json!({"github": {"token": "ghp"}, "gitlab": {"token": ""}});
        settings["custom_secrets"] =
            json!({"A": {"secret": "s", "description": ""}, "GITHUB_TOKEN": {"secret": "old"}});
        let mut case = Case::new(json!({"secrets": {"B": "t"}}), settings);
        let fixed = case.body()["secrets"].clone();
        assert_eq!(fixed["A"], json!({"description": null, "value": "s", "kind": "StaticSecret"}));
        assert_eq!(fixed["B"]["value"], "t");
        assert_eq!(fixed["GITHUB_TOKEN"]["value"], "ghp");
        assert_eq!(fixed["GITHUB_TOKEN"]["description"], "GITHUB authentication token");
        assert!(fixed.get("GITLAB_TOKEN").is_none());

        case.config.web_url = Some("https://app.example/".into());
        let looked_up = case.body()["secrets"]["GITHUB_TOKEN"].clone();
        assert_eq!(looked_up["url"], "https://app.example/api/v1/webhooks/secrets");
        assert_eq!(looked_up["headers"]["X-Access-Token"].as_str().expect("a token").split('.').count(), 3);
        assert!(!looked_up.to_string().contains("ghp"));
        // A secret of the request overrides a stored token of the same name.
        case.request["secrets"] = json!({"GITHUB_TOKEN": "of the start", "github_token": "another variable"});
        let of_start = case.body()["secrets"].clone();
        assert_eq!(
            (&of_start["GITHUB_TOKEN"]["value"], &of_start["A"]["value"]),
            (&json!("of the start"), &json!("s"))
        );
        assert_eq!(of_start["github_token"]["value"], "another variable");
    }

    #[test]
    fn secrets_that_cannot_be_variables_are_left_out_and_named() {
        let mut settings = settings();
        settings["custom_secrets"] = json!({
            "GOOD": {"secret": "s"}, "MY-X": {"secret": "s"}, "1ST": {"secret": "s"}, "UID": {"secret": "s"},
            "LD_PRELOAD": {"secret": "s"}, "NULS": {"secret": "a\0"}, "LONG": {"secret": "x".repeat(16_000)},
            "QUOTES": {"secret": "'".repeat(9_000)}, "KEY": {"secret": "a\n".repeat(5_000)},
        });
        let case = Case::new(json!({"secrets": {"TOO_LONG": "x".repeat(65_536), "B": "t"}}), settings);
        let body = case.body();
        let names = |secrets: &Value| secrets.as_object().expect("secrets").keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&body["secrets"]), ["GOOD", "KEY", "B"]);
        assert_eq!(body["agent"]["agent_context"]["secrets"], body["secrets"]);
        let mut left_out = case.whole().secrets_in_terminal.left_out.into_values().collect::<Vec<_>>();
        left_out.sort();
        let expected = [&["1ST", "MY-X"][..], &["LD_PRELOAD"], &["LONG", "QUOTES", "TOO_LONG"], &["NULS"], &["UID"]];
        assert_eq!(left_out, expected);
    }

    #[test]
    fn tokens_of_providers_are_variables_too() {
        for (stored, is_left_out) in
            [("ghp", false), ("gh\u{3}p", true), ("gh\0p", true), (&*"x".repeat(16_000), true), ("'\\\n", false)]
        {
            for web_url in [None, Some("https://app.example".to_owned())] {
                let mut settings = settings();
                settings["provider_tokens"] = json!({"github": {"token": stored}, "gitlab": {"token": "glp"}});
                // The provider token overrides a custom secret of the same name, even if the token is invalid.
                settings["custom_secrets"] = json!({"GITHUB_TOKEN": {"secret": "old"}});
                let mut case = Case::new(json!({}), settings);
                case.config.web_url = web_url;
                let ConversationBody { json, secrets_in_terminal, .. } = case.whole();
                assert_eq!(json["secrets"].get("GITHUB_TOKEN").is_none(), is_left_out, "{stored:.20?}");
                assert!(json["secrets"].get("GITLAB_TOKEN").is_some());
                let names = secrets_in_terminal.left_out.into_values().flatten().collect::<Vec<_>>();
                assert_eq!(names, ["GITHUB_TOKEN"][usize::from(!is_left_out)..], "{stored:.20?}");
            }
        }
        // An invalid secret that another one overrides is not reported.
        let mut settings = settings();
        settings["custom_secrets"] = json!({"GITHUB_TOKEN": {"secret": "a\0"}});
        settings["provider_tokens"] = json!({"github": {"token": "ghp"}});
        assert_eq!(Case::new(json!({}), settings).whole().secrets_in_terminal, InTerminal::default());
    }

    #[test]
    fn an_agent_learns_which_secrets_are_too_long_for_one_command() {
        let long = "x".repeat(9_000);
        let mut settings = settings();
        settings["custom_secrets"] = json!({
            "A": {"secret": long, "description": "a key"}, "B": {"secret": long}, "C": {"secret": "s", "description": "small"},
        });
        let ConversationBody { json, secrets_in_terminal, .. } = Case::new(json!({}), settings).whole();
        assert_eq!(secrets_in_terminal.too_long_together, ["A", "B"]);
        let description = |name: &str| json["secrets"][name]["description"].as_str().unwrap_or_default().to_owned();
        assert_eq!(description("A"), format!("a key; {NAME_ALONE}"));
        assert_eq!((description("B"), description("C")), (NAME_ALONE.to_owned(), "small".to_owned()));
    }

    #[test]
    fn mcp_servers_come_from_the_settings_and_the_search_key_and_not_from_the_address() {
        let mut settings = settings();
        settings["mcp_config"] = json!({"mine": {"url": "https://m.example/mcp", "enabled": true}});
        let mut case = Case::new(json!({}), settings);
        let servers = |case: &Case| case.body()["agent"]["mcp_config"].clone();
        assert_eq!(servers(&case), json!({"mine": {"url": "https://m.example/mcp"}}));
        // The control plane serves no MCP, so a public address adds no server.
        case.config.web_url = Some("https://app.example".into());
        assert_eq!(servers(&case), json!({"mine": {"url": "https://m.example/mcp"}}));
        case.config.tavily_api_key = Some("of-the-server".into());
        assert_eq!(servers(&case)["tavily"], json!({"url": "https://mcp.tavily.com/mcp/?tavilyApiKey=of-the-server"}));
        case.settings["search_api_key"] = "tav".into();
        case.config.web_url = None;
        assert_eq!(servers(&case)["tavily"], json!({"url": "https://mcp.tavily.com/mcp/?tavilyApiKey=tav"}));
        case.mcp_servers_left_out = vec!["tavily".to_owned(), "unknown".to_owned()];
        assert_eq!(servers(&case), json!({"mine": {"url": "https://m.example/mcp"}}));
        case.mcp_servers_left_out.clear();
        case.settings["mcp_config"]["tavily"] = json!({"url": "https://t.example", "enabled": false});
        assert_eq!(servers(&case), json!({"mine": {"url": "https://m.example/mcp"}}));
        case.settings["mcp_config"] = Value::Null;
        case.settings["search_api_key"] = Value::Null;
        case.config.tavily_api_key = None;
        assert_eq!(servers(&case), json!({}));
    }

    #[test]
    fn disabled_skills_are_left_out_and_later_ones_replace_earlier_ones() {
        let mut settings = settings();
        settings["disabled_skills"] = json!(["off"]);
        let mut case = Case::new(json!({"disabled_skills": ["off here"]}), settings);
        case.skills = vec![
            skill("a", &[]),
            skill("off", &[]),
            skill("off here", &[]),
            skill("b", &["word"]),
            skill("c", &["/do", "x"]),
            skill("a", &["new"]),
        ];
        let skills = case.body()["agent"]["agent_context"]["skills"].clone();
        let triggers: Vec<_> =
            skills.as_array().expect("skills").iter().map(|skill| (&skill["name"], &skill["trigger"])).collect();
        let name = |name: &'static str| json!(name);
        assert_eq!(
            triggers,
            [
                (&name("a"), &json!({"type": "keyword", "keywords": ["new"]})),
                (&name("b"), &json!({"type": "keyword", "keywords": ["word"]})),
                (&name("c"), &json!({"type": "task", "triggers": ["/do", "x"]})),
            ]
        );
    }
}
