can_run() {
  case $1 in
    */*) [ -f "$1" ] && [ -x "$1" ] ;;
    *) command -v "$1" >/dev/null 2>&1 ;;
  esac
}

# Whether a shell with these options runs a file.
runs_files() {
  case $("$@" /dev/fd/3 </dev/null 2>/dev/null 3<<'FILE'
echo "it runs"
FILE
  ) in *"it runs") ;; *) return 1 ;; esac
}

# The script without a byte order mark, and with the line ends that shells know.
plain_script() {
  case $(LC_ALL=C tr -cd '\n' <"$script" | tr '\n' x | head -c 1) in
    '') LC_ALL=C tr '\r' '\n' <"$script" ;;
    *) LC_ALL=C sed "s/$cr*\$//" "$script" ;;
  esac | LC_ALL=C sed "1s/^\($bom\)*//"
}

# Runs a script of the project in place of this shell, whatever its mode, line ends, byte order mark and shebang. An interpreter other
# than a plain shell is the one that the shebang names; everything else is run by bash. The path is relative to the working directory.
run_script() {
  script=$1
  cr=$(printf '\r')
  bom=$(printf '\357\273\277')
  first=$(head -c 512 "$script" | LC_ALL=C tr '\r\000' '\n ' | head -n 1 | LC_ALL=C sed "s/^\($bom\)*//")
  set -f
  case $first in '#!'*) set -- ${first#??} ;; *) set -- ;; esac
  set +f
  case ${1-} in env | */env)
    # The words are separate already, which is all that -S is for.
    shift
    while :; do
      case ${1-} in
        -S?*) word=${1#-S} && shift && set -- "$word" "$@" ;;
        -*) shift ;;
        *=*) command export "$1" 2>/dev/null; shift ;;
        *) break ;;
      esac
    done ;;
  esac
  shell=bash
  can_run bash || shell=sh
  name=${1-}
  name=${name##*/}
  case $name in
    '') set -- "$shell" ;;
    sh | dash | ash) shift && set -- "$shell" "$@" ;;
    *)
      if ! can_run "$1"; then
        if can_run "$name"; then
          shift && set -- "$name" "$@"
        elif plain_script | "$shell" -n 2>/dev/null; then
          set -- "$shell"
        else
          echo "$script is written for $1, which is not installed here" >&2
          exit 127
        fi
      fi ;;
  esac
  case ${1##*/} in bash | rbash | sh | zsh | ksh | ksh93 | mksh)
    # Options with which the shell would not run a file, such as those of another shell, are left out.
    if [ $# -gt 1 ] && ! runs_files "$@"; then set -- "$1"; fi
    if LC_ALL=C grep -q "$cr" "$script" || [ "$(head -c 3 "$script" | LC_ALL=C tr '\000' ' ')" = "$bom" ]; then
      # A copy is run, but not as one: the shell opens it under the name that the script has in the project, then goes to the project
      # and removes the copy. So $0, BASH_SOURCE and line numbers are those of the script, and nothing is left, however it ends.
      OPENHANDS_PROJECT=$(pwd) && OPENHANDS_COPY=$(mktemp -d) && mkdir -p "$OPENHANDS_COPY/${script%/*}" || exit 1
      {
        printf %s 'cd -- "$OPENHANDS_PROJECT" && rm -rf -- "$OPENHANDS_COPY" || exit 126; unset OPENHANDS_PROJECT OPENHANDS_COPY OLDPWD; '
        plain_script
      } >"$OPENHANDS_COPY/$script" || exit 1
      export OPENHANDS_PROJECT OPENHANDS_COPY
      cd "$OPENHANDS_COPY" || exit 1
    fi ;;
  esac
  exec "$@" "$script"
}
