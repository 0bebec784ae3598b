# The script matches texts of git and shows them to users, who may not read the sandbox's language.
export LC_ALL=C
unset CDPATH
errors=$state/git-errors

# Prints a note of the start.
note() {
  echo "openhands-note:$1"
}

# Retries a command that finds a git lock, for $1 seconds: git itself does not wait for locks. A repository's locks last as long as the
# hooks of a commit or a large checkout. Any other error is permanent. Prints only the last error.
again() {
  deadline=$(($(date +%s) + $1))
  shift
  tries=0
  while ! "$@" 2>"$errors"; do
    tries=$((tries + 1))
    if [ "$(date +%s)" -lt "$deadline" ] &&
      grep -qE "\.lock': File exists|could not lock config file .*: File exists|cannot lock ref .* but expected" "$errors"; then
      if [ "$tries" -le 10 ]; then sleep 0.1; else sleep 0.5; fi
    else
      cat "$errors" >&2
      return 1
    fi
  done
}

# Another start may create the repository of the same folder concurrently; git then fails at the first existing file.
init() {
  tries=50
  while ! git init -q 2>"$errors"; do
    tries=$((tries - 1))
    if [ "$tries" -gt 0 ] && grep -q ': File exists$' "$errors"; then sleep 0.1; else
      cat "$errors" >&2
      return 1
    fi
  done
}

# Locks of the user's configuration are short. The configuration may be read-only; git still works in that case.
set_identity() {
  message=$(again "$config_lock_wait" git config --global "$1" "$2" 2>&1) ||
    note "The git configuration $1 was not set: $(one_line "$message")"
}

# git refuses to work in folders of other users. In a sandbox such folders are common and no danger.
trust() {
  git config --global --get-all safe.directory 2>/dev/null | grep -qxF -- "$1" && return 0
  message=$(again "$config_lock_wait" git config --global --add safe.directory "$1" 2>&1) && return 0
  if ! git -C "$1" rev-parse --git-dir >/dev/null 2>&1; then
    printf '%s\n' "$message" >&2
    return 1
  fi
}

one_line() {
  printf %s "$1" | tr '\n' ' '
}

git_with_credentials() {
  git -c credential.helper= -c credential.helper="store --file='$credentials'" "$@"
}

exists() {
  git show-ref --verify -q "$1"
}

is_unborn() {
  ! git rev-parse -q --verify 'HEAD^{commit}' >/dev/null 2>&1
}

is_index_empty() {
  [ -z "$(git ls-files | head -n 1)" ]
}

has_remote_branches() {
  [ -n "$(git for-each-ref --count=1 refs/remotes/origin 2>/dev/null)" ]
}

# Clones the repository from the first address that works. If none works, prints the error of each.
clone() {
  [ ! -e "$project_dir/.git" ] || return 0
  # The clone is made in a temporary folder and then renamed, so that the final folder is always complete. An interrupted clone is removed
  # and restarted.
  temporary=$state/clone
  : >"$errors.all"
  for url; do
    rm -rf "$temporary"
    if git_with_credentials clone -q -o origin -- "$url" "$temporary" 2>"$errors"; then is_new=yes && break; fi
    cat "$errors" >>"$errors.all"
  done
  if [ -z "$is_new" ]; then
    cat "$errors.all" >&2
    exit 1
  fi
  if [ -e "$project_dir/.git" ]; then rm -rf "$temporary"; else
    if [ -d "$project_dir" ]; then rmdir "$project_dir"; fi
    mv "$temporary" "$project_dir"
  fi
}

fetch_branches() {
  again "$lock_wait" git_with_credentials fetch -q "$@" '+refs/heads/*:refs/remotes/origin/*'
}

# Fetches commits that are newer than the clone. Errors are only recorded, because the requested branch may already exist in the clone.
fetch() {
  for url; do
    if fetch_branches "$url" 2>"$errors.one"; then
      : >"$errors.all"
      return 0
    fi
    # A branch `a` that was deleted on the remote conflicts with `a/b`, and vice versa.
    if grep -qE "' exists; cannot create '|some local refs could not be updated" "$errors.one" &&
      fetch_branches --prune "$url" 2>"$errors.one"; then
      : >"$errors.all"
      return 0
    fi
    cat "$errors.one" >>"$errors.all"
  done
}

# Fetches one object that no branch contains; the host may lack it or refuse to serve it.
fetch_only() {
  what=$1
  shift
  for url; do
    if git_with_credentials fetch -q "$url" "$what" 2>/dev/null; then return 0; fi
  done
  return 1
}

# The substitute for the default branch if the repository names none or a missing one.
other_default_branch() {
  for name in main master; do
    if exists "refs/remotes/origin/$name"; then
      echo "$name"
      return 0
    fi
  done
  name=$(git for-each-ref --sort=-committerdate --format='%(refname)' refs/remotes/origin 2>/dev/null |
    grep -vxF refs/remotes/origin/HEAD | head -n 1)
  echo "${name#refs/remotes/origin/}"
}

