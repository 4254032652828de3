#!/bin/sh
# Report what the host has, whether the environment GIVEN_ENV is there, and where it could be made.
. ./start.sh
. ./places.sh
env=$GIVEN_ENV-$(uname -m) minor=$GIVEN_PYTHON release=$GIVEN_RELEASE
umask 077
root="" why=""
for base in "$@"; do
  if ! mkdir -p "$base" 2>/dev/null; then why="$why $base cannot be made;"; continue; fi
  look "$base"
  if [ -n "$bad" ]; then why="$why $base is not safe from other users: $bad;"; continue; fi
  base=$real
  if whole "$base/$env"; then
    touch "$base/$env/ready" 2>/dev/null # the mark of the environment's last use
    root=$base; break
  fi
  try=$base/.try.$(uname -n).$$
  if ! { printf '#!/bin/sh\nexit 0\n' >"$try" && chmod 700 "$try"; } 2>/dev/null; then
    rm -f "$try"; why="$why $base cannot be written to;"; continue
  fi
  if "$try" 2>/dev/null; then rm -f "$try"; root=$base; break; fi
  rm -f "$try"; why="$why $base allows no programs (noexec);"
done
echo '== skyward_lite =='
echo "system=$(uname -s)"
echo "machine=$(uname -m)"
printf 'root=%s\n' "$root"
printf 'why=%s\n' "$why"
if [ -n "$root" ] && whole "$root/$env"; then echo ready=yes; exit 0; fi
echo "libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo unknown)"
echo "free=$(df -Pk "${root:-/}" 2>/dev/null | awk 'NR == 2 { print $4 }')"
for name in "python$minor" python3 python "/usr/local/bin/python$minor" "/opt/python/bin/python$minor"; do
  found=$(command -v "$name" 2>/dev/null) || continue
  # Python 2 knows these options too.
  version=$("$found" -E -s -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' </dev/null 2>/dev/null) || continue
  echo "found=$found $version"
  case $version. in
    "$release" | "$release".*)
      echo "python=$found"
      "$found" -I -c 'import venv, ensurepip' </dev/null 2>/dev/null && echo venv=yes
      break ;;
  esac
done
for name in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
  found=$(command -v "$name" 2>/dev/null) && { echo "uv=$found"; break; }
done
# What the host's owner has told pip. A file that PIP_CONFIG_FILE names takes the place of all others only if it is
# /dev/null.
for name in $GIVEN_SETTINGS; do
  eval "value=\${PIP_$name:-}"
  if [ -n "$value" ]; then echo "pip=PIP_$name"; break; fi
done
if [ "${PIP_CONFIG_FILE:-}" != /dev/null ]; then
  for file in "${PIP_CONFIG_FILE:-}" "$HOME/.pip/pip.conf" "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" \
    "${XDG_CONFIG_DIRS:-/etc/xdg}/pip/pip.conf" /etc/pip.conf; do
    if [ -f "$file" ]; then printf 'pip=%s\n' "$file"; break; fi
  done
fi
exit 0
