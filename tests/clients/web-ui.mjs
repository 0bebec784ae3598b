// The prebuilt web UI that `cargo local --ui` serves, in a real browser, against a real agent server: a conversation from its first
// message to its end.
//
// With SCREENSHOTS=FOLDER pictures of each step are left there.

import assert from "node:assert/strict";
import { access, readFile } from "node:fs/promises";
import path from "node:path";

import { chromium } from "playwright-core";

import { run, until, zipMembers } from "./server.mjs";

const TURN = 180_000;
const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
// The first one is for users without a sandbox of their own, such as root's; the others keep it from calling its makers.
const FLAGS =
  "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync";
const SIZE = { width: 1280, height: 800 };

await access(CHROMIUM);

await run("web-ui", { options: ["--ui"] }, async (server, say) => {
  const browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS.split(" ") });
  try {
    const context = await browser.newContext({ viewport: SIZE, acceptDownloads: true });
    const page = await context.newPage();
    // The UI is there before its editor, and keeps nobody waiting.
    await until("its editor is served", TURN, async () => {
      const { parts } = await (await fetch(`${server.url}/ready`)).json();
      return parts.web_ui_editor === "ready";
    });
    try {
      await converse(page, server.url, say);
    } catch (error) {
      if (process.env.SCREENSHOTS) await page.screenshot({ path: path.join(process.env.SCREENSHOTS, "failed.png") });
      throw error;
    }
  } finally {
    await browser.close();
  }
});

