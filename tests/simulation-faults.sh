#!/usr/bin/env bash
# Puts known faults back into the product, one at a time, and expects the simulation to find each of them with the seed that its patch
# names. Works on the last commit, in a work tree of its own below target/. The first build takes some minutes, then each
# fault about one.
#
#   tests/simulation-faults.sh [NAME…]     all faults, or those with these names
#
# The header of a patch says what is wrong: `seed N: …`. If 12 starts of 3 tenants do not show it, a line `run VARIABLE=VALUE …` has the
# variables of the scenario, see tests/README.md, or a line `test NAME` the test that finds it. SIM_PROFILE selects cargo's profile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

patches=$PWD/tests/sim/faults
tree=$PWD/target/simulation-faults/tree
# Not that of the checkout: cargo takes the packages of both for the same ones, and a test of the checkout would have a fault.
export CARGO_TARGET_DIR=$PWD/target/simulation-faults/target
git diff --quiet HEAD -- shared functions tests/sim || echo "uncommitted changes are left out" >&2
git worktree prune
if [ -e "$tree/.git" ]; then
    git -C "$tree" checkout --quiet --force --detach "$(git rev-parse HEAD)"
else
    git worktree add --quiet --force --detach "$tree"
fi
log=$(mktemp)
trap 'git -C "$tree" checkout --quiet -- .; rm -f "$log"' EXIT

failed=0
if [ $# -eq 0 ]; then set -- "$patches"/*.patch; fi
for name in "$@"; do
    name=$(basename "$name" .patch)
    patch=$patches/$name.patch
    seed=$(sed -n 's/^seed \([0-9]*\):.*/\1/p' "$patch")
    test=$(sed -n 's/^test //p' "$patch")
    read -ra variables <<< "$(sed -n 's/^run //p' "$patch")"
    git -C "$tree" apply "$patch"
    if (
        cd "$tree"
        env SIM_SEED="$seed" SIM_STARTS=12 SIM_TENANTS=3 ${variables[@]+"${variables[@]}"} \
            cargo test --workspace --profile "${SIM_PROFILE:-dev}" --test sim -- --exact "${test:-scenario::scenario_holds}" --nocapture
    ) > "$log" 2>&1; then
        echo "NOT FOUND: $name"
        failed=1
    elif grep --quiet VIOLATION "$log"; then
        echo "found: $name, seed $seed:$(grep --max-count=1 VIOLATION "$log" | cut --characters=1-160)"
    else
        echo "FAILED: $name"
        tail -n 20 "$log"
        failed=1
    fi
    git -C "$tree" checkout --quiet -- .
done
exit $failed
