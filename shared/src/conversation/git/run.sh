# Runs the script $body in its own shell, with $temporary set to an empty folder. After $seconds it kills the script and every program that
# the script started: agent servers stop only the shell of a command (1.15), or leave processes alive that have left its process group.
# Needs `mktemp`.
tmp=${TMPDIR:-/tmp}
# Removes results that were never fetched.
find "$tmp/" -maxdepth 1 -type d -name 'openhands-git.*' -mmin +15 -exec rm -rf {} + 2>/dev/null
temporary=$(mktemp -d "$tmp/openhands-git.XXXXXX") || exit 3
export temporary
if timeout -s KILL 5 true >/dev/null 2>&1; then
  timeout -s KILL "$seconds" sh -c "$body"
else
  # Without a working `timeout` program, at least the CPU time of each process is limited.
  (
    ulimit -t "$seconds" 2>/dev/null
    eval "$body"
  )
fi
code=$?
[ "$code" = 0 ] || rm -rf "$temporary"
exit "$code"
