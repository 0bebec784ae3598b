#!/usr/bin/env bash
# Real clients against a server of this workspace and a real agent server: the npm package of a client, the Python package of a workspace,
# and the web UI in a browser. `tests/clients/run.sh` runs all, `tests/clients/run.sh typescript-client`, `… cloud-workspace` or
# `… web-ui` one of them. What is not there is installed: packages by npm and pip, and on CI (CI=true, as root) the browser by apt-get.
# What cannot be had is said.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

tests=("${@:-typescript-client cloud-workspace web-ui}")
# shellcheck disable=SC2206 # words
tests=(${tests[*]})

not_run() {
    echo "not run: ${tests[*]} ($1)"
    exit 0
}

node=$(node --version 2> /dev/null) || not_run "there is no Node.js"
version=${node#v}
[ "${version%%.*}" -ge 20 ] || not_run "Node.js is $node; 20 or newer is needed"
command -v npm > /dev/null || not_run "there is no npm"
if ! cmp -s package-lock.json node_modules/.installed; then
    npm ci || not_run "the packages could not be installed"
    cp package-lock.json node_modules/.installed
fi

browser() {
    export CHROMIUM=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
    [ -n "$CHROMIUM" ]
}

# As the tests of functions build them, so that nothing is compiled twice.
cargo build --locked --quiet --workspace --bins
for test in "${tests[@]}"; do
    if [ "$test" = web-ui ] && ! browser; then
        if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
            { apt-get update && apt-get install --yes --no-install-recommends chromium; } > /dev/null || true
        fi
        if ! browser; then
            echo "not run: web-ui (there is no Chromium; CHROMIUM=PATH names one)"
            continue
        fi
    fi
    npm run --silent "$test"
done
