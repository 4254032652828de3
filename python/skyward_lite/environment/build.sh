#!/bin/sh
# Make the environment GIVEN_ENV in the directory GIVEN_ROOT, once: in a temporary directory, under a lock, renamed when
# it is complete. The function `steps`, which build.py writes before this text, makes it in the directory `tmp`.
. ./start.sh
. ./unsafe.sh
. ./sweep.sh
. ./installer.sh
root=$GIVEN_ROOT env=$GIVEN_ENV
umask 077
echo '== skyward_lite =='
bad=$(unsafe "$root")
if [ -n "$bad" ]; then echo "$root is not safe from other users: $bad" >&2; exit 77; fi
lock=$root/$env.lock tmp=$root/$env.tmp.$$ waited=0 vanished=0
me="$host $boot $$"
# When nobody reads the output any more, the client is gone: the script ends, with every process that it has started. So
# it does when the shell has been killed that started it: another client takes the lock for one of a dead process then.
trap '' PIPE
( while sleep 2 >/dev/null; do if kill -0 $$; then echo || kill 0; else kill 0; fi; done ) 2>/dev/null &
watcher=$!
trap 'kill "$watcher" 2>/dev/null' EXIT
trap 'exit 1' HUP INT TERM
# A symbolic link is made together with its content: there is no lock without a holder.
until ln -s "$me" "$lock" 2>/dev/null; do
  holder=$(readlink "$lock")
  # Nobody holds the lock, and still it could not be made. Either another client removed it just then, and may take it
  # again; or it cannot be made at all, and then `ln` prints why.
  if [ -z "$holder" ] && [ "$waited" -gt 2 ]; then
    ln -s "$me" "$lock" && break
    [ -L "$lock" ] || [ "$((vanished += 1))" -lt 3 ] || exit 73
  fi
  # Of the clients that find the lock of a dead holder one removes it, and only if it still is that lock: another client
  # may have removed it and taken a new one.
  if dead "$holder" && mkdir "$lock.breaking" 2>/dev/null; then
    [ "$(readlink "$lock")" = "$holder" ] && rm -f "$lock"
    rmdir "$lock.breaking"
    continue
  fi
  waited=$((waited + 1))
  if [ "$waited" -gt "$GIVEN_LOCK_WAIT" ]; then
    echo "another client ($holder) has been building $root/$env for $GIVEN_LOCK_WAIT s;" \
      "if it is gone, remove $lock" >&2
    exit 75
  fi
  sleep 1
done
trap 'rm -rf "$lock" "$tmp" "$tmp.status"; kill "$watcher" 2>/dev/null' EXIT
whole "$root/$env" && exit 0
rm -rf "${root:?}/$env" "$root/$env".tmp.*
# shellcheck disable=SC2329  # the function `steps` calls it
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}
# Run a command; if it fails, report it and end.
step() {
  "$@" </dev/null && return 0
  status=$?
  echo "failed=$status $*"
  exit "$status"
}
# As `step`, for a command that takes long. Lines `progress=...` report what pip begins; uv prints this to standard error,
# which stays as it is.
# shellcheck disable=SC2329  # the function `steps` calls it
watched() {
  { { "$@" </dev/null 2>&4; echo "$?" >"$tmp.status"; } | while read -r line; do
    case $line in
      Collecting\ * | Downloading\ * | Using\ cached\ * | Building\ * | Installing\ * | Successfully\ installed\ *)
        printf 'progress=%s\n' "$line" ;;
    esac
  done; } 4>&2
  status=1
  read -r status <"$tmp.status" && rm -f "$tmp.status"
  [ "$status" = 0 ] && return 0
  echo "failed=$status $*"
  exit "$status"
}
# Set what our own copy of uv is told: to store Pythons in our directory, and to trust whom this host trusts.
# shellcheck disable=SC2329  # the function `steps` calls it
own_uv() {
  export UV_PYTHON_INSTALL_DIR="${UV_PYTHON_INSTALL_DIR:-$root/pythons}"
  if [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/pki/tls/certs/ca-bundle.crt ]; then
    export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}" UV_NATIVE_TLS="${UV_NATIVE_TLS:-1}"
  fi
}
steps
echo "$me" >"$tmp/ready" || exit 1
step mv "$tmp" "$root/$env"
trap 'kill "$watcher" 2>/dev/null' EXIT
rm -f "$lock"
sweep "$root" "$GIVEN_UNUSED" ""
exit 0
