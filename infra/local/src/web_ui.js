// Runs before the web UI does, and tells it which server to talk to: the one that this page is of, so that nobody has to enter it.
// Servers that the user has added stay.
(function (server) {
  // The UI's own telemetry is its makers'; nobody here asked for it.
  window.doNotTrack = "1";
  window.__AGENT_CANVAS_DO_NOT_TRACK__ = true;

  // Its first dialog asks for a model: only where there is none yet.
  try {
    if (server.has_model) localStorage.setItem("openhands-onboarded", "1");
  } catch (refused) {
    // Then it asks.
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
  if (server.asks_for_key) {
    key = (mine && mine.apiKey) || window.prompt(server.question) || "";
  }
  mine = {
    id: id,
    name: (mine && mine.name) || "This server",
    host: server.host || window.location.origin,
    apiKey: key,
    kind: "cloud",
    authMode: server.asks_for_key ? "api-key" : "cookie",
  };
  try {
    localStorage.setItem(servers, JSON.stringify([mine].concat(others)));
    if (!localStorage.getItem(chosen)) localStorage.setItem(chosen, JSON.stringify({ backendId: id, orgId: null }));
  } catch (refused) {
    // Without storage the UI asks for the server itself.
  }
})(__SERVER__);
