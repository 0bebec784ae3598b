# Runs $body, a script, in a shell of its own with $temporary, an empty folder. After $seconds it is killed with every program that it
# started: agent servers stop only the shell of a command (1.15), or not what left its process group. Needs `mktemp`.
tmp=${TMPDIR:-/tmp}
# Results that were never fetched.
find "$tmp/" -maxdepth 1 -type d -name 'openhands-git.*' -mmin +15 -exec rm -rf {} + 2>/dev/null
temporary=$(mktemp -d "$tmp/openhands-git.XXXXXX") || exit 3
export temporary
if timeout -s KILL 5 true >/dev/null 2>&1; then
  timeout -s KILL "$seconds" sh -c "$body"
else
  # Where there is no such program, at least the time that each program computes is limited.
  (
    ulimit -t "$seconds" 2>/dev/null
    eval "$body"
  )
fi
code=$?
[ "$code" = 0 ] || rm -rf "$temporary"
exit "$code"
