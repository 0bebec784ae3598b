# Texts of git are matched below, and read by people who may not know the sandbox's language.
export LC_ALL=C
unset CDPATH
errors=$state/git-errors

# A line for the start's detail.
note() {
  echo "openhands-note:$1"
}

# git does not wait for its locks: of several starts in one sandbox at once, all but one would fail. Any other error is permanent. Only
# the last error is printed.
again() {
  tries=$1
  shift
  while ! "$@" 2>"$errors"; do
    tries=$((tries - 1))
    if [ "$tries" -gt 0 ] && grep -qE "\.lock': File exists|could not lock config file .*: File exists|cannot lock ref .* but expected" "$errors"; then
      sleep 0.1
    else
      cat "$errors" >&2
      return 1
    fi
  done
}

# git refuses to work in folders of other users; in a sandbox that is no danger, and common.
trust() {
  git config --global --get-all safe.directory 2>/dev/null | grep -qxF -- "$1" ||
    again 20 git config --global --add safe.directory "$1"
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

# Fetches what may have come to the repository since it was cloned. Errors are only kept: what is asked for may be here all the same.
fetch() {
  for url; do
    if again 5 git_with_credentials fetch -q "$url" '+refs/heads/*:refs/remotes/origin/*' 2>>"$errors.all"; then
      : >"$errors.all"
      return 0
    fi
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
  # A clone that an agent limited to one branch has no place for others to be tracked at.
  git branch -q --track "$1" "refs/remotes/origin/$1" 2>/dev/null || git branch -q --no-track "$1" "refs/remotes/origin/$1"
}

# Checks out a branch by its own name alone, whatever else has that name.
check_out_branch() {
  if [ "$(git symbolic-ref -q HEAD)" = "refs/heads/$1" ]; then
    # The clone was made before the branch had commits.
    if is_unborn && is_index_empty; then
      again 5 git_with_credentials merge -q --ff-only "refs/remotes/origin/$1" || exit 1
    fi
    return 0
  fi
  # Another start may make it at the same moment.
  if ! exists "refs/heads/$1"; then again 5 make_branch "$1" || exists "refs/heads/$1" || exit 1; fi
  again 5 git_with_credentials checkout -q "$1" -- || exit 1
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
  : >"$errors.all"
  if [ -z "$is_new" ]; then fetch "$@"; fi
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
    again 5 git_with_credentials checkout -q --detach "$name" -- || exit 1
  elif is_unborn && { ! has_remote_branches || { [ -z "$is_new" ] && [ "$(git symbolic-ref -q HEAD)" = "refs/heads/$short" ]; }; }; then
    if [ "$(git symbolic-ref -q HEAD)" != "refs/heads/$short" ]; then again 5 git checkout -q -b "$short" || exit 1; fi
    note "The branch $short is new: it has no commits yet"
  else
    # The default branch of a repository that has none is the commit that is checked out.
    case $wanted in HEAD | @ | origin/HEAD) return 0 ;; esac
    cat "$errors.all" >&2
    echo "the repository has no branch, tag or commit '$wanted'" >&2
    exit 1
  fi
}

# Checks out a branch for this conversation alone, at the repository's default one.
check_out_workspace() {
  if is_unborn; then
    if ! has_remote_branches; then
      if [ -n "$(git tag)" ]; then note "The repository has no branches, only tags"; else
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
    *) again 5 git checkout -q -b "$workspace" || exit 1 ;;
  esac
}

# Makes the project's folder a clone of the repository at the addresses with what was asked for checked out.
prepare() {
  is_new=
  clone "$@"
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
    again 5 git symbolic-ref refs/remotes/origin/HEAD "refs/remotes/origin/$(other_default_branch)" || exit 1
  fi
  if [ -n "$wanted" ]; then check_out_wanted "$@"; else check_out_workspace; fi
}
