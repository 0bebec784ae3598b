# Prints one file before and after the change: $rest relative to $root, or $other if $rest does not exist. The result is `diff`, then the
# kind and the size in bytes of both sides, each terminated by NUL, then the bytes of both sides.

# Resolves $given without following a link. Sets $here to the deepest existing folder of the path and $name to the remaining path.
walk() {
  here=$root name=$given
  while :; do
    first=${name%%/*}
    if [ "$first" = "$name" ] || [ -L "$here/$first" ] || [ ! -d "$here/$first" ]; then return; fi
    here=$here/$first name=${name#*/}
  done
}

# Sets $base, $path (relative to $top), and $mode and $id of the file in the base; $mode and $id are empty if the base has no such file.
look_up() {
  top= base= mode= id=
  cd "$here/" 2>/dev/null || outcome failed 'a folder of the path cannot be entered'
  above=$here path=$name failure=
  while :; do
    find_repository
    case $? in
    0) break ;;
    1) [ -z "$failure" ] || outcome failed "$failure"; return ;;
    esac
    # Git cannot read this repository, for example because .git is invalid. A repository above it lists the files.
    [ -n "$failure" ] || failure=$(head -c 2000 "$errors")
    [ "$above" != "$root" ] || outcome failed "$failure"
    path=${above##*/}/$path above=${above%/*}
    cd "$above/" 2>/dev/null || outcome failed "$failure"
  done
  find_base || outcome unknown
  path=$prefix$path
  cd "$top/" || outcome failed 'the repository cannot be entered'
  entry=$(g ls-tree --full-tree "$base" -- "$path" 2>"$errors") || outcome failed "$(head -c 2000 "$errors")"
  [ -n "$entry" ] || return
  mode=${entry%% *} id=${entry#* * } id=${id%%[!0-9a-f]*}
}

# Resolves $given, whose folders may be links. If a folder in the base became a link, its file in the base has priority over the target of
# the link.
find_file() {
  hops=0
  while :; do
    walk
    look_up
    case $mode in '' | 040000) ;; *) return ;; esac
    first=${name%%/*}
    [ "$first" != "$name" ] && [ -L "$here/$first" ] || return
    target=$(cd "$here/$first" 2>/dev/null && pwd -P && echo .) || return
    target=${target%??}
    case $target/ in "$root"/*) ;; *) outcome outside ;; esac
    given=${target#"$root"}/${name#*/} given=${given#/}
    hops=$((hops + 1))
    [ "$hops" -le 40 ] || return
  done
}

