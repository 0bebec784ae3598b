#!/usr/bin/env bash
# Runs the tests on real agent servers with the older supported versions, and the upgrade from those. `cargo test` covers the default
# version. Each version is installed once, into target/agent-server or OPENHANDS_AGENT_SERVER_FOLDER.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for version in "${@:-1.15.0 1.49.1}"; do
    for one in $version; do
        echo "agent server $one"
        OPENHANDS_AGENT_SERVER_VERSION=$one cargo test --workspace --test it -- end_to_end
    done
done
echo "upgrades to the default version"
cargo test --workspace --test it -- --ignored end_to_end_upgrade
