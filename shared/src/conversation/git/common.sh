# Common first part of changes.sh and diff.sh. It needs a POSIX shell, git 2.20 or later, `readlink` and `head -c`.
# Input: $root is the workspace, $ref the commit to compare with (empty: see find_base), $inline the largest result in bytes that is
# printed, $temporary an empty folder.
export LC_ALL=C GIT_LITERAL_PATHSPECS=1 GIT_OPTIONAL_LOCKS=0 GIT_TERMINAL_PROMPT=0
# Git must not use the network, for a lazy fetch of a partial clone or for anything else.
export GIT_ALLOW_PROTOCOL=none GIT_NO_LAZY_FETCH=1
exec </dev/null
umask 077
errors=$temporary/errors
result=$temporary/result

# Prints the result, or the path of the file that contains it, and exits.
deliver() {
  size=$(($(wc -c <"$result")))
  if [ "$size" -le "$inline" ] && command -v base64 >/dev/null 2>&1; then
    echo inline
    base64 <"$result"
    rm -rf "$temporary"
  else
    printf 'file %s\n' "$result"
  fi
  exit 0
}

# Exits with an outcome: one word and an optional text.
outcome() {
  printf '%s\000%s\000' "$1" "${2-}" >"$result"
  deliver
}

# Runs git without configuration or environment that could change its output or start other programs. $overrides is the path of a
# configuration file, or empty.
overrides=
g() {
  git -c core.quotePath=false -c core.fsmonitor= -c core.hooksPath=/dev/null -c "safe.directory=*" -c color.ui=false \
    -c diff.autoRefreshIndex=true -c diff.relative=false -c diff.orderFile=/dev/null -c core.warnAmbiguousRefs=false \
    ${overrides:+-c} ${overrides:+"include.path=$overrides"} "$@"
}

# Disables filter programs, so that git compares the files of the working tree as they are.
leave_filters_out() {
  overrides=
  g config --name-only --get-regexp '^filter\..*\.(clean|process|required)$' 2>/dev/null | while IFS= read -r key; do
    driver=${key%.*}
    for setting in "$driver.clean=" "$driver.process=" "$driver.required=false"; do
      g config -f "$temporary/overrides" "${setting%=*}" "${setting##*=}"
    done
  done
  [ ! -f "$temporary/overrides" ] || overrides=$temporary/overrides
}

# Runs `git diff` and writes its output to the file $compared. Git runs the filter program on a file with a changed modification time. If
# git fails, that program may be missing, so filters are disabled and git is retried. If it fails again, a setting that only `git diff`
# reads may be invalid: `git diff-index` ignores it, but reports every file with a changed modification time as changed.
compared=$temporary/compared
compare() {
  g diff "$@" >"$compared" 2>"$errors"
  code=$?
  [ "$code" -gt 1 ] || return "$code"
  leave_filters_out
  g diff "$@" >"$compared" 2>"$errors"
  code=$?
  [ "$code" -gt 1 ] || return "$code"
  g diff-index "$@" >"$compared" 2>"$errors"
}

has_git=yes
command -v git >/dev/null 2>&1 || has_git=
if [ -n "$has_git" ]; then
  for name in $(git rev-parse --local-env-vars 2>/dev/null) GIT_EXTERNAL_DIFF GIT_DIFF_OPTS GIT_GLOB_PATHSPECS \
    GIT_NOGLOB_PATHSPECS GIT_ICASE_PATHSPECS; do unset "$name"; done
fi

root=$(cd "$root" 2>/dev/null && pwd -P && echo .) || outcome nothing
root=${root%??}
[ "$root" != / ] || root=
# The variable separates paths by colons, so a path with a colon cannot be set. Repositories above the workspace are ignored.
case $root in *:*) ;; *) export GIT_CEILING_DIRECTORIES="${root%/*}" ;; esac