# Sets `name` to the requested branch: the one with exactly this name, or the one that the request names with a prefix of git
# (`refs/heads/`, `origin/`).
find_branch() {
  for name in "$wanted" "${wanted#refs/heads/}" "${wanted#refs/remotes/origin/}" "${wanted#remotes/origin/}" \
    "${wanted#heads/}" "${wanted#origin/}"; do
    # In a clone, HEAD is an alias of another branch.
    [ "$name" != HEAD ] || continue
    if exists "refs/heads/$name" || exists "refs/remotes/origin/$name"; then return 0; fi
  done
  case $wanted in HEAD | @ | origin/HEAD | remotes/origin/HEAD | refs/remotes/origin/HEAD)
    name=$(git symbolic-ref -q refs/remotes/origin/HEAD) && name=${name#refs/remotes/origin/} ;;
  *) false ;; esac
}

# Sets `name` to the full name of the requested tag.
find_tag() {
  for name in "refs/tags/$wanted" "refs/tags/${wanted#refs/tags/}" "refs/tags/${wanted#tags/}"; do
    if exists "$name"; then return 0; fi
  done
  return 1
}

is_hash() {
  case $1 in *[!0-9a-fA-F]*) return 1 ;; ????*) ;; *) return 1 ;; esac
}

# Sets `name` to the commit with the requested hash or hash prefix.
find_commit() {
  is_hash "$wanted" && name=$(git rev-parse -q --verify "$wanted^{commit}" 2>/dev/null)
}

make_branch() {
  # An attempt that found the configuration locked has created the branch, but not its upstream configuration.
  if exists "refs/heads/$1"; then
    git branch -q --set-upstream-to="refs/remotes/origin/$1" "$1"
    return
  fi
  if git branch -q --track "$1" "refs/remotes/origin/$1" 2>"$errors.branch"; then return 0; fi
  if grep -q 'could not lock config file' "$errors.branch"; then
    cat "$errors.branch" >&2
    return 1
  fi
  # A clone that an agent limited to one branch cannot track other branches.
  git branch -q --no-track "$1" "refs/remotes/origin/$1"
}

