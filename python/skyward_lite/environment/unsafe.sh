# shellcheck shell=sh
# Defines `unsafe`: print why another user could change the files in the directory $1; nothing if no other user can.
#
# The directory must be this user's. The directories above it must belong to this user or to the system (root, or the
# owner of "/"), and nobody else may write to them, except to a directory with the sticky bit, as /tmp: there no user can
# rename a file of another user. Whatever is in the directory must belong to this user or to the system as well: while
# other users could write to it, they may have left an environment of their own there. A group that has its user's name
# counts as the user's own. A path with a line end in it is unsafe, because the output of ls for it is ambiguous.
#
# This text becomes part of a command (scripts.command): each line ends where a blank may stand, and no line has a single
# quote, a backslash or an exclamation mark.
unsafe() {
  [ "$(cd -P "$1" 2>/dev/null && pwd -P)" = "$1" ] || { echo "$1 is not the real path of a directory"; return; };
  path=$1 directory=$1 me=$(id -u);
  set --;
  while [ -n "$path" ]; do set -- "$path" "$@"; path=${path%/*}; done;
  { LC_ALL=C ls -ldn / "$@"; LC_ALL=C ls -lnA "$directory"; } 2>/dev/null | {
    name=/ system="" other="";
    while read -r mode _ owner group _; do
      [ "$mode" != total ] || if [ -z "$name" ]; then continue; else break; fi;
      [ "$system" ] || system=$owner;
      case " 0 $me $system " in *" $owner "*) ;; *) other="belongs to user $owner"; break;; esac;
      [ "$name" ] || continue;
      [ $# -gt 0 ] || [ "$owner" = "$me" ] || { other="belongs to user $owner"; break; };
      case $mode in
        d???????w*) other="may be written to by everybody";;
        d????w*+) other="may be written to by those in its access list";;
        d????w*) [ "$group" = "$(id -g)" ] && [ "$(id -gn)" = "$(id -un)" ] || other="may be written to by its group";;
        d*) ;;
        *) other="is no directory";;
      esac;
      case $mode in ?????????[tT]*) [ $# -eq 0 ] || other="";; esac;
      [ -z "$other" ] || break;
      name="";
      [ $# -eq 0 ] || { name=$1; shift; };
    done;
    [ -z "$name$other" ] || echo "${name:-something in $directory} ${other:-cannot be looked at}";
  };
};
