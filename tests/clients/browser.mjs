// What tests of the web UI share: the browser, and actions that are repeated until the page shows their effect.
//
// A page that is being redrawn can drop a click, and the UI does not always retry a request that fails or is sent too early. Every action
// is therefore repeated, as a user would do.

import assert from "node:assert/strict";
import { access } from "node:fs/promises";
import path from "node:path";

import { chromium } from "playwright-core";

import { LIMIT, until } from "./server.mjs";

/** The timeout of one attempt at an action, in milliseconds, before the action is repeated. */
export const ATTEMPT = { timeout: 20_000 };
export const SIZE = { width: 1280, height: 800 };
const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
// The first flag is for users for whom Chromium cannot create its sandbox, such as root; the others disable requests to its vendor.
const FLAGS =
  "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync";

let pictures = 0;

/**
 * Runs a test on a page of a new browser. `picture(name)` writes a screenshot to the folder SCREENSHOTS, if that is set; a failure does so
 * as well.
 */
export async function onPage(say, test) {
  await access(CHROMIUM);
  const folder = process.env.SCREENSHOTS;
  const browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS.split(" ") });
  try {
    const context = await browser.newContext({ viewport: SIZE, acceptDownloads: true });
    const page = await context.newPage();
    page.setDefaultTimeout(LIMIT);
    const picture = async (name) => {
      if (!folder) return;
      const file = path.join(folder, `${String(++pictures).padStart(2, "0")}-${name}.png`);
      await page.screenshot({ path: file });
      say(`a picture: ${file}`);
    };
    try {
      await test(page, picture);
    } catch (error) {
      await picture("failed");
      throw error;
    }
  } finally {
    await browser.close();
  }
}

/** Repeats an attempt until it succeeds, and returns its result. */
export async function retry(what, attempt) {
  let failure;
  const attempted = async () => {
    try {
      return { result: await attempt() };
    } catch (error) {
      failure = error;
      return undefined;
    }
  };
  try {
    return (await until(what, LIMIT, attempted)).result;
  } catch (error) {
    throw new Error(error.message, { cause: failure });
  }
}

/** Repeats an action until an element is visible, or in another state. */
export async function repeat(what, act, element, state = "visible") {
  await retry(what, async () => {
    if ((await element.isVisible()) === (state === "visible")) return;
    await act();
    await element.waitFor({ state, ...ATTEMPT });
  });
}

/** Clicks a toggle until one of its ARIA attributes has this value. */
export async function set(toggle, attribute, value) {
  const done = toggle.and(toggle.page().locator(`[${attribute}="${value}"]`));
  await repeat(`${attribute} of ${toggle} is ${value}`, () => toggle.click(ATTEMPT), done);
}

/** Opens a list and chooses its option with this name. Filters, where the list has a field, leave fewer options. */
export async function choose(page, list, name) {
  const option = page.getByRole("option", { name, exact: true });
  await repeat(`the list has ${name}`, () => list.click(ATTEMPT), option.first());
  await option.first().click(ATTEMPT);
}

/** Sends a message. The page clears the input when it accepts a message, and ignores the Enter key while it accepts none. */
export async function write(page, text) {
  const input = page.getByTestId("chat-input");
  await retry(`“${text}” is sent`, async () => {
    await input.fill(text, ATTEMPT);
    assert.equal((await input.innerText(ATTEMPT)).trim(), text);
    await input.press("Enter", ATTEMPT);
    const unsent = input.filter({ hasText: text });
    await until("the input is empty", 5_000, async () => (await unsent.count()) === 0);
  });
}

/** Waits until the conversation of the first message is open, and returns its row. */
export async function started(page, url) {
  const api = async (route) => (await fetch(`${url}/api/v1/app-conversations${route}`)).json();
  return until("the conversation is open", LIMIT, async () => {
    const failed = (await api("/start-tasks/search")).items.find((task) => task.status === "ERROR");
    assert.equal(failed, undefined, failed?.detail);
    const id = /\/conversations\/(?!task-)([^/?]+)/.exec(page.url())?.[1];
    return id && (await api(`?ids=${id}`))[0];
  });
}