async function converse(page, url, say) {
  page.setDefaultTimeout(TURN);
  const left = new Set();
  const editors = new Set();
  page.on("request", (request) => {
    const { protocol, hostname, pathname } = new URL(request.url());
    if (/^(http|ws)/.test(protocol) && hostname !== "127.0.0.1") left.add(hostname);
    if (pathname.includes("monaco-editor")) editors.add(hostname);
  });
  const refused = [];
  page.on("console", (message) => {
    if (/\bworkers?\b/i.test(message.text()) && message.type() !== "log") refused.push(message.text());
  });
  const stayed = new Set();
  page.on("requestfailed", (request) => {
    if (request.failure()?.errorText === "csp") stayed.add(new URL(request.url()).hostname);
  });
  const api = async (route) => (await fetch(`${url}/api/v1/app-conversations${route}`)).json();
  let pictures = 0;
  const picture = async (name) => {
    if (!process.env.SCREENSHOTS) return;
    const file = path.join(process.env.SCREENSHOTS, `${++pictures}-${name}.png`);
    await page.screenshot({ path: file });
    say(`a picture: ${file}`);
  };
  const write = async (text) => {
    await page.getByTestId("chat-input").click();
    await page.keyboard.type(text);
    await page.keyboard.press("Enter");
  };
  const togglePanel = async () => {
    // A notice may be in front of the button, and stays for as long as the mouse is on it.
    await page.mouse.move(SIZE.width / 2, SIZE.height / 2);
    await page.getByTestId("right-panel-toggle").click();
  };
  // A click that comes while the page is drawn again may go nowhere, so the panel's tabs say whether it took effect.
  const setPanel = async (state) => {
    const tab = page.getByTestId("conversation-tab-commits");
    await until(`the side panel is ${state}`, TURN, async () => {
      await togglePanel();
      return tab.waitFor({ state, timeout: 20_000 }).then(() => true, () => false);
    });
  };
  const choose = async (button) => {
    await page.getByTestId("conversation-name").getByTestId("ellipsis-button").click();
    await page.getByTestId(button).click();
  };

  // Open: no dialog, no login.
  await page.goto(url);
  await page.getByTestId("chat-input").waitFor();
  await page.getByText("No conversations found").waitFor();
  await picture("open");
  say("opens with an empty list, connected to this server");

  // A message starts a conversation, and its answer arrives.
  await write("Say hello");
  await page.waitForURL(/\/conversations\/(?!task-)/);
  await page.getByText("a script wrote this answer").waitFor();
  await page.getByText("You said: “Say hello”").waitFor();
  const [row] = (await api("/search")).items;
  assert.ok(new URL(page.url()).pathname.endsWith(row.id), page.url());
  say("started a conversation with a message, and showed the answer");
  await write("And again");
  await page.getByText("You said: “And again”").waitFor();
  say("sent a second message, and showed the answer");

  // Rename.
  await choose("rename-button");
  await page.getByTestId("conversation-name-input").fill("A name of its own");
  await page.keyboard.press("Enter");
  await until("the name is kept", TURN, async () => (await api(`?ids=${row.id}`))[0].title === "A name of its own");
  const cards = page.getByTestId("conversation-card-title");
  await cards.getByText("A name of its own").waitFor();
  say("renamed it");

  // What the agent wrote, beside the conversation.
  await setPanel("visible");
  await page.getByTestId("file-tree-file-hello.txt").click();
  await page.getByText("Written by an agent that follows a script.", { exact: true }).waitFor();
  await picture("conversation");
  await setPanel("hidden");
  say("showed the file that the agent wrote");

  // What was changed and committed in its sandbox, with the files of each commit and what changed in them. Agent servers before 1.49 do
  // not list commits.
  const now = (await api(`?ids=${row.id}`))[0];
  await command(now, "echo 'let committed = 1;' > hello.ts");
  await command(now, "git add -A && git -c user.name=Ada -c user.email=ada@example.com commit -qm 'Say hello in a file'");
  await command(now, "echo 'This line is in no commit.' >> hello.txt && echo 'let uncommitted = 2;' >> hello.ts");
  const { version } = await (await fetch(new URL("/server_info", now.conversation_url))).json();
  const [major, minor] = version.split(".").map(Number);
  const listsCommits = major > 1 || minor >= 49;
  const asked = page.waitForResponse((answer) => answer.request().postData()?.includes("/api/git/commits?"));
  await setPanel("visible");
  await page.getByTestId("conversation-tab-commits").click();
  assert.equal((await asked).status(), listsCommits ? 200 : 404, version);
  // The diff of a file, in one editor or two.
  const diff = async (listed, file) => {
    await listed.getByTestId("diff-change-list").getByText(file, { exact: true }).click();
    return listed.getByTestId("editor-container").locator(".monaco-diff-editor .editor.modified .view-line");
  };
  const uncommitted = page.getByTestId("uncommitted-changes-row");
  await uncommitted.getByTestId("uncommitted-changes-row-toggle").click();
  await (await diff(uncommitted, "hello.txt")).getByText("This line is in no commit.").waitFor();
  await picture("changes");
  // A language that has a worker of its own.
  const language = page.waitForResponse((answer) => answer.url().includes("/ts.worker"));
  await (await diff(uncommitted, "hello.ts")).getByText("let uncommitted = 2;").waitFor();
  assert.equal((await language).status(), 200);
  await picture("changes-in-code");
  await uncommitted.getByTestId("uncommitted-changes-row-toggle").click();
  say("showed an uncommitted change");
  const commits = page.getByTestId("commit-row");
  if (listsCommits) {
    const listed = commits.filter({ hasText: "Say hello in a file" });
    await listed.getByTestId("commit-row-toggle").click();
    const lines = await diff(listed, "hello.txt");
    await lines.getByText("Written by an agent that follows a script.").waitFor();
    assert.equal(await lines.getByText("This line is in no commit.").count(), 0);
    say("listed a commit, and showed what it changed in a file");
  } else {
    assert.equal(await commits.count(), 0);
    say(`listed no commits, since agent server ${version} does not`);
  }
  await picture("commits");
  assert.deepEqual([...editors], ["127.0.0.1"], "the editor is from elsewhere");
  await until("the editor's worker runs", TURN, () => page.workers().length > 0);
  assert.deepEqual(refused, []);
  await setPanel("hidden");

  // Another visit: the list, and what was said.
  await page.goto(url);
  await cards.getByText("A name of its own").click();
  await page.getByText("You said: “And again”").waitFor();
  say("listed it, and opened it again");

  // Download.
  const downloading = page.waitForEvent("download");
  await choose("download-trajectory-button");
  const members = zipMembers(await readFile(await (await downloading).path()));
  assert.ok(members.includes("meta.json") && members.some((member) => member.startsWith("event_")), members.join());
  say(`downloaded a zip of ${members.length} members`);

  // Delete.
  await choose("delete-button");
  await picture("delete");
  await page.getByRole("button", { name: "Confirm Delete" }).click();
  await page.getByText("No conversations found").waitFor();
  assert.deepEqual((await api("/search")).items, []);
  await picture("deleted");
  say("deleted it");

  await mcpServers(page, url, say, picture);

  for (const host of stayed) left.delete(host);
  assert.deepEqual([...left], [], "the page called others");
  say("called nobody else");
}