# Sets $top to the top folder of the current folder's repository, and $prefix to the relative path from there, `a/b/`. Returns 1 if the
# workspace has no such repository, 2 if git fails.
find_repository() {
  [ -n "$has_git" ] || return 1
  if top=$(g rev-parse --show-toplevel 2>"$errors" && echo .) && prefix=$(g rev-parse --show-prefix 2>"$errors" && echo .); then
    top=${top%??} prefix=${prefix%??}
    case $top/ in "$root"/*) return 0 ;; *) return 1 ;; esac
  fi
  case $(cat "$errors") in
  *'not a git repository (or any'* | *'must be run in a work tree'*) return 1 ;;
  esac
  return 2
}

# Prints the commit that a revision name resolves to, or nothing.
commit_of() {
  commit=$(g rev-parse --verify --quiet "$1^{commit}" 2>/dev/null)
  case $commit in *[!0-9a-f]*) ;; *) printf %s "$commit" ;; esac
}

empty_tree() {
  g hash-object -t tree /dev/null 2>/dev/null
}

is_clean() {
  compare --quiet --no-ext-diff --ignore-submodules=dirty HEAD --
}

# Prints the commit that the latest start recorded for the branch $1 (a full ref; HEAD if detached; empty: any branch), or nothing. The
# commit must be an ancestor of HEAD and, if $2 is set, a descendant of $2. Starts write lines of commit and ref; malformed lines are
# skipped.
begun_at() {
  notes=$(g rev-parse --git-common-dir 2>/dev/null && echo .) && notes=${notes%??}/openhands-base || return
  [ -f "$notes" ] && [ -r "$notes" ] || return
  tail -c 65536 "$notes" | tr -d '\000' | {
    commits=
    while read -r commit name || [ -n "$commit" ]; do
      case $commit in *[!0-9a-f]*) continue ;; esac
      case ${#commit} in 40 | 64) ;; *) continue ;; esac
      [ -n "$name" ] && [ "$name" = "${1:-$name}" ] && commits="$commit $commits"
    done
    tries=0
    for commit in $commits; do
      [ "$tries" -lt 20 ] || return
      tries=$((tries + 1))
      g merge-base --is-ancestor "$commit" HEAD 2>/dev/null || continue
      [ -z "$2" ] || g merge-base --is-ancestor "$2" "$commit" 2>/dev/null || continue
      printf %s "$commit"
      return
    done
  }
}

# Sets $base to the first of these that exists: the merge base with the remote's default branch, as far as the repository knows it; a local
# main or master; the last commit; the empty tree.
find_fork() {
  base=$head
  [ -n "$head" ] || { base=$(empty_tree); return; }
  # A remote that was added rather than cloned has no HEAD.
  for candidate in "$(g symbolic-ref -q refs/remotes/origin/HEAD 2>/dev/null)" refs/remotes/origin/main refs/remotes/origin/master only; do
    [ "$candidate" != only ] || candidate=$(g for-each-ref --count=2 --format='%(refname)' refs/remotes/origin 2>/dev/null)
    default=$(commit_of "$candidate")
    [ -n "$default" ] || continue
    # A shallow clone may lack the merge base.
    base=$(g merge-base HEAD "$default" 2>/dev/null) || base=$default
    return
  done
  for candidate in main master; do
    default=$(commit_of "refs/heads/$candidate")
    [ -n "$default" ] || continue
    if [ "$candidate" != "$branch" ] && g merge-base --is-ancestor "$default" HEAD 2>/dev/null; then base=$default; fi
    return
  done
}

# Sets $base to the commit from which the work began, without access to the remote. In this order: $ref; the commit that a start recorded
# for the branch; the branch's remote-tracking branch, unless all work is pushed, because pushed work must be shown too; the result of
# find_fork, or the commit that a start recorded for another branch if this branch forked from that one later.
find_base() {
  if [ -n "$ref" ]; then
    base=$(commit_of "$ref")
    [ -n "$base" ] || { [ "$ref" = HEAD ] && base=$(empty_tree); }
    return
  fi
  head=$(commit_of HEAD)
  branch=$(g symbolic-ref -q HEAD 2>/dev/null)
  base=$(begun_at "${branch:-HEAD}" '')
  [ -z "$base" ] || return 0
  branch=${branch#refs/heads/}
  if [ -n "$branch" ]; then
    base=$(commit_of "refs/remotes/origin/$branch")
    if [ -n "$base" ] && { [ "$base" != "$head" ] || ! is_clean; }; then return 0; fi
  fi
  find_fork
  begun=$(begun_at '' "$base")
  base=${begun:-$base}
}
