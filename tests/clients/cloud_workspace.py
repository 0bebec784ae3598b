"""Uses a server as a script does with the cloud workspace of OpenHands' SDK (see cloud-workspace.mjs): a sandbox of its own, the user's
profiles, secrets and MCP servers, and an agent that runs in the sandbox with them."""

import json
import os
import urllib.request

from openhands.sdk import Agent, Conversation, Tool
from openhands.tools.terminal import TerminalTool
from openhands.workspace import OpenHandsCloudWorkspace

URL, KEY, MODEL_KEY, SECRET, FOLDER = (os.environ[name] for name in ("URL", "KEY", "MODEL_KEY", "SECRET", "FOLDER"))


def api(method: str, path: str, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{URL}{path}", data=data, headers=headers, method=method)
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def say(text: str) -> None:
    print(f"step: {text}", flush=True)


script = api("GET", "/api/v1/settings")["llm_base_url"]
fast = {"model": "openai/scripted-fast", "api_key": MODEL_KEY, "base_url": script, "temperature": 0.5}
api("POST", "/api/v1/settings/profiles/fast", {"llm": fast})
api("POST", "/api/v1/secrets", {"name": "DEPLOY_KEY", "value": SECRET, "description": "for tests"})
tracker = {"url": "https://tracker.example/mcp", "transport": "http"}
files = {"command": "npx", "args": ["-y", "files"]}
api("POST", "/api/v1/settings", {"agent_settings_diff": {"mcp_config": {"tracker": tracker, "files": files}}})

# The default, /workspace/project, is a folder of this machine, since the sandbox is a process.
with OpenHandsCloudWorkspace(cloud_api_url=URL, cloud_api_key=KEY, working_dir=FOLDER) as workspace:
    ran = workspace.execute_command("echo $((6 * 7))", timeout=120)
    assert (ran.exit_code, ran.stdout.strip()) == (0, "42"), ran
    say("a sandbox of its own runs commands")

    default = workspace.get_llm()
    assert (default.model, default.base_url) == ("openai/scripted-demo", script), default
    assert default.api_key.get_secret_value() == "none-needed"
    llm = workspace.get_llm("fast")
    assert (llm.model, llm.base_url, llm.temperature) == ("openai/scripted-fast", script, 0.5), llm
    assert llm.api_key.get_secret_value() == MODEL_KEY
    assert workspace.get_llm("fast", temperature=0.1).temperature == 0.1
    try:
        workspace.get_llm("unknown")
        raise AssertionError("a profile that does not exist was found")
    except FileNotFoundError:
        pass
    say("get_llm: the settings' model, a profile, a profile that does not exist")

    secrets = workspace.get_secrets()
    assert {name: secret.description for name, secret in secrets.items()} == {"DEPLOY_KEY": "for tests"}, secrets
    assert secrets["DEPLOY_KEY"].get_value() == SECRET
    assert workspace.get_secrets(["OTHER"]) == {}
    say("get_secrets: names, and values only on request")

    servers = workspace.get_mcp_config()
    assert sorted(str(server.url or server.command) for server in servers.values()) == ["https://tracker.example/mcp", "npx"], servers
    assert servers["files"].args == ["-y", "files"], servers
    say("get_mcp_config: the servers of the settings")

    agent = Agent(llm=llm, tools=[Tool(name=TerminalTool.name)])
    conversation = Conversation(agent=agent, workspace=workspace, visualizer=None)
    conversation.update_secrets(secrets)
    conversation.send_message("Say hello")
    conversation.run(timeout=600)
    said = [event.llm_message.content[0].text for event in conversation.state.events if event.kind == "MessageEvent"]
    assert any("a script wrote this answer" in text for text in said), said
    written = workspace.execute_command("cat hello.txt", cwd=workspace.working_dir, timeout=120)
    assert written.stdout.strip() == "Written by an agent that follows a script.", written
    conversation.close()
    say("an agent answered with the profile, and ran a command in the sandbox")
    sandbox = workspace._sandbox_id

assert all(one["status"] == "MISSING" for one in api("GET", f"/api/v1/sandboxes?id={sandbox}") if one), "the sandbox stays"
say("the sandbox was deleted with the workspace")
