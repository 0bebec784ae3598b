#!/usr/bin/env bash
# Runs the storage and queue tests against ministack, a second implementation of DynamoDB, S3 and SQS, which the first run installs into
# target/ministack. See docs/second-engine.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

chosen=(
    authorizer::
    deletion::
    download::a_deleted_conversation_leaves_no_export
    download::callers_at_once_cause_one_export
    download::an_export_that_outlasts_its_request_is_built_by_a_job_and_kept_for_every_client
    events::
    pending_messages::
    records::
    saga::
    support_tests::engines_are_those_that_the_environment_selects
    support_tests::ministack_ends_with_the_process_that_started_it
    webhooks::webhook_is_not_acknowledged_if_the_store_fails
)

tools=${CARGO_TARGET_DIR:-target}/ministack
tests/install-ministack.sh "$tools"
[ -e "$tools/installed" ] || exit 0

tests=(cargo test --quiet --workspace --locked --test it --)
listed=$("${tests[@]}" --list "${chosen[@]}")
for filter in "${chosen[@]}"; do
    if ! grep -q "^$filter.*: test$" <<< "$listed"; then
        echo "failed: no test is called $filter" >&2
        exit 1
    fi
done
echo "on ministack:"
OPENHANDS_TEST_AWS=ministack "${tests[@]}" "${chosen[@]}"
