"""Prints the list of models for `functions/web-client/src/models.txt`.

Run it with the Python of an installed agent server, whose packages it reads (docs/operations.md, "The list of models"):

    FOLDER/bin/python infra/generate/models.py > functions/web-client/src/models.txt

The models are those of LiteLLM's price list that an agent can use (chat and responses; no images, embeddings, speech, ...), and those that
openhands-sdk has verified, which have a `*` in front. Each has the name under which LiteLLM accepts it, with its provider.
"""

import json
import re
import runpy
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

MODES = {"chat", "responses"}
# Price lists name the API in addition to the provider.
APIS = {"bedrock_converse": "bedrock"}
# Entries that are no models: the description of an entry, prices of capacity, of tools, and of models that a user has trained.
NO_MODELS = re.compile(r"^sample_spec$|-month-commitment/|(^|/)container$|(^|/)ft:")


def provider_of(entry):
    """`vertex_ai-anthropic_models` is a part of `vertex_ai`."""
    provider = entry["litellm_provider"].split("-language-models")[0]
    if provider.startswith("vertex_ai-"):
        provider = "vertex_ai"
    return APIS.get(provider, provider)


def name_of(key, entry):
    """The key with its provider in front, in the provider's own spelling (`amazon-nova/x` is `amazon_nova/x`)."""
    provider = provider_of(entry)
    prefix, slash, rest = key.partition("/")
    if slash and prefix.replace("-", "_") == provider.replace("-", "_"):
        return f"{provider}/{rest}"
    return f"{provider}/{key}"


def main():
    packages = Path(sysconfig.get_paths()["purelib"])
    prices = json.loads((packages / "litellm/model_prices_and_context_window_backup.json").read_text())
    verified_models = runpy.run_path(str(packages / "openhands/sdk/llm/utils/verified_models.py"))["VERIFIED_MODELS"]
    verified = {f"{provider}/{name}" for provider, names in verified_models.items() for name in names}
    models = {key: entry for key, entry in prices.items() if entry.get("mode") in MODES and not NO_MODELS.search(key)}
    known = {name_of(key, entry) for key, entry in models.items()}
    print(f"# litellm {version('litellm')}, openhands-sdk {version('openhands-sdk')}; printed by infra/generate/models.py")
    for name in sorted(known | verified):
        print(f"*{name}" if name in verified else name)
    print(f"{len(known | verified)} models, {len(verified)} verified", file=sys.stderr)


if __name__ == "__main__":
    main()