/** Runs a command in the workspace of a conversation. */
async function command(row, line) {
  const headers = { "X-Session-API-Key": row.session_api_key, "Content-Type": "application/json" };
  const { workspace } = await (await fetch(row.conversation_url, { headers })).json();
  const body = JSON.stringify({ command: line, cwd: workspace.working_dir, timeout: 30 });
  const run = new URL("/api/bash/execute_bash_command", row.conversation_url);
  const ran = await (await fetch(run, { method: "POST", headers, body })).json();
  assert.equal(ran.exit_code, 0, JSON.stringify(ran));
}

/** Adds an MCP server, changes it and removes it. */
async function mcpServers(page, url, say, picture) {
  const stored = async () => (await (await fetch(`${url}/api/v1/settings`)).json()).agent_settings.mcp_config;
  const form = page.getByTestId("mcp-custom-editor");
  const servers = page.getByTestId("mcp-server-item");
  const submit = async () => {
    await form.getByTestId("submit-button").click();
    await form.waitFor({ state: "detached" });
  };
  await page.goto(`${url}/mcp`);
  await page.getByTestId("mcp-add-custom-server").click();
  await form.getByTestId("server-name-input").fill("tracker");
  await form.getByTestId("url-input").fill("https://tracker.example/sse");
  await form.getByTestId("auth-mode-dropdown").click();
  await page.getByRole("option", { name: "Bearer token" }).click();
  await form.getByTestId("api-key-input").fill("key-of-the-tracker");
  await submit();
  await servers.getByText("tracker", { exact: true }).waitFor();
  const server = { transport: "sse", url: "https://tracker.example/sse", auth: { strategy: "bearer", value: "**********" } };
  assert.deepEqual(await stored(), { tracker: server });
  await picture("mcp");
  say("added an MCP server with a token");

  // A second one, as a process: the first one stays.
  await page.getByTestId("mcp-add-custom-server").click();
  await form.getByTestId("server-type-dropdown").click();
  await page.getByRole("option", { name: "STDIO" }).click();
  await form.getByTestId("name-input").fill("files");
  await form.getByTestId("command-input").fill("npx");
  await form.getByTestId("env-input").fill("TOKEN=secret");
  await submit();
  const files = { transport: "stdio", command: "npx", env: { TOKEN: "**********" } };
  assert.deepEqual(await stored(), { tracker: server, files });

  // The form is saved with the token still masked: it stays. (With another address it would be refused.)
  await servers.getByText("tracker", { exact: true }).click();
  await submit();
  assert.deepEqual(await stored(), { tracker: server, files });
  await page.reload();
  await servers.getByText("files", { exact: true }).waitFor();
  assert.equal(await servers.count(), 2);
  say("listed two MCP servers, and kept their secrets when one was saved again");

  await servers.getByText("tracker", { exact: true }).click();
  await form.getByTestId("mcp-custom-editor-delete").click();
  await page.getByTestId("confirm-button").click();
  await form.waitFor({ state: "detached" });
  await servers.getByText("tracker", { exact: true }).waitFor({ state: "detached" });
  assert.deepEqual(await stored(), { files });
  say("removed one of them");
}