# Sets $kind to the current kind of $name.
see() {
  kind=none
  case $name in */*) return ;; esac
  file=$here/$name
  if [ -L "$file" ]; then kind=link
  elif [ -d "$file" ]; then kind=folder
  elif [ -f "$file" ]; then kind=file
  elif [ -e "$file" ]; then kind=special
  fi
}

given=$rest
find_file
see
if [ "$kind" = none ] && [ -z "$mode" ] && [ -n "$other" ]; then
  given=$other
  find_file
  see
fi

if [ -z "$top" ]; then
  case $kind in
  none) outcome nothing ;;
  folder) outcome folder ;;
  *) outcome none ;;
  esac
fi

case $mode in
'' | 040000) before=none ;;
120000) before=link ;;
160000) before=module ;;
*) before=file ;;
esac

# The first index entry of the path: tag, mode, id and path, with newlines of the path replaced. A folder has an entry for each of its
# files.
staged=$(g ls-files -s -v -z -- "$path" 2>/dev/null | tr '\000\n' '\n\001' | head -n 1)
case $staged in
*"	$(printf %s "$path" | tr '\n' '\001')") ;;
*) staged= ;;
esac
from=tree
if [ "$kind" = none ]; then
  # A sparse checkout omits files that are not deleted.
  case $staged in
  [Ss]' 120000 '*) kind=link from=index ;;
  [Ss]' 160000 '*) kind=module from=index ;;
  [Ss]' '*) kind=file from=index ;;
  esac
elif [ "$kind" = folder ]; then
  if [ -e "$file/.git" ] && module=$(cd "$file" 2>/dev/null && find_repository && [ -z "$prefix" ] && commit_of HEAD); then
    kind=module
  else
    case $staged in
    # A submodule that is not checked out.
    ?' 160000 '*) kind=module from=index ;;
    *) if [ "$before" != none ]; then kind=none; else outcome folder; fi ;;
    esac
  fi
fi
case $kind in special) outcome special ;; esac
if [ "$kind" = none ] && [ "$before" = none ]; then
  if [ "$mode" = 040000 ]; then outcome folder; else outcome nothing; fi
fi
indexed=${staged#? * } indexed=${indexed%%[!0-9a-f]*}

# Checks whether a git object is within $limit; sets $size to its size.
is_small() {
  size=$(g cat-file -s "$1" 2>"$errors") || outcome failed "$(head -c 2000 "$errors")"
  [ "$size" -le "$limit" ]
}

# Writes a blob as a checkout would: line endings and encodings of the attributes are applied, filter programs are not run.
checked_out() {
  case $(g check-attr filter -- "$path" 2>/dev/null) in
  *': filter: unspecified' | *': filter: unset' | *': filter: set')
    g cat-file --filters --path="$path" "$1" >"$2" 2>/dev/null && return
    ;;
  esac
  g cat-file blob "$1" >"$2" 2>"$errors"
}

old=$temporary/old new=$temporary/new
: >"$old"
: >"$new"
large=
case $before in
link | file)
  if ! is_small "$id"; then large=yes
  elif [ "$before" = link ]; then g cat-file blob "$id" >"$old" 2>"$errors"
  else checked_out "$id" "$old"
  fi || outcome failed "$(head -c 2000 "$errors")"
  ;;
module)
  size=0
  printf 'Subproject commit %s\n' "$id" >"$old"
  ;;
none) size=0 ;;
esac
size_before=$size size=0
case $kind-$from in
file-index | link-index)
  if ! is_small "$indexed"; then large=yes
  elif [ "$kind" = link ]; then g cat-file blob "$indexed" >"$new" 2>"$errors"
  else checked_out "$indexed" "$new"
  fi || outcome failed "$(head -c 2000 "$errors")"
  ;;
module-index) printf 'Subproject commit %s\n' "$indexed" >"$new" ;;
module-tree) printf 'Subproject commit %s\n' "${module:-(none yet)}" >"$new" ;;
link-tree)
  readlink "$file" >"$new" 2>"$errors" || outcome failed "$(head -c 2000 "$errors")"
  # `readlink` adds the newline.
  size=$(($(wc -c <"$new") - 1))
  head -c "$size" "$new" >"$temporary/cut" && mv "$temporary/cut" "$new"
  ;;
file-tree)
  [ -r "$file" ] || outcome unreadable
  size=$(($(wc -c <"$file")))
  if [ "$size" -gt "$limit" ]; then large=yes; else head -c "$limit" "$file" >"$new" 2>"$errors" || outcome unreadable; fi
  ;;
esac
[ -z "$large" ] || outcome large "$size_before $size"
# Git reports no difference if only line endings or a filter differ, so both sides are shown equal.
if [ "$before-$kind-$from" = file-file-tree ] && ! cmp -s "$old" "$new" && compare --quiet --no-ext-diff "$base" -- "$path"; then
  cat "$new" >"$old"
fi
size_before=$(($(wc -c <"$old"))) size=$(($(wc -c <"$new")))
[ $((size_before + size)) -le "$limit" ] || outcome large "$size_before $size"
{
  printf 'diff\000%s\000%s\000%s\000%s\000' "$before" "$size_before" "$kind" "$size"
  cat "$old" "$new"
} >"$result"
deliver
