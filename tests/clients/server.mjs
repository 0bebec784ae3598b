// Starts a server of this workspace for a test: `cargo local`, usually with `--demo`, with its own data folder and port.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "../..");
const target = process.env.CARGO_TARGET_DIR ?? path.join(root, "target");

/** This limit is long because the very first run installs the agent server. */
const READY_LIMIT = 20 * 60 * 1000;

/** The timeout of a test step, in milliseconds. It is generous for loaded machines, because the tests do not measure speed. */
export const LIMIT = 600_000;

/** Less than `LIMIT`, so that a start that times out fails with its own reason. (A loaded machine exceeds the default of 120 s.) */
const SANDBOX_STARTUP_TIMEOUT = "540";

/** Several data folders share one installation of the agent server. */
export const agentServerFolder = process.env.OPENHANDS_AGENT_SERVER_FOLDER ?? path.join(target, "agent-server");

/** Variables that would give the user of a test a model. */
const NO_MODEL = { LLM_MODEL: undefined, LLM_API_KEY: undefined, LLM_BASE_URL: undefined };

/**
 * Starts the server and waits until it is ready. `stop()` stops it together with its sandboxes; `log()` returns its output.
 */
export async function startServer({ options = [], environment = {}, isDemo = true } = {}) {
  const folder = await mkdtemp(path.join(tmpdir(), "clients-"));
  const child = spawn(
    path.join(target, "debug/local"),
    [...(isDemo ? ["--demo"] : []), "--port", "0", "--data", folder, "--agent-server", agentServerFolder, ...options],
    { env: { ...process.env, ...NO_MODEL, SANDBOX_STARTUP_TIMEOUT, ...environment }, stdio: ["ignore", "pipe", "pipe"] },
  );
  let said = "";
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (bytes) => (said += bytes));
  const exited = once(child, "exit");
  // The server stops together with this process, also after a signal: Node.js emits no `exit` event then unless the signal is handled.
  process.once("exit", () => child.kill("SIGTERM"));
  for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => process.exit(1));
  const stop = async () => {
    if (child.exitCode === null && child.signalCode === null) child.kill("SIGTERM");
    await exited;
    await rm(folder, { recursive: true, force: true });
  };
  try {
    const url = await until("the server listens", READY_LIMIT, async () => {
      if (child.exitCode !== null) throw new Error(`the server ended:\n${said}`);
      return /^Listening on (\S+)$/m.exec(said)?.[1];
    });
    await until("the server is ready", READY_LIMIT, async () => {
      const ready = await (await fetch(`${url}/ready`)).json();
      const failed = Object.values(ready.parts).find((part) => /^(failed|not served)/.test(part));
      if (failed) throw new Error(failed);
      return ready.ready;
    });
    return { url, folder, stop, log: () => said };
  } catch (error) {
    await stop();
    throw error;
  }
}

/** Polls until the result is truthy, up to a limit in milliseconds, and returns that result. */
export async function until(what, limit, ask, pause = 300) {
  const end = Date.now() + limit;
  for (;;) {
    const answer = await ask();
    if (answer) return answer;
    if (Date.now() > end) throw new Error(`still not so after ${limit / 1000} s: ${what}`);
    await new Promise((done) => setTimeout(done, pause));
  }
}

/** Reads the member names of a zip file from its central directory. */
export function zipMembers(bytes) {
  const zip = Buffer.from(bytes);
  const end = zip.lastIndexOf(Buffer.from([0x50, 0x4b, 5, 6]));
  if (end < 0) throw new Error("this is no zip");
  const names = [];
  let at = zip.readUInt32LE(end + 16);
  for (let left = zip.readUInt16LE(end + 10); left > 0; left--) {
    const [name, extra, comment] = [28, 30, 32].map((offset) => zip.readUInt16LE(at + offset));
    names.push(zip.toString("utf8", at + 46, at + 46 + name));
    at += 46 + name + extra + comment;
  }
  return names;
}

/** Runs a test against another server, and stops that. */
export async function withServer(settings, test) {
  const server = await startServer(settings);
  try {
    return await test(server);
  } finally {
    await server.stop();
  }
}

/** Runs a test against a server, prints each step, and exits with the result. */
export async function run(name, settings, test) {
  let server;
  let failed = false;
  try {
    server = await startServer(settings);
    await test(server, (text) => console.log(`${name}: ${text}`));
    console.log(`${name}: all is well`);
  } catch (error) {
    failed = true;
    console.error(error);
    if (server) console.error(`The end of the server's log:\n${server.log().split("\n").slice(-40).join("\n")}`);
  } finally {
    await server?.stop();
  }
  process.exit(failed ? 1 : 0);
}

/** Returns the version of an installed package. */
export async function versionOf(name) {
  const file = new URL(`node_modules/${name}/package.json`, import.meta.url);
  return JSON.parse(await readFile(file, "utf8")).version;
}
