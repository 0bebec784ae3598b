can_run() {
  case $1 in
    */*) [ -f "$1" ] && [ -x "$1" ] ;;
    *) command -v "$1" >/dev/null 2>&1 ;;
  esac
}

# Tests whether a shell with these options runs a file.
runs_files() {
  case $("$@" /dev/fd/3 </dev/null 2>/dev/null 3<<'FILE'
echo "it runs"
FILE
  ) in *"it runs") ;; *) return 1 ;; esac
}

# Prints the script without a byte order mark, with line ends that shells accept.
plain_script() {
  case $(LC_ALL=C tr -cd '\n' <"$script" | tr '\n' x | head -c 1) in
    '') LC_ALL=C tr '\r' '\n' <"$script" ;;
    *) LC_ALL=C sed "s/$cr*\$//" "$script" ;;
  esac | LC_ALL=C sed "1s/^\($bom\)*//"
}

# Tests for interpreters of other languages. bash accepts many of their scripts, with different results.
is_other_language() {
  case $1 in
    python* | pypy* | ipython* | uv | uvx | pipx | poetry | xonsh | ruby* | jruby* | irb | rake | bundle | perl* | raku | node* | npx | bun | \
    bunx | deno* | tsx | ts-node* | zx | coffee | php* | lua* | texlua | awk | gawk | mawk | nawk | sed | gsed | jq | bc | dc | m4 | make | gmake | \
    just | pwsh* | powershell* | cmd | cmd.exe | osascript | fish* | csh | tcsh | rc | es | elvish | nu | tclsh* | wish* | expect* | R | Rscript* | \
    julia* | octave* | gnuplot* | java | jshell | jbang | groovy* | kotlin* | scala* | amm | clojure* | clj | bb | lein | runghc* | runhaskell* | \
    stack | cabal | ocaml* | escript | elixir* | erl | go | gorun | rust-script | cargo | swift* | crystal | nim* | dart | dotnet* | csi | fsi | \
    guile* | racket* | sbcl | clisp | emacs* | vim* | swipl | gforth | sqlite3 | psql | ansible-playbook | terraform | docker) return 0 ;;
  esac
  return 1
}

# Replaces this shell by a script of the project, regardless of the script's mode, line ends, byte order mark and shebang. If the shebang
# names an interpreter that is not a plain shell, that interpreter runs the script; otherwise bash does. The path is relative to the working
# directory.
run_script() {
  script=$1
  cr=$(printf '\r')
  bom=$(printf '\357\273\277')
  first=$(head -c 512 "$script" | LC_ALL=C tr '\r\000' '\n ' | head -n 1 | LC_ALL=C sed "s/^\($bom\)*//")
  # The variables that the shebang's env sets and unsets.
  assigned=
  removed=
  set -f
  case $first in '#!'*) set -- ${first#??} ;; *) set -- ;; esac
  set +f
  case ${1-} in env | */env)
    # The words are already split, which is the only purpose of -S. The script runs in the project's folder with the environment of the
    # sandbox, so -C and -i have no effect.
    shift
    while :; do
      case ${1-} in
        --unset | -u) removed="$removed ${2-}" && shift && [ $# -eq 0 ] || shift ;;
        --unset=*) removed="$removed ${1#*=}" && shift ;;
        -u*) removed="$removed ${1#-u}" && shift ;;
        --chdir | --argv0 | -[CPa]) shift && [ $# -eq 0 ] || shift ;;
        --split-string=*) word=${1#*=} && shift && set -- "$word" "$@" ;;
        -S?*) word=${1#-S} && shift && set -- "$word" "$@" ;;
        -[i0v]?*) word=-${1#-?} && shift && set -- "$word" "$@" ;;
        -*) shift ;;
        *=*) assigned="$assigned $1" && shift ;;
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
        elif ! is_other_language "$name" && plain_script | "$shell" -n 2>/dev/null; then
          set -- "$shell"
        else
          echo "$script needs $1, which is not installed here" >&2
          exit 127
        fi
      fi ;;
  esac
  case ${1##*/} in bash | rbash | sh | zsh | ksh | ksh93 | mksh)
    # Options that prevent the shell from running a file, such as those of another shell, are dropped.
    if [ $# -gt 1 ] && ! runs_files "$@"; then set -- "$1"; fi
    if LC_ALL=C grep -q "$cr" "$script" || [ "$(head -c 3 "$script" | LC_ALL=C tr '\000' ' ')" = "$bom" ]; then
      # The shell runs a copy of the script under the script's own name: it opens the copy, changes to the project's folder and removes the
      # copy. So $0, BASH_SOURCE and line numbers are those of the script, and no file remains, however the script ends. A restricted shell
      # cannot change folders, so the restriction starts after that.
      restrict=
      word=$1
      shift
      case ${word##*/} in rbash) word=bash && restrict='set -r; ' ;; esac
      count=$#
      set -- "$@" "$word"
      while [ "$count" -gt 0 ]; do
        word=$1
        shift
        count=$((count - 1))
        case $word in
          -r | --restricted) restrict='set -r; ' && continue ;;
          -[!-]*r* | -r*) restrict='set -r; ' && word=${word%%r*}${word#*r} ;;
        esac
        set -- "$@" "$word"
      done
      OPENHANDS_PROJECT=$(pwd) && OPENHANDS_COPY=$(mktemp -d) && mkdir -p "$OPENHANDS_COPY/${script%/*}" || exit 1
      OPENHANDS_RM=$(command -v rm)
      {
        printf %s 'cd -- "$OPENHANDS_PROJECT" && "$OPENHANDS_RM" -rf -- "$OPENHANDS_COPY" || exit 126; '
        printf %s 'unset OPENHANDS_PROJECT OPENHANDS_COPY OPENHANDS_RM OLDPWD; '
        printf %s "$restrict"
        plain_script
      } >"$OPENHANDS_COPY/$script" || exit 1
      export OPENHANDS_PROJECT OPENHANDS_COPY OPENHANDS_RM
      cd "$OPENHANDS_COPY" || exit 1
    fi ;;
  esac
  # These variables are set last, because PATH and others affect the commands above.
  interpreter=$(command -v "$1") && case $interpreter in /*) shift && set -- "$interpreter" "$@" ;; esac
  set -f
  for word in $removed; do command unset -v "$word" 2>/dev/null; done
  for word in $assigned; do command export "$word" 2>/dev/null; done
  set +f
  exec "$@" "$script"
}
