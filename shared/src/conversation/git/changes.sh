# Lists what has changed below a folder: $rest from $root. Every field of the result ends with NUL: `repository` and its name
# (empty: the folder's own), `changed` and pairs of status and path up to an empty field, `untracked` and paths up to an empty
# field, for each repository, `skipped` for one without the commit $ref, and `end`, unless the list is cut off at $limit bytes.
here=$root/$rest
if [ ! -d "$here" ]; then
  if [ -e "$here" ]; then outcome file; else outcome nothing; fi
fi
here=$(cd "$here" 2>/dev/null && pwd -P && echo .) || outcome failed 'the folder cannot be entered'
here=${here%??}
case $here/ in "$root"/*) ;; *) outcome outside ;; esac
cd "$here/" || outcome failed 'the folder cannot be entered'

# Lists the repository of the current folder, as far as it is in this folder.
list() {
  printf 'repository\000%s\000changed\000' "$1"
  # Renames are a deletion and an addition. Changes in a submodule are its own.
  if ! g diff --name-status -z --no-renames --relative --no-ext-diff --no-textconv --ignore-submodules=dirty "$base" -- 2>"$errors"; then
    printf '\000failed\000%s\000' "$(head -c 2000 "$errors")"
    return
  fi
  printf '\000untracked\000'
  if ! g ls-files --others --exclude-standard -z 2>"$errors"; then
    printf '\000failed\000%s\000' "$(head -c 2000 "$errors")"
    return
  fi
  printf '\000'
}

find_repository
found=$?
case $found in
0) find_base || outcome unknown ;;
2) outcome failed "$(head -c 2000 "$errors")" ;;
esac
{
  [ "$found" != 0 ] || list ''
  # Repositories in the folder, such as the clone in a workspace, are listed with it.
  nested=0
  for folder in ./*; do
    [ -e "$folder/.git" ] && [ ! -L "$folder" ] || continue
    nested=$((nested + 1))
    [ "$nested" -le "$most" ] || { printf 'more\000'; break; }
    (cd "$folder" 2>/dev/null && find_repository && [ -z "$prefix" ] && if find_base; then list "${folder#./}"; else printf 'skipped\000'; fi)
  done
  printf 'end\000'
} | head -c "$limit" >"$result"
deliver
