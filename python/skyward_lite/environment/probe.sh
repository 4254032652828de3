#!/bin/sh
# Report what the host has, whether the environment GIVEN_ENV is there, and where it could be made.
. ./start.sh
. ./places.sh
env=$GIVEN_ENV-$(uname -m) minor=$GIVEN_PYTHON
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
  version=$("$found" -E -s -c 'import sys; print("%d.%d" % sys.version_info[:2])' </dev/null 2>/dev/null) || continue
  echo "found=$found $version"
  if [ "$version" = "$minor" ]; then
    echo "python=$found"
    "$found" -I -c 'import venv, ensurepip' </dev/null 2>/dev/null && echo venv=yes
    break
  fi
done
for name in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
  found=$(command -v "$name" 2>/dev/null) && { echo "uv=$found"; break; }
done
exit 0
