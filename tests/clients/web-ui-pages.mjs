// The pages of the web UI beside its conversations: each function does what a user does there, and checks what the API has afterwards.

import assert from "node:assert/strict";

import { ATTEMPT, choose, repeat, started, write } from "./browser.mjs";
import { LIMIT, until } from "./server.mjs";

const KEY = "key-of-a-model";

async function get(url, path) {
  const response = await fetch(`${url}${path}`);
  assert.equal(response.status, 200, path);
  const text = await response.text();
  assert.ok(!text.includes(KEY), `${path} shows a secret`);
  return JSON.parse(text);
}

/** The first dialog, of a server without a model: a model from the lists, which becomes the first profile. */
export async function firstDialog(page, url, say, picture) {
  await page.goto(url);
  // Agents of other kinds are not supported, and hidden.
  await page.getByTestId("onboarding-agent-option-openhands").waitFor();
  await page.getByTestId("onboarding-agent-option-codex").waitFor({ state: "hidden" });
  await picture("first-dialog-agents");
  await page.getByTestId("onboarding-agent-next").click();
  const step = page.getByTestId("onboarding-step-setup-llm");
  await choose(page, step.getByTestId("llm-provider-input"), "Anthropic");
  await choose(page, step.getByTestId("llm-model-input"), "claude-sonnet-4-5-20250929");
  await step.getByTestId("llm-api-key-input").fill(KEY);
  await picture("first-dialog");
  const close = page.getByTestId("onboarding-hello-close");
  await step.getByTestId("onboarding-llm-next").click();
  await until("the settings have the model", LIMIT, async () => {
    const response = await fetch(`${url}/api/v1/settings`);
    return response.ok && (await response.json()).llm_model === "anthropic/claude-sonnet-4-5-20250929";
  });
  await repeat("the dialog is closed", () => close.click(ATTEMPT), page.getByTestId("chat-input"));
  await page.getByTestId("chat-input-llm-profile").getByText("default", { exact: true }).waitFor();
  await picture("after-the-first-dialog");
  assert.deepEqual(await get(url, "/api/v1/settings/profiles"), {
    profiles: [
      { name: "default", model: "anthropic/claude-sonnet-4-5-20250929", base_url: "https://api.anthropic.com", api_key_set: true },
    ],
    active_profile: "default",
  });
  say("its first dialog saved a model from the lists, which is the first profile");
}

/** Adds LLM profiles, from the lists and typed; renames, changes and deletes one. `fast` and `default` remain. */
export async function llmProfiles(page, url, say, picture) {
  const stored = () => get(url, "/api/v1/settings/profiles");
  const rows = page.getByTestId("profile-row");
  const row = (name) => rows.filter({ has: page.getByText(name, { exact: true }) });
  const name = page.getByTestId("profile-name-input");
  const key = page.getByTestId("llm-api-key-input");
  const add = () => repeat("a profile can be added", () => page.getByTestId("add-llm-profile").click(ATTEMPT), name);
  const save = () => repeat("the profile is saved", () => page.getByTestId("save-profile-btn").click(ATTEMPT), name, "hidden");
  const act = async (of, action, effect) => {
    const entry = page.getByTestId(action);
    await repeat(`the menu of ${of} is open`, () => row(of).getByTestId("profile-menu-trigger").click(ATTEMPT), entry);
    await entry.click(ATTEMPT);
    await effect.waitFor();
  };
  await page.goto(`${url}/settings/llm`);
  await row("default").getByTestId("profile-active-badge").waitFor();
  // Keys that profiles share are not supported, and their part of the page is hidden.
  await page.getByTestId("add-provider-connection").waitFor({ state: "hidden" });
  const [{ base_url: script }] = (await stored()).profiles;

  const basic = page.getByTestId("llm-settings-form-basic");
  await add();
  await repeat("the lists are shown", () => page.getByTestId("sdk-section-basic-toggle").click(ATTEMPT), basic);
  await choose(page, page.getByTestId("llm-provider-input"), "Anthropic");
  await choose(page, page.getByTestId("llm-model-input"), "claude-sonnet-4-5-20250929");
  await page.getByTestId("llm-auth-type-input").waitFor({ state: "hidden" });
  await key.fill(KEY);
  await name.fill("claude");
  await picture("profile-from-lists");
  await save();
  await row("claude").getByText("anthropic/claude-sonnet-4-5-20250929").waitFor();

  const model = page.getByTestId("llm-custom-model-input");
  const advanced = () => repeat("all fields are shown", () => page.getByTestId("sdk-section-advanced-toggle").click(ATTEMPT), model);
  await add();
  await advanced();
  await model.fill("openai/scripted-fast");
  await page.getByTestId("base-url-input").fill(script);
  await key.fill(KEY);
  await name.fill("fast");
  await save();
  await row("fast").waitFor();
  const fast = { name: "fast", model: "openai/scripted-fast", base_url: script, api_key_set: true };
  const claude = { name: "claude", model: "anthropic/claude-sonnet-4-5-20250929", base_url: "https://api.anthropic.com", api_key_set: true };
  const { profiles: added, active_profile: active } = await stored();
  assert.deepEqual([added.slice(1), active], [[claude, fast], "default"]);
  await picture("profiles");
  say("added LLM profiles from the lists and with a model of its own");

  // The key is not shown, and stays when another field is saved.
  const newName = page.getByTestId("rename-profile-input");
  await act("claude", "profile-rename", newName);
  await newName.fill("sonnet");
  await repeat("it is renamed", () => page.getByTestId("rename-profile-submit").click(ATTEMPT), newName, "hidden");
  await row("sonnet").waitFor();
  await act("sonnet", "profile-edit", name);
  await advanced();
  await page.getByTestId("base-url-input").fill("https://proxy.example/v1");
  await save();
  const sonnet = { ...claude, name: "sonnet", base_url: "https://proxy.example/v1" };
  assert.deepEqual((await stored()).profiles.slice(1), [sonnet, fast]);
  const confirm = page.getByTestId("delete-profile-confirm");
  await act("sonnet", "profile-delete", confirm);
  await repeat("it is deleted", () => confirm.click(ATTEMPT), row("sonnet"), "hidden");
  assert.deepEqual((await stored()).profiles.slice(1), [fast]);
  say("renamed a profile, changed it without its key, and deleted it");
}

