# Shortcuts for development: https://just.systems. Each recipe is one or two cargo commands that work without just, too.

# List the recipes.
default:
    @just --list

# Run the whole product on http://127.0.0.1:3000, with a script in place of a language model.
demo:
    cargo local --demo

# Format, lint, and check the dependencies.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- --deny warnings
    if command -v cargo-deny > /dev/null; then cargo deny check licenses bans sources; fi

# Everything but the tests on real agent servers and real Lambda processes.
test-fast *filter:
    cargo test --workspace --lib
    cargo test --package tests --test it -- --skip end_to_end --skip lambda:: --skip openapi::requests_made_up {{ filter }}

# All tests, as CI runs them; installs the agent server on first use.
test:
    cargo test --workspace

# What CI runs: the checks, all tests, and the scripts in tests/.
ci:
    .ci/run