# Prints the local branch that conflicts with another: `a` with `a/b`, or vice versa.
branch_in_the_way() {
  other=$(git for-each-ref --count=1 --format='%(refname)' "refs/heads/$1/")
  parent=$1
  while [ -z "$other" ]; do
    case $parent in */*) parent=${parent%/*} ;; *) break ;; esac
    if exists "refs/heads/$parent"; then other=refs/heads/$parent; fi
  done
  printf %s "${other#refs/heads/}"
}

# Checks out a branch by its own name, even if a tag or file has the same name.
check_out_branch() {
  if [ "$(git symbolic-ref -q HEAD)" = "refs/heads/$1" ]; then
    # The clone is older than the first commit of the branch.
    if is_unborn && is_index_empty; then
      again "$lock_wait" git_with_credentials merge -q --ff-only "refs/remotes/origin/$1" || exit 1
    fi
    return 0
  fi
  # Another start may create the branch concurrently.
  if ! exists "refs/heads/$1"; then
    other=$(branch_in_the_way "$1")
    if [ -n "$other" ]; then
      echo "git cannot have the branch '$1' beside the branch '$other' of this clone: rename that one, or start in another sandbox" >&2
      exit 1
    fi
    again "$lock_wait" make_branch "$1" || exists "refs/heads/$1" || exit 1
  fi
  again "$lock_wait" git_with_credentials checkout -q "$1" -- || exit 1
}

# Creates a branch at HEAD. An attempt that found HEAD locked, or an earlier start of this conversation, may have created it already.
check_out_new() {
  if exists "refs/heads/$1"; then git_with_credentials checkout -q "$1" --; else git checkout -q -b "$1"; fi
}

# Checks out the requested branch, tag or commit; the arguments are the addresses.
check_out_wanted() {
  # git parses a name with a leading dash as an option.
  case $wanted in -* | refs/heads/-*) refused=yes ;; *) refused= ;; esac
  if [ -n "$refused" ] || ! git check-ref-format "refs/heads/$wanted"; then
    echo "'$wanted' cannot be the name of a branch" >&2
    exit 1
  fi
  # An existing branch is not updated: a second conversation in the same folder must not disturb the first.
  if find_branch; then
    check_out_branch "$name"
    return 0
  fi
  if [ -z "$is_new" ] && [ -z "$was_empty" ]; then fetch "$@"; fi
  tag=${wanted#refs/tags/}
  short=$wanted
  for prefix in refs/heads/ refs/remotes/origin/ remotes/origin/ heads/ origin/; do short=${short#"$prefix"}; done
  case $short in HEAD | @)
    short=$(git symbolic-ref -q HEAD) || short=
    short=${short#refs/heads/} ;;
  esac
  if find_branch; then
    check_out_branch "$name"
  elif find_tag || { fetch_only "refs/tags/$tag:refs/tags/$tag" "$@" && find_tag; } ||
    find_commit || { is_hash "$wanted" && fetch_only "$wanted" "$@" && find_commit; }; then
    again "$lock_wait" git_with_credentials checkout -q --detach "$name" -- || exit 1
    is_detached=yes
  elif is_unborn && { ! has_remote_branches || { [ -z "$is_new" ] && [ "$(git symbolic-ref -q HEAD)" = "refs/heads/$short" ]; }; }; then
    if [ -s "$errors.all" ]; then
      # The script cannot determine whether the branch is new.
      if [ "$(git symbolic-ref -q HEAD)" != "refs/heads/$short" ]; then
        cat "$errors.all" >&2
        exit 1
      fi
      note "The branch $short has no commits in this sandbox, and could not be fetched: $(one_line "$(cat "$errors.all")")"
      return 0
    fi
    if [ "$(git symbolic-ref -q HEAD)" != "refs/heads/$short" ]; then again "$lock_wait" check_out_new "$short" || exit 1; fi
    note "The branch $short is new: it has no commits yet"
  else
    # If the repository has no default branch, HEAD means the current commit.
    case $wanted in HEAD | @ | origin/HEAD) return 0 ;; esac
    if [ -s "$errors.all" ]; then
      cat "$errors.all" >&2
      echo "the clone has no branch, tag or commit '$wanted', and could not be brought up to date" >&2
    else
      echo "the repository has no branch, tag or commit '$wanted'" >&2
    fi
    exit 1
  fi
}

# Checks out a branch that only this conversation uses: a new one at HEAD, which in a new clone is the default branch. A workspace branch of
# an earlier start in this sandbox stays if it is still checked out.
check_out_workspace() {
  if is_unborn; then
    if ! has_remote_branches; then
      if [ -s "$errors.all" ]; then
        note "The repository has no commits in this sandbox, and could not be fetched: $(one_line "$(cat "$errors.all")")"
      elif [ -n "$(git tag)" ]; then note "The repository has no branches, only tags"; else
        note "The repository is empty: it has no commits yet"
      fi
    elif is_index_empty; then
      name=$(other_default_branch)
      check_out_branch "$name"
      [ -n "$was_empty" ] || note "The repository's default branch does not exist: $name was checked out"
    fi
  fi
  case $(git symbolic-ref -q HEAD) in
    refs/heads/openhands-workspace-*) ;;
    *) again "$lock_wait" check_out_new "$workspace" || exit 1 ;;
  esac
}

# Records the base commit of the work, for lists of changes: a line with the commit, and the branch or HEAD. A recorded commit stays if it
# is an ancestor of HEAD.
record_base() {
  commit=$(git rev-parse -q --verify 'HEAD^{commit}') || return 0
  ref=$(git symbolic-ref -q HEAD) || ref=HEAD
  bases=$(git rev-parse --git-common-dir)/openhands-base
  if [ -f "$bases" ]; then
    last=
    while read -r known of; do
      [ "$of" = "$ref" ] || continue
      last=$known
      # Each start checks out a tag or a commit again, so its base is always the commit itself.
      if [ -z "$is_detached" ] && git merge-base --is-ancestor "$known" HEAD; then return 0; fi
    done <"$bases"
    [ "$last" != "$commit" ] || return 0
  fi
  echo "$commit $ref" >>"$bases"
}

# Clones the repository from the given addresses into the project's folder, and checks out the requested branch, tag or commit.
prepare() {
  is_new=
  clone "$@"
  # Errors of the addresses that failed before the one that worked are dropped.
  : >"$errors.all"
  trust "$project_dir"
  cd "$project_dir"
  # The existing clone may be of another repository with the same name. The error omits its address, because an agent may have put a token
  # into it. A clone without an address was made by an agent and is accepted.
  if ! is_expected_origin "$(git remote get-url origin 2>/dev/null)"; then
    echo "$project_dir holds another repository; start in another sandbox" >&2
    exit 1
  fi
  # The repository was empty when it was cloned.
  was_empty=
  if [ -z "$is_new" ] && is_unborn && ! has_remote_branches; then
    was_empty=yes
    fetch "$@"
  fi
  # Lists of changes compare with the default branch, so it must be set.
  if is_unborn && has_remote_branches && ! git rev-parse -q --verify refs/remotes/origin/HEAD >/dev/null 2>&1; then
    again "$lock_wait" git symbolic-ref refs/remotes/origin/HEAD "refs/remotes/origin/$(other_default_branch)" || exit 1
  fi
  is_detached=
  if [ -n "$wanted" ]; then check_out_wanted "$@"; else check_out_workspace; fi
  # A failure here does no harm; lists of changes may only be longer.
  record_base 2>/dev/null || :
}
