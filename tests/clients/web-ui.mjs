// Tests the prebuilt web UI that `cargo local --ui` serves, in a real browser, against a real agent server: the first dialog, a
// conversation from its first message to its deletion, profiles of models and agents, MCP servers, and skills.
//
// SCREENSHOTS=FOLDER writes a screenshot of each step to that folder.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";

import { ATTEMPT, SIZE, onPage, repeat, retry, set, started, write } from "./browser.mjs";
import { LIMIT, run, until, withServer, zipMembers } from "./server.mjs";
import { agentProfiles, firstDialog, llmProfiles, mcpServers, otherPages, skills } from "./web-ui-pages.mjs";

await run("web-ui", { options: ["--ui"] }, async (server, say) => {
  // The server serves the UI before it has fetched the UI's editor.
  await until("the editor of the UI is served", LIMIT, async () => {
    const { parts } = await (await fetch(`${server.url}/ready`)).json();
    return parts.web_ui_editor === "ready";
  });
  await onPage(say, (page, picture) => converse(page, server.url, say, picture));
  await withServer({ isDemo: false, options: ["--ui", "--sandbox", "none"] }, ({ url }) =>
    onPage(say, (page, picture) => firstDialog(page, url, say, picture)),
  );
});

async function converse(page, url, say, picture) {
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
  /** Shows or hides the panel beside the conversation. */
  const setPanel = async (shown) => {
    // A notice may cover the toggle, and stays while the mouse is over it.
    await page.mouse.move(SIZE.width / 2, SIZE.height / 2);
    await set(page.getByTestId("right-panel-toggle"), "aria-pressed", shown);
    // A hidden panel may keep its tabs, outside the window.
    const tab = page.getByTestId("conversation-tab-commits");
    await until(shown ? "the side panel is shown" : "the side panel is hidden", LIMIT, async () => {
      const box = (await tab.isVisible()) && (await tab.boundingBox(ATTEMPT).catch(() => null));
      return shown === Boolean(box && box.x + box.width <= SIZE.width);
    });
  };
  /** Opens the menu of the conversation, and returns one of its buttons. */
  const openMenu = async (button) => {
    const menu = page.getByTestId("conversation-name").getByTestId("ellipsis-button");
    const entry = page.getByTestId(button);
    await repeat(`the menu has ${button}`, () => menu.click(ATTEMPT), entry);
    return entry;
  };

  // Open the page: there is no dialog and no login.
  await page.goto(url);
  await page.getByTestId("chat-input").waitFor();
  await page.getByText("No conversations found").waitFor();
  await picture("open");
  say("opens with an empty list, connected to this server");

  await llmProfiles(page, url, say, picture);

  // A message starts a conversation with the profile that is chosen, and its response arrives.
  await page.goto(url);
  const chooseProfile = async (name) => {
    const option = page.getByTestId(`chat-input-llm-profile-option-${name}`);
    const picker = page.getByTestId("chat-input-llm-profile");
    await repeat(`the profiles are listed`, () => picker.click(ATTEMPT), option);
    await picture("profiles-of-a-message");
    await option.click(ATTEMPT);
    await picker.getByText(name, { exact: true }).waitFor();
  };
  await chooseProfile("fast");
  await write(page, "Say hello");
  const row = await started(page, url);
  await page.getByText("a script wrote this answer").waitFor();
  await page.getByText("You said: “Say hello”").waitFor();
  assert.deepEqual((await api("/search")).items.map((one) => [one.id, one.llm_model]), [[row.id, "openai/scripted-fast"]]);
  say("started a conversation with a message and a chosen profile, and showed the answer");
  const model = async () => {
    const headers = { "X-Session-API-Key": row.session_api_key };
    return (await (await fetch(row.conversation_url, { headers })).json()).agent.llm.model;
  };
  assert.equal(await model(), "openai/scripted-fast");
  await chooseProfile("default");
  await page.getByText("Switched to profile").waitFor();
  assert.equal(await model(), "openai/scripted-demo");
  assert.equal((await api(`?ids=${row.id}`))[0].llm_model, "openai/scripted-demo");
  await picture("switched");
  say("switched the profile of the running conversation");
  await write(page, "And again");
  await page.getByText("You said: “And again”").waitFor();
  say("sent a second message, and showed the answer");

  const isRenamed = async () => (await api(`?ids=${row.id}`))[0].title === "A name of its own";
  await retry("the conversation is renamed", async () => {
    const input = page.getByTestId("conversation-name-input");
    await repeat("the name can be changed", async () => (await openMenu("rename-button")).click(ATTEMPT), input);
    await input.fill("A name of its own", ATTEMPT);
    await input.press("Enter", ATTEMPT);
    await until("the server has the new name", ATTEMPT.timeout, isRenamed);
  });
  const cards = page.getByTestId("conversation-card-title");
  await cards.getByText("A name of its own").waitFor();
  say("renamed it");

  // The file that the agent wrote. The UI (1.20.0) requests the list of files once, when it opens the conversation, also while the panel
  // is hidden: possibly before the agent has written the file. It then keeps that list. Its refresh button and the agent's edits
  // invalidate only the query of agent servers (`workspace-files`), not the one of app servers (`workspace-files-cloud`), and another
  // tab and back requests a new list only after 30 seconds. A user would reload the page, and so does this test.
  await retry("the agent's file is shown", async () => {
    await setPanel(true);
    try {
      await page.getByTestId("file-tree-file-hello.txt").click(ATTEMPT);
      await page.getByText("Written by an agent that follows a script.", { exact: true }).waitFor(ATTEMPT);
    } catch (error) {
      await picture("no-file");
      await page.reload();
      throw error;
    }
  });
  await picture("conversation");
  await setPanel(false);
  say("showed the file that the agent wrote");

  // The changes and commits in its sandbox, with the files of each commit and their diffs. Agent servers before 1.49 do not list commits.
  const now = (await api(`?ids=${row.id}`))[0];
  await command(now, "echo 'let committed = 1;' > hello.ts");
  await command(now, "git add -A && git -c user.name=Ada -c user.email=ada@example.com commit -qm 'Say hello in a file'");
  await command(now, "echo 'This line is in no commit.' >> hello.txt && echo 'let uncommitted = 2;' >> hello.ts");
  const { version } = await (await fetch(new URL("/server_info", now.conversation_url))).json();
  const [major, minor] = version.split(".").map(Number);
  const listsCommits = major > 1 || minor >= 49;
  const answer = page.waitForResponse((response) => response.request().postData()?.includes("/api/git/commits?"));
  const uncommitted = page.getByTestId("uncommitted-changes-row");
  await retry("the changes are listed", async () => {
    await setPanel(true);
    await page.getByTestId("conversation-tab-commits").click(ATTEMPT);
    try {
      await uncommitted.waitFor(ATTEMPT);
    } catch (error) {
      // The UI requests the changes whenever this tab is opened. A click on a tab that is open closes the panel.
      await page.getByTestId("conversation-tab-files").click(ATTEMPT);
      throw error;
    }
  });
  assert.equal((await answer).status(), listsCommits ? 200 : 404, version);
  // Opens the diff of a file, in one editor or two, until it shows a line.
  const showDiff = async (listed, file, line) => {
    const name = listed.getByTestId("diff-change-list").getByText(file, { exact: true });
    const lines = listed.getByTestId("editor-container").locator(".monaco-diff-editor .editor.modified .view-line");
    await repeat(`the diff of ${file} is shown`, () => name.click(ATTEMPT), lines.getByText(line));
    return lines;
  };
  const toggle = uncommitted.getByTestId("uncommitted-changes-row-toggle");
  await set(toggle, "aria-expanded", true);
  await showDiff(uncommitted, "hello.txt", "This line is in no commit.");
  await picture("changes");
  // A language with its own web worker.
  const worker = page.waitForResponse((response) => response.url().includes("/ts.worker"));
  await showDiff(uncommitted, "hello.ts", "let uncommitted = 2;");
  assert.equal((await worker).status(), 200);
  await picture("changes-in-code");
  await set(toggle, "aria-expanded", false);
  say("showed an uncommitted change");
  const commits = page.getByTestId("commit-row");
  if (listsCommits) {
    const listed = commits.filter({ hasText: "Say hello in a file" });
    await set(listed.getByTestId("commit-row-toggle"), "aria-expanded", true);
    const lines = await showDiff(listed, "hello.txt", "Written by an agent that follows a script.");
    assert.equal(await lines.getByText("This line is in no commit.").count(), 0);
    say("listed a commit, and showed what it changed in a file");
  } else {
    assert.equal(await commits.count(), 0);
    say(`listed no commits, since agent server ${version} does not`);
  }
  await picture("commits");
  assert.deepEqual([...editors], ["127.0.0.1"], "the editor is from elsewhere");
  await until("the editor's worker runs", LIMIT, () => page.workers().length > 0);
  assert.deepEqual(refused, []);
  await setPanel(false);

  // A second visit: the list, and the messages of the conversation.
  await page.goto(url);
  const card = cards.getByText("A name of its own");
  await repeat("the conversation is open again", () => card.click(ATTEMPT), page.getByText("You said: “And again”"));
  say("listed it, and opened it again");

  // Download.
  const download = await retry("the download starts", async () => {
    const [started] = await Promise.all([
      page.waitForEvent("download", { timeout: 60_000 }),
      openMenu("download-trajectory-button").then((button) => button.click(ATTEMPT)),
    ]);
    return started;
  });
  const members = zipMembers(await readFile(await download.path()));
  assert.ok(members.includes("meta.json") && members.some((member) => member.startsWith("event_")), members.join());
  say(`downloaded a zip of ${members.length} members`);

  // Delete.
  const confirm = page.getByRole("button", { name: "Confirm Delete" });
  await repeat("the page asks for a confirmation", async () => (await openMenu("delete-button")).click(ATTEMPT), confirm);
  await picture("delete");
  await repeat("the list is empty", () => confirm.click(ATTEMPT), page.getByText("No conversations found"));
  assert.deepEqual((await api("/search")).items, []);
  await picture("deleted");
  say("deleted it");

  await mcpServers(page, url, say, picture);
  await agentProfiles(page, url, say, picture);
  await skills(page, url, say, picture);
  await otherPages(page, url, say, picture);

  for (const host of stayed) left.delete(host);
  assert.deepEqual([...left], [], "the page called others");
  say("called no other host");
}

/** Runs a command in the workspace of a conversation. */
async function command(row, line) {
  const headers = { "X-Session-API-Key": row.session_api_key, "Content-Type": "application/json" };
  const { workspace } = await (await fetch(row.conversation_url, { headers })).json();
  const body = JSON.stringify({ command: line, cwd: workspace.working_dir, timeout: 120 });
  const run = new URL("/api/bash/execute_bash_command", row.conversation_url);
  const ran = await (await fetch(run, { method: "POST", headers, body })).json();
  assert.equal(ran.exit_code, 0, JSON.stringify(ran));
}
