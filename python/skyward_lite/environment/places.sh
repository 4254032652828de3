# shellcheck shell=sh
# Makes the directories that may have environments the positional parameters: the user's own first, then one in each
# directory of GIVEN_FALLBACKS. Defines `look`.
. ./unsafe.sh

# A relative path in XDG_CACHE_HOME is to be ignored, says its specification.
case ${XDG_CACHE_HOME:-} in /*) own=$XDG_CACHE_HOME ;; *) own=${HOME:-/dev/null}/.cache ;; esac
own=$own/skyward_lite
set -- "$own"
for directory in $GIVEN_FALLBACKS; do set -- "$@" "$directory/skyward_lite-$(id -u)"; done

# Set `real` to the real path of the directory $1, and `bad` to the reason why it cannot have environments, if any.
# shellcheck disable=SC2034 # read by the scripts that include this file
look() {
  real=$(cd -P "$1" 2>/dev/null && pwd -P)
  # In a directory that everybody may write to, another user may have taken the name, for a link to any directory.
  if [ "$1" != "$own" ] && [ "$real" != "$(cd -P "${1%/*}" && pwd -P)/${1##*/}" ]; then
    bad="it is a symbolic link"
  else
    bad=$(unsafe "$real")
  fi
}
