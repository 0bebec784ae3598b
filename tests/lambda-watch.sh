#!/usr/bin/env bash
# Starts a conversation through `cargo lambda watch`: every function runs in its own process, the router of Cargo.toml forwards requests to
# it, and all use the engines of `cargo local engines`. Then starts another one with stream-start. No LLM is called. The first run installs
# cargo-lambda into target/cargo-lambda, and the agent server into target/agent-server or OPENHANDS_AGENT_SERVER_FOLDER. Fails if
# cargo-lambda cannot be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=${CARGO_TARGET_DIR:-target}/cargo-lambda
# Skips its dependency ziglang, a cross compiler that only `cargo lambda build` needs.
tests/python-tools.sh "$tools" 'functions under cargo lambda watch' --no-deps cargo-lambda==1.9.2
[ -e "$tools/installed" ] || exit 1

export OPENHANDS_AGENT_SERVER_FOLDER=${OPENHANDS_AGENT_SERVER_FOLDER:-$PWD/target/agent-server}
export LLM_MODEL=openai/none LLM_API_KEY=none
unset SESSION_API_KEY
deadline=${TIME_LIMIT:-900} # seconds; the first run builds and installs
folder=$(mktemp -d)
engines='' watch=''

stop() { # a signal, then the process's end, or else its KILL
    [ -n "$2" ] || return 0
    kill "-$1" "$2" 2> /dev/null || return 0
    for _ in $(seq 150); do
        kill -0 "$2" 2> /dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$2" 2> /dev/null || true
}

runs() { # Whether the process exists and is not a zombie.
    local state
    state=$(ps -o stat= -p "$1") && [[ $state != Z* ]]
}

clean_up() {
    status=$?
    trap '' INT TERM
    stop INT "$watch"
    stop TERM "$engines"
    for file in "$folder"/data/sandboxes/*/agent-server.pid; do
        [ -e "$file" ] && runs "$(cat "$file")" || continue
        kill -KILL -- "-$(cat "$file")"
        echo "failed: an agent server was left over" >&2
        status=1
    done
    if [ "$status" -ne 0 ]; then
        tail -n 40 "$folder"/*.log >&2 || true
    fi
    rm -rf "$folder"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

fail() {
    echo "failed: $*" >&2
    exit 1
}

until_true() { # what, and a command
    local what=$1 end=$((SECONDS + deadline))
    shift
    until "$@"; do
        kill -0 "$engines" 2> /dev/null || fail "cargo local engines ended"
        [ -z "$watch" ] || kill -0 "$watch" 2> /dev/null || fail "cargo lambda watch ended"
        [ "$SECONDS" -lt "$end" ] || fail "still not so after ${deadline}s: $what"
        sleep 0.3
    done
}

field() { # the first string field of this name in JSON on standard input
    sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" | head -n 1
}

port_is_free() { ! (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }
port=$((20000 + RANDOM % 10000))
until port_is_free "$port"; do port=$((port + 1)); done
url=http://127.0.0.1:$port
api=$url/api/v1/app-conversations

# Builds all functions at once, instead of each one at its first request. The same set of packages results in the same dependencies as
# `cargo lambda watch` builds.
cargo build --locked --quiet
target/debug/local --data "$folder/data" engines --env-file "$folder/functions.env" --invoke-url "$url" \
    > "$folder/engines.log" 2>&1 &
engines=$!
until_true "the environment is written" test -e "$folder/functions.env"
"$tools/bin/cargo-lambda" lambda watch --ignore-changes --invoke-address 127.0.0.1 --invoke-port "$port" \
    --env-file "$folder/functions.env" > "$folder/watch.log" 2>&1 &
watch=$!
until_true "the functions answer" curl -fsS -o /dev/null "$api/start-tasks/count" 2> /dev/null
until_true "the agent server is installed" grep -q '^Ready\.' "$folder/engines.log"

SECONDS=0
task=$(curl -fsS "$api" -H 'content-type: application/json' -d '{"title": "Through cargo lambda watch"}' | field id)
[ -n "$task" ] || fail "POST gave no task"
task_is_final() {
    shown=$(curl -fsS "$api/start-tasks?ids=$task") || return 1
    outcome=$(field status <<< "${shown%%,\"request\"*}")
    [ "$outcome" = READY ] || [ "$outcome" = ERROR ]
}
until_true "the start is READY or ERROR" task_is_final
[ "$outcome" = READY ] || fail "the start ended in ERROR: $shown"
echo "POST: READY after ${SECONDS}s"

found=$(curl -fsS "$api/search")
[[ $found == *'"sandbox_status":"RUNNING"'* ]] || fail "the sandbox does not run: $found"
sandbox=$(field sandbox_id <<< "$found")
SECONDS=0
streamed=$(curl -fsSN "$api/stream-start" -H 'content-type: application/json' -d "{\"sandbox_id\": \"$sandbox\"}")
[[ $streamed == '['*'"status":"WORKING"'*'"status":"READY"'*']' ]] || fail "stream-start gave: $streamed"
echo "stream-start in its sandbox: READY after ${SECONDS}s, $(grep -c '"status"' <<< "$streamed") states"
