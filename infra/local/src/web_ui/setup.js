// Runs before the web UI and configures it for the server of this page, so that users need not enter its address. Servers that the
// user has added are kept.
(function (server) {
  // Disables the telemetry that the UI sends to its vendor.
  window.doNotTrack = "1";
  window.__AGENT_CANVAS_DO_NOT_TRACK__ = true;

  // The UI's first dialog prompts for a model, and is skipped if the server has one. Its checklist of first steps is dismissed because
  // some of the steps are not possible with this server.
  try {
    if (server.has_model) localStorage.setItem("openhands-onboarded", "1");
    localStorage.setItem("openhands-sidebar-onboarding-checklist-dismissed", "true");
  } catch (refused) {
    // Without storage the UI shows its dialog.
  }

  var servers = "openhands-backends";
  var chosen = "openhands-active-backend";
  var id = "this-server";
  var others = [];
  var mine = null;
  try {
    JSON.parse(localStorage.getItem(servers) || "[]").forEach(function (one) {
      if (one.id === id) mine = one;
      else others.push(one);
    });
  } catch (malformed) {
    others = [];
  }
  var key = "";
  if (server.needs_key) {
    key = (mine && mine.apiKey) || window.prompt(server.key_prompt) || "";
  }
  mine = {
    id: id,
    name: (mine && mine.name) || "This server",
    host: server.host || window.location.origin,
    apiKey: key,
    kind: "cloud",
    authMode: server.needs_key ? "api-key" : "cookie",
  };
  try {
    localStorage.setItem(servers, JSON.stringify([mine].concat(others)));
    if (!localStorage.getItem(chosen)) localStorage.setItem(chosen, JSON.stringify({ backendId: id, orgId: null }));
  } catch (refused) {
    // Without storage the UI prompts for the server.
  }

  // Hides what this server cannot serve: links to pages of its hosted counterpart, automations, keys that profiles share, the login with
  // a subscription in place of a key, agents of other kinds than OpenHands, and sub-agents.
  var missing = [
    "[data-testid=settings-integrations-link]",
    "[data-testid=settings-cloud-link]",
    ":has(> [data-testid=sidebar-automations-link])",
    "div:has(> div > [data-testid=add-provider-connection])",
    "label:has([data-testid=llm-auth-type-input])",
    "label:has([data-testid=agent-type-selector])",
    "div:has(> label > [data-testid=agent-settings-enable-sub-agents])",
    "[data-testid^=onboarding-agent-option-]:not([data-testid=onboarding-agent-option-openhands])",
  ];
  var style = document.createElement("style");
  style.textContent = missing.join(",") + "{display:none !important}";
  document.head.appendChild(style);

  // The UI sends the key of a sandbox in the first message of a websocket. Only agent servers of the UI's own version read it there;
  // all others read it from the address when the websocket is opened. The keys are taken from the API's responses with
  // conversations, which is where the UI gets them, too.
  // Several sandboxes may share a host, and have paths of their own then.
  var keys = {};
  function addressOf(url, rest) {
    return url.host + url.pathname.split(rest)[0];
  }
  function remember(rows) {
    rows.forEach(function (row) {
      if (row && row.conversation_url && row.session_api_key) {
        keys[addressOf(new URL(row.conversation_url), "/api/conversations")] = row.session_api_key;
      }
    });
  }
  var fetchAny = window.fetch;
  window.fetch = function (what) {
    var answer = fetchAny.apply(window, arguments);
    var path = new URL(what && what.url ? what.url : what, window.location.href).pathname;
    if (!/\/api\/v1\/app-conversations(\/search)?$/.test(path)) return answer;
    return answer.then(function (response) {
      if (!response.ok) return response;
      return response
        .clone()
        .json()
        .then(function (body) {
          remember(Array.isArray(body) ? body : body.items || []);
        })
        .catch(function () {})
        .then(function () {
          return response;
        });
    });
  };
  var Plain = window.WebSocket;
  window.WebSocket = class extends Plain {
    constructor(address, protocols) {
      var url = new URL(address, window.location.href);
      var known = url.pathname.indexOf("/sockets/") >= 0 && keys[addressOf(url, "/sockets/")];
      if (known && !url.searchParams.has("session_api_key")) url.searchParams.set("session_api_key", known);
      super(url.href, protocols || []);
      this.is_known = Boolean(known);
    }
    send(data) {
      // An older agent server would pass this message to the agent.
      if (this.is_known && typeof data === "string" && data.indexOf('{"type":"auth"') === 0) return;
      super.send(data);
    }
  };
})(__SERVER__);
