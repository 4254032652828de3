# shellcheck shell=sh
# Defines functions that the steps of build.sh call where pip and git need credentials; see installer.py.

# Append the user's own netrc file to the one of this build, if Python can read it: one bad line would hide the rest.
# shellcheck disable=SC2154 # build.sh sets `tmp`
append_user_netrc() {
  theirs=${NETRC:-${HOME:-/dev/null}/.netrc}
  if "$tmp/bin/python" -I -c 'import netrc, sys; netrc.netrc(sys.argv[1])' "$theirs" </dev/null 2>/dev/null; then
    { cat "$theirs" && echo; } >>"$tmp/private/netrc"
  fi
}

# Set the option $1 of git to $2, for git 2.31 and later.
set_git_option() {
  export "GIT_CONFIG_KEY_${GIT_CONFIG_COUNT:-0}=$1" "GIT_CONFIG_VALUE_${GIT_CONFIG_COUNT:-0}=$2"
  export GIT_CONFIG_COUNT=$((${GIT_CONFIG_COUNT:-0} + 1))
}
