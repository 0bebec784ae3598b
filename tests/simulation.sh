#!/usr/bin/env bash
# The simulation in its optimized profile: 100 seeds of 100 starts of 10 tenants on 10 workers, and the traces of 20 seeds in two processes.
# The first build takes some minutes.
#
#   SIM_SEEDS=500 SIM_STARTS=200 SIM_WORKERS=20 tests/simulation.sh     a longer run; tests/README.md has all variables
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export SIM_SEEDS=${SIM_SEEDS:-100} SIM_STARTS=${SIM_STARTS:-100} SIM_TENANTS=${SIM_TENANTS:-10} SIM_WORKERS=${SIM_WORKERS:-10}
export SIM_HASHED_SEEDS=${SIM_HASHED_SEEDS:-20}
cargo build --profile simulation --package tests --test sim --locked
cargo test --profile simulation --package tests --test sim --locked -- --nocapture scenario::