/** Adds an agent profile, starts a conversation with it, and deletes both. */
export async function agentProfiles(page, url, say, picture) {
  const stored = () => get(url, "/api/agent-profiles");
  const row = page.getByTestId("agent-profile-row").filter({ has: page.getByText("reviewer", { exact: true }) });
  const name = page.getByTestId("agent-profile-name-input");
  const act = async (action) => {
    const entry = page.getByTestId(action);
    await repeat("its menu is open", () => row.getByTestId("agent-profile-menu-trigger").click(ATTEMPT), entry);
    await entry.click(ATTEMPT);
  };
  await page.goto(`${url}/settings/agents`);
  await repeat("a profile can be added", () => page.getByTestId("add-agent-profile").click(ATTEMPT), name);
  await name.fill("reviewer");
  await choose(page, page.getByTestId("agent-profile-llm-selector"), /^default/);
  await page.getByTestId("agent-type-selector").waitFor({ state: "hidden" });
  await picture("agent-profile");
  await repeat("it is saved", () => page.getByTestId("save-agent-profile-btn").click(ATTEMPT), name, "hidden");
  await row.waitFor();
  await act("agent-profile-set-active");
  await row.getByTestId("agent-profile-active-badge").waitFor();
  await picture("agent-profiles");
  const { profiles, active_agent_profile_id: active } = await stored();
  const reviewer = profiles.find((profile) => profile.name === "reviewer");
  assert.deepEqual([reviewer.llm_profile_ref, reviewer.id], ["default", active]);

  // The LLM profile `fast` is active, and the agent profile names `default`.
  await page.goto(url);
  await write(page, "Say hello");
  const started_ = await started(page, url);
  await page.getByText("You said: “Say hello”").waitFor();
  assert.deepEqual(
    [started_.launched_agent_profile?.agent_profile_id, started_.llm_model],
    [active, "openai/scripted-demo"],
  );
  await fetch(`${url}/api/v1/app-conversations/${started_.id}`, { method: "DELETE" });

  await page.goto(`${url}/settings/agents`);
  await act("agent-profile-delete");
  const confirm = page.getByTestId("delete-agent-profile-confirm");
  await repeat("it is deleted", () => confirm.click(ATTEMPT), row, "hidden");
  assert.deepEqual((await stored()).profiles.map((profile) => profile.name), ["default"]);
  say("added an agent profile, started a conversation with it, and deleted it");
}

/** Finds a skill, and disables and enables it. */
export async function skills(page, url, say, picture) {
  const disabled = async () => (await get(url, "/api/v1/settings")).disabled_skills;
  const toggle = page.getByTestId("skill-toggle-docker");
  const is = (state) => toggle.and(page.locator(`[aria-checked="${state}"]`));
  await page.goto(`${url}/skills`);
  await page.getByTestId("skill-card-github").waitFor();
  await page.getByTestId("skills-search-input").fill("docker");
  await until("one skill is found", LIMIT, async () => (await page.locator("[data-testid^=skill-card-]").count()) === 1);
  await repeat("the skill is disabled", () => toggle.click(ATTEMPT), is(false));
  await until("the settings have the skill", LIMIT, async () => JSON.stringify(await disabled()) === '["docker"]');
  await page.reload();
  await is(false).waitFor();
  await picture("skills");
  await repeat("the skill is enabled", () => toggle.click(ATTEMPT), is(true));
  await until("the settings do not have the skill", LIMIT, async () => (await disabled()).length === 0);
  say("found a skill among those of all, and disabled and enabled it");
}

