# Functions of the copies of a command and of its supervisor.

boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null || sysctl -n kern.bootsessionuuid 2>/dev/null)

# Prints the id of the process $1, the boot and the time at which it started; fails if it has ended. A process id alone may belong to
# another process after a restart of the container, and ids are dense in a container.
identity() {
  kill -0 "$1" 2>/dev/null || return 1
  if stat=$(cat "/proc/$1/stat" 2>/dev/null); then
    # The second field, the name of the program, may contain blanks and parentheses.
    set -- "$1" ${stat##*") "}
    started=${21-}
  else
    set -- "$1" $(LC_ALL=C ps -o stat= -o lstart= -p "$1" 2>/dev/null)
    started="${3-} ${4-} ${5-} ${6-} ${7-}"
  fi
  # No one has waited for a zombie yet, but it has ended.
  case ${2-} in '' | Z* | X*) return 1 ;; esac
  echo "$1 $boot $started"
}

# Tests whether the process with this identity still runs.
is_alive() {
  [ -n "$1" ] && [ "$(identity "${1%% *}")" = "$1" ]
}

# Prints the ids of the processes in the session or process group $1.
members() {
  if [ -r /proc/self/stat ]; then
    for file in /proc/[0-9]*/stat; do
      { read -r stat <"$file"; } 2>/dev/null || continue
      pid=${stat%% *}
      stat=${stat##*") "}
      case $stat in Z* | X*) continue ;; esac
      # The fields are state, parent, group, session.
      stat=${stat#* }
      stat=${stat#* }
      group=${stat%% *}
      stat=${stat#* }
      if [ "$group" = "$1" ] || [ "${stat%% *}" = "$1" ]; then echo "$pid"; fi
    done
  else
    ps -A -o pid= -o pgid= -o stat= | while read -r pid group stat; do
      case $stat in Z*) continue ;; esac
      if [ "$group" = "$1" ]; then echo "$pid"; fi
    done
  fi
}

# Ends the process $1, its session and its process group: with SIGTERM, and with SIGKILL after 5 seconds.
stop() {
  for signal in TERM KILL; do
    # dash, bash and busybox all accept this form for a process group.
    kill "-$signal" "-$1" 2>/dev/null
    for pid in $1 $(members "$1"); do kill "-$signal" "$pid" 2>/dev/null; done
    tries=50
    while [ "$tries" -gt 0 ]; do
      [ -n "$(members "$1")" ] || return 0
      sleep 0.1
      tries=$((tries - 1))
    done
  done
}

# Replaces this process by a command that leads a session of its own. Where neither program exists (macOS has perl), the shell's job control
# gives background processes at least a process group of their own.
lead() {
  if command -v setsid >/dev/null 2>&1; then exec setsid "$@"; fi
  if command -v perl >/dev/null 2>&1; then exec perl -e 'use POSIX (); POSIX::setsid(); exec @ARGV; exit 127' "$@"; fi
  exec "$@"
}
command -v setsid >/dev/null 2>&1 || command -v perl >/dev/null 2>&1 || set -m 2>/dev/null
