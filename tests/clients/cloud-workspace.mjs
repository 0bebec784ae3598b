// Tests `OpenHandsCloudWorkspace` of the Python package openhands-workspace, as scripts use it, against a server of this workspace and a
// real agent server. The script is cloud_workspace.py; it runs in the Python of the agent server, which has the SDK.

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { execFile } from "node:child_process";
import { mkdir, readdir } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { agentServerFolder, run } from "./server.mjs";

const here = path.dirname(fileURLToPath(import.meta.url));
const [apiKey, modelKey, secret] = ["key", "model", "secret"].map((name) => `${name}-${randomBytes(16).toString("hex")}`);

await run("cloud-workspace", { environment: { SESSION_API_KEY: apiKey } }, async (server, say) => {
  const python = await pythonOfAgentServer();
  const packages = path.join(server.folder, "packages");
  await mkdir(packages);
  const requirements = path.join(here, "cloud-workspace.txt");
  const pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"];
  const installed = await exec(python, [...pip, "--target", packages, "--requirement", requirements]);
  if (installed.failed) {
    say(`not run (the package could not be installed): ${installed.stderr.trim().split("\n").at(-1)}`);
    return;
  }
  const environment = {
    URL: server.url,
    KEY: apiKey,
    MODEL_KEY: modelKey,
    SECRET: secret,
    FOLDER: path.join(server.folder, "workspace"),
    PYTHONPATH: packages,
    // Nothing is fetched from other hosts, and nothing is printed except the steps.
    LITELLM_LOCAL_MODEL_COST_MAP: "True",
    OPENHANDS_SUPPRESS_BANNER: "1",
  };
  const ran = await exec(python, [path.join(here, "cloud_workspace.py")], { env: { ...process.env, ...environment } });
  for (const step of ran.stdout.matchAll(/^step: (.*)$/gm)) say(step[1]);
  assert.ok(!ran.failed, `${ran.stdout}\n${ran.stderr}`);
  for (const hidden of [apiKey, modelKey, secret]) assert.ok(!server.log().includes(hidden), "a secret is in the log");
});

/** Runs a program. Meanwhile the server's log is read. */
function exec(program, parameters, options = {}) {
  return new Promise((done) =>
    execFile(program, parameters, { maxBuffer: 64 << 20, ...options }, (error, stdout, stderr) =>
      done({ failed: Boolean(error), stdout, stderr }),
    ),
  );
}

/** The Python environment into which the server has installed the agent server. */
async function pythonOfAgentServer() {
  const found = [];
  for (const version of await readdir(agentServerFolder)) {
    const folder = path.join(agentServerFolder, version);
    const inside = version.startsWith("agent-server-1.58.2-") ? await readdir(folder).catch(() => []) : [];
    found.push(...inside.filter((name) => name.startsWith("venv-")).map((name) => path.join(folder, name, "bin", "python")));
  }
  assert.ok(found.length > 0, `no agent server 1.58.2 in ${agentServerFolder}`);
  return found[0];
}
