// Runs a CloudFront Function: reads a line of JSON per request, {"event": ..., "store": {...}}, and writes the result and the origin that the
// function has chosen. Enforces the limits of CloudFront that the function could exceed. Usage: node run-function.mjs FILE
import fs from 'node:fs';
import readline from 'node:readline';
import vm from 'node:vm';

const text = fs.readFileSync(process.argv[2], 'utf8');
const IMPORT = "import cf from 'cloudfront';\n";
if (Buffer.byteLength(text) > 10240) throw new Error('a function has at most 10 KB');
if (text.split(IMPORT).length !== 2) throw new Error('the function does not import cloudfront once');
const source = text.replace(IMPORT, '');

const DISALLOWED = /^(connection|expect|keep-alive|proxy-.*|trailer|transfer-encoding|upgrade|via|x-accel-.*|x-amz-.*|x-edge-.*|x-forwarded-proto|x-real-ip)$/;

function check(condition, reason) {
  if (!condition) throw new Error('CloudFront refuses the origin: ' + reason);
}

function checkOrigin(origin, request) {
  check(/^[a-z0-9.-]{1,253}$/.test(origin.domainName) && /[a-z]/.test(origin.domainName.split('.').pop()), 'domainName');
  check(origin.hostHeader && origin.timeouts && origin.customOriginConfig, 'a part would be inherited');
  const { connectionTimeout, readTimeout, keepAliveTimeout } = origin.timeouts;
  check(connectionTimeout >= 1 && connectionTimeout <= 10, 'connectionTimeout');
  check(readTimeout >= 1 && readTimeout <= 120 && keepAliveTimeout >= 1 && keepAliveTimeout <= 120, 'timeouts');
  const { port, protocol } = origin.customOriginConfig;
  check(protocol === 'https' && port === 443, 'the request would not be encrypted');
  for (const [name, value] of Object.entries(origin.customHeaders)) {
    check(name === name.toLowerCase() && !DISALLOWED.test(name), 'header ' + name);
    check(typeof value === 'string' && value.length <= 1783, 'value of header ' + name);
    check(!(name in request.headers), 'the request has the header ' + name);
  }
}

async function answer({ event, store }) {
  let origin = null;
  const cf = {
    kvs: () => ({
      get: async (key) => {
        if (!Object.hasOwn(store, key)) throw new Error('KeyNotFound');
        return store[key];
      },
    }),
    updateRequestOrigin: (chosen) => {
      origin = chosen;
    },
  };
  // No network, no timers, no modules.
  const context = vm.createContext({ cf, console: { log() {} } });
  const result = await vm.runInContext(source + '\n;handler(' + JSON.stringify(event) + ')', context, { timeout: 1000 });
  if (origin !== null) checkOrigin(origin, result);
  return { result, origin };
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  let answered;
  try {
    answered = await answer(JSON.parse(line));
  } catch (error) {
    answered = { error: String(error) };
  }
  process.stdout.write(JSON.stringify(answered) + '\n');
}
