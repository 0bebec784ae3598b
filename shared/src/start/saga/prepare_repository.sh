# Texts of git are matched below, and read by people who may not know the sandbox's language.
export LC_ALL=C
unset CDPATH
errors=$state/git-errors

# A line for the start's detail.
note() {
  echo "openhands-note:$1"
}

# Retries a command that finds a lock of git, for $1 seconds: git does not wait for locks. Those of a repository are held for as long as
# a commit's hooks or a large checkout take. Any other error is permanent. Only the last error is printed.
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

# Another start may make the repository of the same folder at this moment; git stops at the first file that it finds there.
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

# Locks of the user's configuration are held for moments. It may not be writable, in which case git still works.
set_identity() {
  message=$(again "$config_lock_wait" git config --global "$1" "$2" 2>&1) ||
    note "The git configuration $1 was not set: $(one_line "$message")"
}

# git refuses to work in folders of other users; in a sandbox that is no danger, and common.
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

# Clones the repository from the first of the addresses that works. If none does, the error of each is printed.
clone() {
  [ ! -e "$project_dir/.git" ] || return 0
  # A clone that was cut off is in the temporary folder, which is made anew; the final name appears with all in it.
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

# Fetches what may have come to the repository since it was cloned. Errors are only kept: what is asked for may be here all the same.
fetch() {
  for url; do
    if fetch_branches "$url" 2>"$errors.one"; then
      : >"$errors.all"
      return 0
    fi
    # A branch `a` that is gone from the remote is in the way of `a/b`, and the other way round.
    if grep -qE "' exists; cannot create '|some local refs could not be updated" "$errors.one" &&
      fetch_branches --prune "$url" 2>"$errors.one"; then
      : >"$errors.all"
      return 0
    fi
    cat "$errors.one" >>"$errors.all"
  done
}

# Fetches one thing that no branch leads to; the host may not have it, or not give it away.
fetch_only() {
  what=$1
  shift
  for url; do
    if git_with_credentials fetch -q "$url" "$what" 2>/dev/null; then return 0; fi
  done
  return 1
}

# The branch that stands for the default one where the repository names none that is there.
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

# Sets `name` to the branch that is meant: the one of exactly this name, or the one that is written with the place where git keeps it.
find_branch() {
  for name in "$wanted" "${wanted#refs/heads/}" "${wanted#refs/remotes/origin/}" "${wanted#remotes/origin/}" \
    "${wanted#heads/}" "${wanted#origin/}"; do
    # In a clone that is the name of another branch.
    [ "$name" != HEAD ] || continue
    if exists "refs/heads/$name" || exists "refs/remotes/origin/$name"; then return 0; fi
  done
  case $wanted in HEAD | @ | origin/HEAD | remotes/origin/HEAD | refs/remotes/origin/HEAD)
    name=$(git symbolic-ref -q refs/remotes/origin/HEAD) && name=${name#refs/remotes/origin/} ;;
  *) false ;; esac
}

# Sets `name` to the tag that is meant, in full.
find_tag() {
  for name in "refs/tags/$wanted" "refs/tags/${wanted#refs/tags/}" "refs/tags/${wanted#tags/}"; do
    if exists "$name"; then return 0; fi
  done
  return 1
}

is_hash() {
  case $1 in *[!0-9a-fA-F]*) return 1 ;; ????*) ;; *) return 1 ;; esac
}

# Sets `name` to the commit whose hash, or its beginning, is meant.
find_commit() {
  is_hash "$wanted" && name=$(git rev-parse -q --verify "$wanted^{commit}" 2>/dev/null)
}

make_branch() {
  # An attempt that found the configuration locked has made it, and nothing that it tracks.
  if exists "refs/heads/$1"; then
    git branch -q --set-upstream-to="refs/remotes/origin/$1" "$1"
    return
  fi
  if git branch -q --track "$1" "refs/remotes/origin/$1" 2>"$errors.branch"; then return 0; fi
  if grep -q 'could not lock config file' "$errors.branch"; then
    cat "$errors.branch" >&2
    return 1
  fi
  # A clone that an agent limited to one branch has no place for others to be tracked at.
  git branch -q --no-track "$1" "refs/remotes/origin/$1"
}

