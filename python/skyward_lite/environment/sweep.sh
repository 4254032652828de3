# shellcheck shell=sh
# Defines `dead` and `sweep`.
host=$(uname -n) boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo boot)

# Whether the process that holds a lock has ended. $1 names it: host, boot and process id. For a process of another host
# that is unknown, and it counts as alive.
dead() {
  case $1 in
    "$host $boot "*) ! kill -0 "${1##* }" 2>/dev/null ;;
    "$host "*) true ;; # the host has been started anew since
    *) false ;;
  esac
}

# Remove the environment or file $1, unless the time of its mark $1$2 is no longer $3: then something uses it again.
# Return 1 if it cannot be removed, 2 if it is used.
discard() {
  gone=${1%/*}/.gone.$$.${1##*/}
  mv "$1" "$gone" || return 1
  if [ "$(stat -c %Y "$gone$2")" != "$3" ]; then mv "$gone" "$1"; return 2; fi
  rm -rf "$gone"
}

# Whether an environment in the directory $1 is of the Python in the directory $2.
has_environment() {
  for used in "$1"/env-*/bin/python; do
    case $(readlink -f "$used") in "$2"/*) return 0 ;; esac
  done
  return 1
}

# Remove from the directory $1 whatever nothing has used for $2 seconds, and print a line for everything that is there:
# kept, gone or stuck, size in KiB, seconds since the last use, path. With $3=list nothing is removed; with $3="" sizes
# are 0, because measuring them takes long.
#
# A Python that uv has downloaded is kept as long as there is an environment of it.
#
# The mark of an environment's last use is the time of its file `ready`, which every start touches and a running agent,
# too, every few minutes. The mark of a file that was sent is the time of its directory.
sweep() {
  # By the clock that sets the times of files, which is a file server's where hosts share the directory.
  new=$1/.try.now.$$ building=""
  now=$(touch "$new" 2>/dev/null && stat -c %Y "$new") || now=$(date +%s)
  rm -f "$new"
  for path in "$1"/env-*.lock; do
    { [ -L "$path" ] && ! dead "$(readlink "$path")"; } || continue
    # A host that has held a lock for longer than any build takes is gone.
    last=$(stat -c %Y "$path" 2>/dev/null) || continue
    if [ "$((now - last))" -lt "$GIVEN_LOCKED" ]; then building="$building ${path##*/} "; fi
  done
  for path in "$1"/env-* "$1"/sent-* "$1"/pythons/cpython-* "$1"/.gone.* "$1"/.try.*; do
    name=${path##*/} limit=$2 mark=""
    case $name in
      *.lock | *.lock.breaking) continue ;;
      env-*)
        case $building in *" ${name%%.tmp.*}.lock "*) limit="" ;; esac
        # An environment that was never complete is of no use to anybody.
        if [ -f "$path/ready" ]; then mark=/ready; elif [ -n "$limit" ]; then limit=$GIVEN_RECENT; fi ;;
      sent-*) if [ -n "$building" ]; then limit=""; fi ;;
      cpython-*)
        # The name without the release is a link to the newest release.
        [ ! -L "$path" ] || continue
        if [ -n "$building" ] || has_environment "$1" "$path"; then limit=""; fi ;;
      *) limit=$GIVEN_RECENT ;;
    esac
    last=$(stat -c %Y "$path$mark" 2>/dev/null) || continue
    age=$((now - last)) kind=kept size=0
    if [ -n "$3" ]; then size=$(du -sk "$path" 2>/dev/null); size=${size%%[!0-9]*}; fi
    if [ -n "$limit" ] && [ "$age" -ge "$limit" ]; then
      kind=gone
      if [ "$3" != list ]; then
        discard "$path" "$mark" "$last" 2>/dev/null
        case $? in 0) ;; 2) kind=kept ;; *) kind=stuck ;; esac
      fi
    fi
    printf '%s=%s %s %s\n' "$kind" "$size" "$age" "$path"
  done
}
