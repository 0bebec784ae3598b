# Lists the changed files below a folder, which is $rest relative to $root. Every field of the result ends with NUL. For each repository:
# `repository` and its name (empty: the folder's own repository); `changed` and pairs of status and path up to an empty field; `untracked`
# and paths up to an empty field. `failed` and git's error follow the name of a repository that cannot be listed; `skipped` stands for a
# repository without the commit $ref. `end` is last, and is missing if the list is truncated at $limit bytes.
here=$root/$rest
if [ ! -d "$here" ]; then
  if [ -e "$here" ]; then outcome file; else outcome nothing; fi
fi
here=$(cd "$here" 2>/dev/null && pwd -P && echo .) || outcome failed 'the folder cannot be entered'
here=${here%??}
case $here/ in "$root"/*) ;; *) outcome outside ;; esac
cd "$here/" || outcome failed 'the folder cannot be entered'

# Writes why the last repository has no list.
fail() {
  printf 'failed\000%s\000' "$(head -c 2000 "$errors")"
}

# Lists the changes of the current folder's repository, limited to this folder.
list() {
  # A rename is listed as a deletion and an addition. Changes inside a submodule belong to the submodule.
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
  # Nested repositories, such as a clone in a workspace, are listed with the folder that contains them.
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
        # If the folder has a repository of its own, that repository lists the files.
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