# The local branch that is in the way of another: `a` of `a/b`, or the other way round.
branch_in_the_way() {
  other=$(git for-each-ref --count=1 --format='%(refname)' "refs/heads/$1/")
  parent=$1
  while [ -z "$other" ]; do
    case $parent in */*) parent=${parent%/*} ;; *) break ;; esac
    if exists "refs/heads/$parent"; then other=refs/heads/$parent; fi
  done
  printf %s "${other#refs/heads/}"
}

# Checks out a branch by its own name alone, whatever else has that name.
check_out_branch() {
  if [ "$(git symbolic-ref -q HEAD)" = "refs/heads/$1" ]; then
    # The clone was made before the branch had commits.
    if is_unborn && is_index_empty; then
      again "$lock_wait" git_with_credentials merge -q --ff-only "refs/remotes/origin/$1" || exit 1
    fi
    return 0
  fi
  # Another start may make it at the same moment.
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

# Makes a branch at what is checked out. An attempt that found HEAD locked, or an earlier start of this conversation, has made it already.
check_out_new() {
  if exists "refs/heads/$1"; then git_with_credentials checkout -q "$1" --; else git checkout -q -b "$1"; fi
}

# Checks out what was asked for; the arguments are the addresses.
check_out_wanted() {
  # git reads a name with a dash as an option.
  case $wanted in -* | refs/heads/-*) refused=yes ;; *) refused= ;; esac
  if [ -n "$refused" ] || ! git check-ref-format "refs/heads/$wanted"; then
    echo "'$wanted' cannot be the name of a branch" >&2
    exit 1
  fi
  # A branch that is there stays as it is: a second conversation in the same folder must not disturb the first.
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
      # Whether the branch is new is not known.
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
    # The default branch of a repository that has none is the commit that is checked out.
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

# Checks out a branch that is nobody else's: a new one at what is checked out, which in a new clone is the default branch. One that an
# earlier start in this sandbox made, and that is still checked out, stays.
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

# Records where the work on what is checked out begins, for lists of changes: a line with the commit, and the branch or HEAD. A commit
# that the work has since gone on from stays.
record_base() {
  commit=$(git rev-parse -q --verify 'HEAD^{commit}') || return 0
  ref=$(git symbolic-ref -q HEAD) || ref=HEAD
  bases=$(git rev-parse --git-common-dir)/openhands-base
  if [ -f "$bases" ]; then
    last=
    while read -r known of; do
      [ "$of" = "$ref" ] || continue
      last=$known
      # A tag or a commit is checked out anew by each start.
      if [ -z "$is_detached" ] && git merge-base --is-ancestor "$known" HEAD; then return 0; fi
    done <"$bases"
    [ "$last" != "$commit" ] || return 0
  fi
  echo "$commit $ref" >>"$bases"
}

# Makes the project's folder a clone of the repository at the addresses with what was asked for checked out.
prepare() {
  is_new=
  clone "$@"
  # Of addresses that failed before the one that worked.
  : >"$errors.all"
  trust "$project_dir"
  cd "$project_dir"
  # What was cloned earlier may be another repository of the same name. Its address is not shown: an agent may have put a token into it.
  # Without one it is what an agent made of it.
  if ! is_expected_origin "$(git remote get-url origin 2>/dev/null)"; then
    echo "$project_dir holds another repository; start in another sandbox" >&2
    exit 1
  fi
  # A clone of a repository that was empty then.
  was_empty=
  if [ -z "$is_new" ] && is_unborn && ! has_remote_branches; then
    was_empty=yes
    fetch "$@"
  fi
  # What was changed is found by comparing with the default branch.
  if is_unborn && has_remote_branches && ! git rev-parse -q --verify refs/remotes/origin/HEAD >/dev/null 2>&1; then
    again "$lock_wait" git symbolic-ref refs/remotes/origin/HEAD "refs/remotes/origin/$(other_default_branch)" || exit 1
  fi
  is_detached=
  if [ -n "$wanted" ]; then check_out_wanted "$@"; else check_out_workspace; fi
  # Without it all is as well; only lists of changes may be longer.
  record_base 2>/dev/null || :
}
