# Lists what has changed below a folder: $rest from $root. Every field of the result ends with NUL: `repository` and its name
# (empty: the folder's own), `changed` and pairs of status and path up to an empty field, `untracked` and paths up to an empty
# field, for each repository; `failed` and git's error after the name of one that cannot be listed; `skipped` for one without the
# commit $ref; and `end`, unless the list is cut off at $limit bytes.
here=$root/$rest
if [ ! -d "$here" ]; then
  if [ -e "$here" ]; then outcome file; else outcome nothing; fi
fi
here=$(cd "$here" 2>/dev/null && pwd -P && echo .) || outcome failed 'the folder cannot be entered'
here=${here%??}
case $here/ in "$root"/*) ;; *) outcome outside ;; esac
cd "$here/" || outcome failed 'the folder cannot be entered'

# Says why there is no list of the last repository.
fail() {
  printf 'failed\000%s\000' "$(head -c 2000 "$errors")"
}

# Lists the repository of the current folder, as far as it is in this folder.
list() {
  # Renames are a deletion and an addition. Changes in a submodule are its own.
  compare --name-status -z --no-renames --relative --no-ext-diff --no-textconv --ignore-submodules=dirty "$base" -- || { fail; return; }
  printf 'changed\000'
  cat "$compared"
  printf '\000untracked\000'
  g ls-files --others --exclude-standard -z 2>"$errors"
  code=$?
  printf '\000'
  [ "$code" = 0 ] || fail
}

find_repository
found=$?
case $found in
0) find_base || outcome unknown ;;
2) outcome failed "$(head -c 2000 "$errors")" ;;
esac
{
  if [ "$found" = 0 ]; then
    printf 'repository\000\000'
    list
  fi
  # Repositories in the folder, such as the clone in a workspace, are listed with it.
  nested=0
  for folder in ./*; do
    [ -e "$folder/.git" ] && [ ! -L "$folder" ] || continue
    nested=$((nested + 1))
    [ "$nested" -le "$most" ] || { printf 'more\000'; break; }
    (
      overrides=
      cd "$folder" 2>/dev/null || exit
      find_repository
      case $?$prefix in
      0)
        if find_base; then
          printf 'repository\000%s\000' "${folder#./}"
          list
        else
          printf 'skipped\000'
        fi
        ;;
      2*)
        # The folder's own repository lists the files, if there is one.
        [ "$found" != 0 ] || exit
        printf 'repository\000%s\000' "${folder#./}"
        fail
        ;;
      esac
    )
  done
  printf 'end\000'
} | head -c "$limit" >"$result"
deliver
