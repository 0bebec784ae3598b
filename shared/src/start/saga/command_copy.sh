# A copy of a command. The first copy starts a run of the script, and every copy repeats the outcome. A run is a folder, which only one copy
# can create. Its supervisor is a process in a session of its own, which outlives this copy: agent servers kill their commands when they
# end. If a supervisor has died, one copy starts the next run.
# The standard input may be the lock of a local agent server, which it frees by ending.
exec </dev/null
mask=$(umask)
umask 077
eval "$functions"
mkdir -p "$d" || exit 1
trap 'if [ -f "$d/exit" ]; then eval "$finally"; fi' EXIT
me=$(identity $$)

# Starts the run $n in its new folder, and waits until its supervisor has ended.
run() {
  echo "$me" >"$r/owner"
  # The script of a run can outlive its supervisor.
  previous=$(cat "$d/run.$((n - 1))/script" 2>/dev/null)
  if is_alive "$previous"; then stop "${previous%% *}"; fi
  (lead sh -c "$functions
$supervisor" sh "$d" "$n" "$limit" "$mask" "$script" "$finally" "$task" "$token" $$) </dev/null >/dev/null 2>&1 &
  wait $!
}

n=1
while [ -d "$d/run.$((n + 1))" ]; do n=$((n + 1)); done
polls=0
ownerless=0
until [ -f "$d/exit" ]; do
  r=$d/run.$n
  if [ "$n" -gt "$max_runs" ]; then
    echo "137 $max_runs" >"$d/exit.$$" && mv "$d/exit.$$" "$d/exit"
  elif mkdir "$r" 2>/dev/null; then
    run
  elif [ ! -d "$r" ]; then
    echo "the folder $r cannot be created" >&2
    exit 1
  else
    owner=$(cat "$r/owner" 2>/dev/null)
    if is_alive "$owner"; then
      ownerless=0
    elif [ -n "$owner" ] || [ "$ownerless" -ge 20 ]; then
      # A supervisor that has ended well has written the outcome before.
      [ -f "$d/exit" ] || n=$((n + 1))
      ownerless=0
      continue
    else
      # The copy that created the folder writes its identity next, unless it was killed.
      ownerless=$((ownerless + 1))
    fi
    polls=$((polls + 1))
    if [ "$polls" -le 100 ]; then sleep 0.1; else sleep 0.5; fi
  fi
done
read -r code n <"$d/exit"
tail -c "$output_limit" "$d/run.$n/out"
tail -c "$output_limit" "$d/run.$n/err" >&2
if [ "$code" = timeout ]; then
  printf '\n%s\n' "$timed_out"
  exit 124
fi
exit "$code"
