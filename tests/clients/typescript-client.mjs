// Tests the cloud client of the npm package @openhands/typescript-client, as scripts and web pages use it, against a server of this
// workspace and a real agent server.

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";

import { CloudClient } from "@openhands/typescript-client/clients";

import { LIMIT, run, until, versionOf, zipMembers } from "./server.mjs";

const apiKey = randomBytes(16).toString("hex");

function hasStatus(status) {
  return (error) => error.status === status;
}

await run("typescript-client", { environment: { SESSION_API_KEY: apiKey } }, async (server, say) => {
  const client = new CloudClient({ host: server.url, apiKey, proxy: { host: server.url, headers: { Authorization: `Bearer ${apiKey}` } } });
  say(`version ${await versionOf("@openhands/typescript-client")}, server ${server.url}`);

  // Authentication.
  const stranger = new CloudClient({ host: server.url, apiKey: "another" });
  for (const ask of ["getOrganizations", "getCurrentApiKey", "searchConversations"]) {
    await assert.rejects(stranger[ask](), hasStatus(401));
  }
  const organizations = await client.getOrganizations();
  assert.deepEqual(organizations.items.map(({ id, name, is_personal }) => [id, name, is_personal]), [
    [organizations.currentOrgId, "Personal", true],
  ]);
  assert.equal((await client.getCurrentApiKey()).org_id, organizations.currentOrgId);
  say("a key lets in, another does not");

  // The demo's own conversation, whose progress the terminal shows.
  await until("the demo is shown", LIMIT, async () => /^Ctrl-C stops the server\.$/m.test(server.log()));
  assert.match(server.log(), /^Start: READY$[^]*^The agent runs: echo[^]*^Agent: This is a demo: a script wrote/m);
  const shown = await client.searchConversations();
  assert.equal(shown.items.length, 1);
  await client.deleteConversation(shown.items[0].id);
  say("the demo's own conversation was shown, and deleted");

  const settings = await client.getSettingsWithDerivedFields();
  assert.equal(settings.agent_settings.llm.model, "openai/scripted-demo");
  assert.equal(settings.llm_api_key_set, true);
  assert.notEqual(settings.agent_settings.llm.api_key, "none-needed", "a secret is shown");
  await client.saveSettings({ agent_settings_diff: { condenser: { max_size: 40 } }, app_preferences: { git_user_name: "Ada" } });
  const changed = await client.getSettings();
  assert.deepEqual([changed.condenser_max_size, changed.git_user_name], [40, "Ada"]);
  assert.ok((await client.getSettingsSchema()).sections.some((section) => section.fields.some((field) => field.key === "llm.model")));
  assert.ok((await client.getConversationSettingsSchema()).sections.length > 0);
  await client.createSecret("TOKEN", "secret value", "for tests");
  await client.updateSecret("TOKEN", "RENAMED", "still for tests");
  const secrets = await client.listSecrets();
  assert.deepEqual(secrets.map((secret) => [secret.name, secret.description]), [["RENAMED", "still for tests"]]);
  assert.ok(!JSON.stringify(secrets).includes("secret value"));
  await client.deleteSecret("RENAMED");
  assert.deepEqual(await client.listSecrets(), []);
  const skills = await client.listSkills();
  assert.ok(skills.length > 20 && skills.every((skill) => skill.name), `${skills.length} skills`);
  const repository = { provider: "github", repository: "owner/name" };
  const pages = await Promise.all([
    client.searchRepositories(repository),
    client.getRepositoryBranches(repository),
    client.getInstallations(repository),
    client.getSuggestedTasks(),
  ]);
  assert.deepEqual(pages, pages.map(() => ({ items: [], next_page_id: null })));
  const models = await client.searchModels({ limit: 50, provider__eq: "openai", verified__eq: true });
  assert.ok(models.items.length > 0 && models.items.every((model) => model.provider === "openai" && model.verified));
  const providers = await client.searchProviders({ limit: 100, query: "ANTHROP" });
  assert.deepEqual(providers.items, [{ name: "anthropic", verified: true }]);
  say("settings, secrets and lists");

  // LLM profiles, under both paths.
  const inOrganization = new CloudClient({ host: server.url, apiKey, orgId: organizations.currentOrgId });
  const script = settings.agent_settings.llm.base_url;
  const key = randomBytes(16).toString("hex");
  const fast = { model: "openai/scripted-fast", api_key: key, base_url: script };
  await client.saveProfile("fast", { llm: fast, include_secrets: true });
  await inOrganization.saveProfile("slow", { llm: { ...fast, model: "openai/scripted-slow" } });
  assert.deepEqual(await client.listProfiles(), await inOrganization.listProfiles());
  const listed = await client.listProfiles();
  assert.deepEqual(listed.profiles.map((profile) => profile.name), ["default", "fast", "slow"]);
  assert.equal(listed.active_profile, "default");
  for (const one of [client, inOrganization]) {
    const shown = await one.getProfile("fast");
    assert.deepEqual([shown.config.model, shown.api_key_set], [fast.model, true]);
    assert.ok(!JSON.stringify(shown).includes(key), "a secret is shown");
  }
  await inOrganization.renameProfile("slow", "slower");
  assert.equal((await client.activateProfile("slower")).llm_applied, true);
  assert.equal((await client.getSettings()).agent_settings.llm.model, "openai/scripted-slow");
  await client.activateProfile("fast");
  await client.deleteProfile("slower");
  await assert.rejects(client.activateProfile("slower"), hasStatus(404));
  assert.deepEqual(
    await client.listProfiles().then((list) => [list.profiles.map((profile) => profile.name), list.active_profile]),
    [["default", "fast"], "fast"],
  );
  say("profiles saved, shown without their keys, renamed, activated and deleted");

  // Start and poll.
  const started = async (request) => {
    const task = await client.createConversation(request);
    const seen = new Set([task.status]);
    const ready = await until("the start ends", LIMIT, async () => {
      const now = await client.getConversationStartTask(task.id);
      seen.add(now.status);
      assert.notEqual(now.status, "ERROR", now.detail);
      return now.status === "READY" && now;
    });
    assert.ok(seen.has("WORKING") && seen.has("READY"), [...seen].join());
    return ready;
  };
  const message = (text) => ({ role: "user", content: [{ type: "text", text }] });
  const task = await started({ initial_message: message("Say hello"), title: null, trigger: "gui" });
  const id = task.app_conversation_id;
  const conversation = async () => (await client.getConversations([id]))[0];
  const answered = (times) =>
    until(`the agent has answered ${times} times`, LIMIT, async () => {
      const now = await conversation();
      const { items } = await client.get(`/api/v1/conversation/${id}/events/search?limit=100`);
      const said = items.filter((event) => event.kind === "MessageEvent" && event.source === "agent");
      return now.execution_status === "finished" && said.length === times && said.map((event) => JSON.stringify(event));
    });
  const [answer] = await answered(1);
  assert.match(answer, /a script wrote this answer/);
  assert.match(answer, /Say hello/);
  say(`a start is READY and answered, in sandbox ${task.sandbox_id}`);

  // The conversation has the model of the active profile, until it is switched.
  assert.equal((await conversation()).llm_model, "openai/scripted-fast");
  await client.switchConversationProfile(id, "default");
  assert.equal((await conversation()).llm_model, "openai/scripted-demo");
  await assert.rejects(client.switchConversationProfile(id, "slower"), hasStatus(404));
  await assert.rejects(client.switchConversationAcpModel(id, "another"), hasStatus(400));
  say("its profile was switched");

  // Search and pagination: two more conversations in the same sandbox.
  const ids = [id];
  for (const title of ["second", "third"]) {
    ids.push((await started({ sandbox_id: task.sandbox_id, title })).app_conversation_id);
  }
  // This client sorts by the time of the last change, so a row that changes between two pages moves to the front. A pass over the pages is
  // valid only if no row changed during it (the agent's title arrives some seconds after its response).
  const changes = async () => JSON.stringify((await client.getConversations(ids)).map((row) => row.updated_at));
  const [found, first] = await until("no conversation changes during a walk through the pages", LIMIT, async () => {
    const before = await changes();
    let page = await client.searchConversations(2);
    assert.equal(page.items.length, 2);
    const first = page.next_page_id;
    const found = page.items.map((item) => item.id);
    while (page.next_page_id) {
      page = await client.searchConversations(2, page.next_page_id);
      found.push(...page.items.map((item) => item.id));
    }
    return before === (await changes()) && [found, first];
  });
  assert.deepEqual([...found].sort(), [...ids].sort());
  await assert.rejects(client.searchConversations(2, `${first}x`), hasStatus(400));
  const unknown = "00000000-0000-4000-8000-000000000000";
  assert.deepEqual((await client.getConversations([unknown, id])).map((row) => row?.id ?? null), [null, id]);
  assert.equal(await client.getConversationStartTask(unknown), null);
  say("three conversations in two pages");

  // Updates.
  assert.equal((await client.updateConversationPublicFlag(id, true)).public, true);
  assert.equal((await client.patch(`/api/v1/app-conversations/${id}`, { title: "renamed" })).title, "renamed");
  assert.deepEqual(await conversation().then((row) => [row.title, row.public]), ["renamed", true]);
  await assert.rejects(client.patch(`/api/v1/app-conversations/${unknown}`, { title: "nobody's" }), hasStatus(404));
  say("renamed, made public");

  // The contents of the workspace. The response is a JSON string, and this client returns it unparsed.
  const file = async (name) => JSON.parse(await client.readConversationFile(id, `/workspace/project/${name}`));
  assert.match(await file("hello.txt"), /^Written by an agent that follows a script\.\n$/);
  assert.equal(await file("none.txt"), "");
  const row = await conversation();
  const agentServer = new URL(row.conversation_url);
  assert.match(agentServer.pathname, /\/api\/conversations\/[0-9a-f-]+$/);
  const inSandbox = { hostOverride: agentServer.origin, authMode: "session-api-key", sessionApiKey: row.session_api_key };
  assert.ok((await client.request({ method: "GET", path: `/api/conversations/${id}/events/count`, ...inSandbox })) > 3);
  await client.request({ method: "POST", path: `/api/conversations/${id}/events`, body: { ...message("And again"), run: true }, ...inSandbox });
  assert.match((await answered(2))[1], /And again/);
  for (const [wrong, status] of [
    [{ sessionApiKey: "another" }, 403],
    [{ hostOverride: server.url }, 403],
    [{ path: "/alive" }, 422],
  ]) {
    const request = { method: "GET", path: `/api/conversations/${id}/events/count`, ...inSandbox, ...wrong };
    await assert.rejects(client.request(request), hasStatus(status));
  }
  say("its file, its events, a second message by way of the server");

  // Download.
  const zip = await client.downloadConversation(id);
  const members = zipMembers(await zip.arrayBuffer());
  assert.ok(members.includes("meta.json"), members.join());
  assert.ok(members.filter((member) => /^event_.*\.json$/.test(member)).length > 6, members.join());
  say(`a zip of ${members.length} members`);

  // Pause and resume.
  const sandbox = async () => (await client.getSandboxes([task.sandbox_id]))[0];
  await client.pauseSandbox(task.sandbox_id);
  assert.deepEqual(await sandbox().then((now) => [now.status, now.session_api_key]), ["PAUSED", null]);
  assert.deepEqual(await conversation().then((now) => [now.sandbox_status, now.conversation_url]), ["PAUSED", null]);
  await client.resumeSandbox(task.sandbox_id);
  await until("the sandbox runs", LIMIT, async () => (await sandbox()).status === "RUNNING");
  await until("the conversation can be reached", LIMIT, async () => (await conversation()).conversation_url);
  assert.match(await file("hello.txt"), /Written by/);
  say("paused and resumed");

  // Delete.
  for (const one of ids) {
    await client.deleteConversation(one);
    assert.deepEqual(await client.getConversations([one]), [null]);
    await assert.rejects(client.deleteConversation(one), hasStatus(404));
  }
  assert.deepEqual((await client.searchConversations()).items, []);
  await until("the sandbox is gone", LIMIT, async () => (await sandbox()) === null);
  say("deleted, and the sandbox with the last one");
  for (const hidden of [apiKey, key]) assert.ok(!server.log().includes(hidden), "a key is in the log");
});
