#!/usr/bin/env bash
# Puts known faults back into the product, one at a time, and expects the simulation to find each of them with the seed that the patch
# names. It changes files of the checkout and restores them. Each fault takes a build and about half a minute.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

git diff --quiet -- shared functions || { echo "shared/ or functions/ has uncommitted changes" >&2; exit 1; }
log=$(mktemp)
restore() { git checkout --quiet -- shared functions; }
trap 'restore; rm -f "$log"' EXIT

failed=0
for patch in tests/sim/faults/*.patch; do
    seed=$(sed -n 's/^seed \([0-9]*\):.*/\1/p' "$patch")
    git apply "$patch"
    if SIM_SEED=$seed SIM_STARTS=12 SIM_TENANTS=3 cargo test --workspace --test sim -- --exact scenario::scenario_holds --nocapture > "$log" 2>&1; then
        echo "NOT FOUND: $patch"
        failed=1
    elif grep --quiet VIOLATION "$log"; then
        echo "found: $patch:$(grep --max-count=1 VIOLATION "$log" | cut --characters=1-160)"
    else
        echo "FAILED: $patch"
        tail -n 20 "$log"
        failed=1
    fi
    restore
done
exit $failed