/** The other pages: settings that can be saved, and what this server hides. */
export async function otherPages(page, url, say, picture) {
  const saved = (what, is) => until(`the settings have ${what}`, LIMIT, async () => is(await get(url, "/api/v1/settings")));
  await page.goto(`${url}/settings/condenser`);
  await page.getByTestId("sdk-settings-condenser.max_size").fill("60");
  await page.getByTestId("save-button").click();
  await saved("the size", (settings) => settings.agent_settings.condenser.max_size === 60);

  await page.goto(`${url}/settings/verification`);
  const confirmation = page.getByTestId("sdk-settings-confirmation_mode");
  await page.locator("label").filter({ has: confirmation }).click();
  await page.getByTestId("save-button").click();
  await saved("the confirmation mode", (settings) => settings.conversation_settings.confirmation_mode === true);

  await page.goto(`${url}/settings/app`);
  await page.getByTestId("git-user-name-input").fill("Ada");
  await page.getByTestId("submit-button").click();
  await saved("the name", (settings) => settings.git_user_name === "Ada");
  await picture("application");

  const names = async () => (await get(url, "/api/v1/secrets/search")).items.map((secret) => secret.name);
  await page.goto(`${url}/settings/secrets`);
  const form = page.getByTestId("add-secret-form");
  await repeat("a secret can be added", () => page.getByTestId("add-secret-button").click(ATTEMPT), form);
  await form.getByTestId("name-input").fill("DEPLOY_KEY");
  await form.getByTestId("value-input").fill(KEY);
  await repeat("the secret is saved", () => form.getByTestId("submit-button").click(ATTEMPT), form, "hidden");
  await page.getByText("DEPLOY_KEY").waitFor();
  assert.deepEqual(await names(), ["DEPLOY_KEY"]);
  await picture("secrets");
  for (const hidden of ["sidebar-automations-link", "settings-integrations-link", "settings-cloud-link"]) {
    assert.equal(await page.getByTestId(hidden).isVisible(), false, hidden);
  }
  say("saved settings and a secret, and hid what this server cannot serve");
}

/** Adds an MCP server, changes it and removes it. */
export async function mcpServers(page, url, say, picture) {
  const stored = async () => (await (await fetch(`${url}/api/v1/settings`)).json()).agent_settings.mcp_config;
  const form = page.getByTestId("mcp-custom-editor");
  const servers = page.getByTestId("mcp-server-item");
  const submit = () =>
    repeat("the form is saved", () => form.getByTestId("submit-button").click(ATTEMPT), form, "hidden");
  const add = () => repeat("a form is open", () => page.getByTestId("mcp-add-custom-server").click(ATTEMPT), form);
  const edit = (name) =>
    repeat(`the form of ${name} is open`, () => servers.getByText(name, { exact: true }).click(ATTEMPT), form);
  const select = async (dropdown, name, field) => {
    const option = page.getByRole("option", { name });
    const choose = async () => {
      await repeat(`${dropdown} has ${name}`, () => form.getByTestId(dropdown).click(ATTEMPT), option);
      await option.click(ATTEMPT);
    };
    await repeat(`${name} is selected`, choose, form.getByTestId(field));
  };
  await page.goto(`${url}/mcp`);
  await add();
  await form.getByTestId("server-name-input").fill("tracker");
  await form.getByTestId("url-input").fill("https://tracker.example/sse");
  await select("auth-mode-dropdown", "Bearer token", "api-key-input");
  await form.getByTestId("api-key-input").fill("key-of-the-tracker");
  await submit();
  await servers.getByText("tracker", { exact: true }).waitFor();
  const server = { transport: "sse", url: "https://tracker.example/sse", auth: { strategy: "bearer", value: "**********" } };
  assert.deepEqual(await stored(), { tracker: server });
  await picture("mcp");
  say("added an MCP server with a token");

  // A second MCP server, as a process: the first one stays.
  await add();
  await select("server-type-dropdown", "STDIO", "command-input");
  await form.getByTestId("name-input").fill("files");
  await form.getByTestId("command-input").fill("npx");
  await form.getByTestId("env-input").fill("TOKEN=secret");
  await submit();
  const files = { transport: "stdio", command: "npx", env: { TOKEN: "**********" } };
  assert.deepEqual(await stored(), { tracker: server, files });

  // The form is saved while the token is masked, and the server keeps the token. (With another address it would refuse the form.)
  await edit("tracker");
  await submit();
  assert.deepEqual(await stored(), { tracker: server, files });
  await page.reload();
  await servers.getByText("files", { exact: true }).waitFor();
  await until("both servers are listed", LIMIT, async () => (await servers.count()) === 2);
  say("listed two MCP servers, and kept their secrets when one was saved again");

  await edit("tracker");
  const confirm = page.getByTestId("confirm-button");
  await repeat("the page asks for a confirmation", () => form.getByTestId("mcp-custom-editor-delete").click(ATTEMPT), confirm);
  await repeat("the server is removed", () => confirm.click(ATTEMPT), form, "hidden");
  await servers.getByText("tracker", { exact: true }).waitFor({ state: "detached" });
  assert.deepEqual(await stored(), { files });
  say("removed one of them");
}
