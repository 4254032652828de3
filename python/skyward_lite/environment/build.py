"""How a bare host gets the environment of an image: three shell scripts, and what they are sent.

`probe` finds out what the host has and whether the environment is there; `build` makes it, once: in a temporary place,
under a lock, renamed when it is whole. The scripts are plain POSIX sh, whatever the login shell, and read from standard
input. They print lines of `key=value` after a first line that no login shell prints.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import platform
import re
import shlex
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from .. import _core, credentials
from .._version import PYTHON, __version__
from ..errors import NodeStartError
from ..image import Image
from . import installer

MARK = "== skyward_lite =="
"""Begins what our scripts say. What a login shell printed before is skipped."""

COMMAND = "exec sh -s"
"""What any login shell understands, dash, bash, zsh, fish and tcsh alike."""

WHOLE = r"""
# An environment's Python may have gone since, as with an update of the system.
whole() { [ -f "$1/ready" ] && [ -x "$1/bin/python" ]; }
"""

UNSAFE = r"""
unsafe() {
  [ "$(cd -P "$1" 2>/dev/null && pwd -P)" = "$1" ] || { echo "$1 is not the real path of a directory"; return; };
  path=$1 directory=$1 me=$(id -u);
  set --;
  while [ -n "$path" ]; do set -- "$path" "$@"; path=${path%/*}; done;
  { LC_ALL=C ls -ldn / "$@"; LC_ALL=C ls -lnA "$directory"; } 2>/dev/null | {
    name=/ system= other=;
    while read -r mode _ owner group _; do
      [ "$mode" != total ] || { [ -z "$name" ] && continue || break; };
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
      case $mode in ?????????[tT]*) [ $# -eq 0 ] || other=;; esac;
      [ -z "$other" ] || break;
      name=;
      [ $# -eq 0 ] || { name=$1; shift; };
    done;
    [ -z "$name$other" ] || echo "${name:-something in $directory} ${other:-cannot be looked at}";
  };
};
"""
"""Defines `unsafe`: print why another user could change what is in a directory; nothing if none can.

The directory must be this user's. What is above it must belong to this user or to the system (root, or the owner of
"/"), and only these may write there: but in a directory with the sticky bit, as /tmp, nobody can rename another user's.
What is in it must belong to these, too: while others could write there, they may have left an environment of theirs.
A group that has its user's name is taken for the user's own. Of a name with line ends nothing is known, and it is
unsafe. The text becomes part of one word of any login shell: it has no quote, no backslash and no exclamation mark.
"""

DEAD = r"""
host=$(uname -n) boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo boot)
# Whether the holder of a lock has ended; of another host's nothing is known.
dead() {
  case $1 in
    "$host $boot "*) ! kill -0 "${1##* }" 2>/dev/null ;;
    "$host "*) true ;;  # it has been started anew
    *) false ;;
  esac
}
"""

PLAIN = """
# Not in the home directory: Python and uv take files of where they run for theirs.
cd / || exit
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONINSPECT PYTHONPLATLIBDIR PYTHONUSERBASE
"""
"""At the head of scripts that run Python: nothing in the home directory or in a shell's configuration changes it."""

UNSAFE_TEXT = "is not safe from other users"
"""What is said of a directory for which `unsafe` has a reason."""

FALLBACKS = ("/var/tmp", "/tmp")
"""Directories in which an environment is made if the user's cache directory cannot have it."""

LOOK = r"""
# A relative path is none, says the specification of XDG_CACHE_HOME.
case ${XDG_CACHE_HOME:-} in /*) own=$XDG_CACHE_HOME ;; *) own=${HOME:-/dev/null}/.cache ;; esac
# Sets `real`, the real path of a directory for environments, and `bad`, why it cannot be one.
look() {
  real=$(cd -P "$1" 2>/dev/null && pwd -P)
  # Where everybody may write, somebody else may have taken the name, with a link to any directory.
  if [ "$1" != "$own/skyward_lite" ] && [ "$real" != "$(cd -P "${1%/*}" && pwd -P)/${1##*/}" ]; then
    bad="it is a symbolic link"
  else
    bad=$(unsafe "$real")
  fi
}
"""
"""Defines `look`."""

PROBE = (
    WHOLE
    + UNSAFE
    + LOOK
    + PLAIN
    + r"""
env=@ENV@ minor=@PYTHON@
umask 077
root= why=
for base in "$own/skyward_lite" @FALLBACKS@; do
  if ! mkdir -p "$base" 2>/dev/null; then why="$why $base cannot be made;"; continue; fi
  look "$base"
  if [ -n "$bad" ]; then why="$why $base @UNSAFE@: $bad;"; continue; fi
  base=$real
  if whole "$base/$env"; then
    touch "$base/$env/ready" 2>/dev/null  # the mark of its last use
    root=$base; break
  fi
  try=$base/.try.$(uname -n).$$
  if ! { printf '#!/bin/sh\nexit 0\n' >"$try" && chmod 700 "$try"; } 2>/dev/null; then
    rm -f "$try"; why="$why $base cannot be written to;"; continue
  fi
  if "$try" 2>/dev/null; then rm -f "$try"; root=$base; break; fi
  rm -f "$try"; why="$why $base allows no programs (noexec);"
done
echo '@MARK@'
echo "system=$(uname -s)"
echo "machine=$(uname -m)"
printf 'root=%s\n' "$root"
printf 'why=%s\n' "$why"
if [ -n "$root" ] && whole "$root/$env"; then echo ready=yes; exit 0; fi
echo "libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo unknown)"
echo "free=$(df -Pk "${root:-/}" 2>/dev/null | awk 'NR == 2 { print $4 }')"
for name in python$minor python3 python /usr/local/bin/python$minor /opt/python/bin/python$minor; do
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
"""
)

SWEEP = r"""
discard() {
  gone=${1%/*}/.gone.$$.${1##*/}
  mv "$1" "$gone" || return 1
  # Its mark has changed since it was looked at: something uses it.
  if [ "$(stat -c %Y "$gone$2")" != "$3" ]; then mv "$gone" "$1"; return 2; fi
  rm -rf "$gone"
}
# Removes what nothing has used for $2 s from the directory $1, and prints what became of all that is there.
# With $3=list it removes nothing; with no $3 it does not take the time to find out sizes.
sweep() {
  # By the clock that sets the times of files, which is a file server's where hosts share the directory.
  new=$1/.try.now.$$ building=
  now=$(touch "$new" 2>/dev/null && stat -c %Y "$new") || now=$(date +%s)
  rm -f "$new"
  for path in "$1"/env-*.lock; do
    [ -L "$path" ] && ! dead "$(readlink "$path")" || continue
    # A host that holds a lock for longer than any build takes is gone.
    last=$(stat -c %Y "$path" 2>/dev/null) && [ "$((now - last))" -lt @LOCKED@ ] && building="$building ${path##*/} "
  done
  for path in "$1"/env-* "$1"/sent-* "$1"/.gone.* "$1"/.try.*; do
    name=${path##*/} limit=$2 mark=
    case $name in
      *.lock | *.lock.breaking) continue ;;
      env-*)
        case $building in *" ${name%%.tmp.*}.lock "*) limit= ;; esac
        # What was never complete is of no use to anybody.
        if [ -f "$path/ready" ]; then mark=/ready; elif [ -n "$limit" ]; then limit=@RECENT@; fi ;;
      sent-*) if [ -n "$building" ]; then limit=; fi ;;
      *) limit=@RECENT@ ;;
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
"""
"""Defines `sweep`. The mark of an environment's last use is the time of its file `ready`, which every start touches and
a running agent, too, every few minutes. That of a file that was sent is the time of its directory."""

CLEAN = (
    UNSAFE
    + LOOK
    + DEAD
    + SWEEP
    + r"""
echo '@MARK@'
for base in "$own/skyward_lite" @FALLBACKS@; do
  [ -d "$base" ] || continue
  look "$base"
  if [ -n "$bad" ]; then printf 'unsafe=%s @UNSAFE@: %s\n' "$base" "$bad"; continue; fi
  sweep "$real" @SECONDS@ @WHAT@
done
exit 0
"""
)

BUILD = (
    WHOLE
    + UNSAFE
    + DEAD
    + SWEEP
    + PLAIN
    + r"""
root=@ROOT@ env=@ENV@ minor=@PYTHON@
umask 077
echo '@MARK@'
bad=$(unsafe "$root")
if [ -n "$bad" ]; then echo "$root @UNSAFE@: $bad" >&2; exit 77; fi
lock=$root/$env.lock tmp=$root/$env.tmp.$$ waited=0
nobody=0
me="$host $boot $$"
# When nobody reads any more what this says, whoever asked for it is gone: it ends, with what it has started.
trap '' PIPE
( while sleep 2 >/dev/null && kill -0 $$; do echo || kill 0; done ) 2>/dev/null &
watcher=$!
trap 'kill "$watcher" 2>/dev/null' EXIT
trap 'exit 1' HUP INT TERM
# A symbolic link is made with its content at once: there is no lock without a holder.
until ln -s "$me" "$lock" 2>/dev/null; do
  holder=$(readlink "$lock")
  # Nobody has it, and still it cannot be made: why not, says `ln`. Or it was let go of just then, and taken again.
  if [ -z "$holder" ] && [ "$waited" -gt 2 ]; then
    ln -s "$me" "$lock" && break
    [ -L "$lock" ] || [ "$((nobody += 1))" -lt 3 ] || exit 73
  fi
  # Of those who find a dead holder's lock one removes it, and looks again first: another may have taken it anew.
  if dead "$holder" && mkdir "$lock.breaking" 2>/dev/null; then
    [ "$(readlink "$lock")" = "$holder" ] && rm -f "$lock"
    rmdir "$lock.breaking"
    continue
  fi
  waited=$((waited + 1))
  if [ "$waited" -gt @PATIENCE@ ]; then
    echo "another client ($holder) has been building $root/$env for @PATIENCE@ s; if it is gone, remove $lock" >&2
    exit 75
  fi
  sleep 1
done
trap 'rm -rf "$lock" "$tmp"; kill "$watcher" 2>/dev/null' EXIT
whole "$root/$env" && exit 0
rm -rf "$root/$env" "$root/$env".tmp.*
step() {
  "$@" </dev/null && return 0
  status=$?
  echo "failed=$status $*"
  exit "$status"
}
@STEPS@
echo "$me" >"$tmp/ready" || exit 1
step mv "$tmp" "$root/$env"
trap 'kill "$watcher" 2>/dev/null' EXIT
rm -f "$lock"
sweep "$root" @UNUSED@ ""
exit 0
"""
)

PATIENCE = 1800
"""Seconds for which another client's build of the same environment is waited for."""
BUILD_SECONDS = 3600.0
"""Bound on building an environment."""
PROBE_SECONDS = 30.0
UNUSED_SECONDS = 30 * 24 * 3600
"""Environments and files that were not used for longer are removed from a host by the next build there."""
LOCKED_SECONDS = 24 * 3600
"""Age from which on a lock no longer protects what a build uses: no client lets a build run for so long."""
RECENT_SECONDS = 3600
"""What was used within this time counts as in use: a running agent marks its environment more often."""
CLEAN_SECONDS = 300.0
NEEDED = 200
"""Megabytes without which a build is not begun."""
PATHS = ("root", "machine", "python", "uv")
"""What a host says that goes into the commands it is sent."""
MOST_VALUES = 1000
"""Values of one key that are read; a host may print one without an end."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the probe found."""

    root: str
    ready: bool
    system: str
    machine: str
    libc: tuple[int, ...]
    """Of glibc; empty for another library."""
    python: str | None
    """An interpreter of the client's minor version."""
    venv: bool
    """Whether that one can make environments."""
    uv: str | None
    free: int | None
    """Megabytes."""
    others: tuple[str, ...]
    """Interpreters of other versions."""
    why: str
    """Why a directory was not taken."""


def name(image: Image) -> str:
    """Name the environment by everything that it is made of, but for the host's platform."""
    # Without credentials: the name can be read by others, and a new token makes no other environment.
    pip, index = sorted(map(credentials.bare, image.pip)), image.index_url and credentials.bare(image.index_url)
    parts: list[object] = [PYTHON, __version__, pip, sorted(image.apt), index]
    parts.append(_package_digest() if image.wheel is None else _digest(Path(image.wheel).read_bytes()))
    parts += [_digest(_tree(path)) for path in image.includes]
    if image.wheelhouse is not None:
        wheels = sorted(path for path in Path(image.wheelhouse).rglob("*") if path.is_file())
        parts.append([(path.name, _digest(path.read_bytes())) for path in wheels])
    return f"env-{_digest(json.dumps(parts).encode())[:20]}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def probe(env: str) -> bytes:
    """Give the script that finds out what a host has."""
    return _fill(PROBE, ENV=f'"{env}-$(uname -m)"', PYTHON=PYTHON).encode()


def clean(seconds: int, *, dry_run: bool) -> bytes:
    """Return the script that removes what nothing has used for so long, or only lists it."""
    return _fill(CLEAN, SECONDS=str(seconds), WHAT="list" if dry_run else "both").encode()


def _fill(script: str, **values: str) -> str:
    fallbacks = " ".join(f'"{directory}/skyward_lite-$(id -u)"' for directory in FALLBACKS)
    ours = {"MARK": MARK, "UNSAFE": UNSAFE_TEXT, "FALLBACKS": fallbacks, "RECENT": str(RECENT_SECONDS)}
    ours |= {"LOCKED": str(LOCKED_SECONDS)}
    values = {**ours, **values}
    # At once, so that nothing is replaced in what is filled in: a password may look like a place to fill.
    return re.sub("@([A-Z]+)@", lambda place: values.get(place[1], place[0]), script)


def said(stdout: bytes) -> dict[str, list[str]] | None:
    """Read what a script of ours printed, as it may be shown; None if it did not come to its first line.

    A line without an end was cut off, and is left out. Raises `NodeStartError` for a path that cannot be shown as it
    is: what is run there must be what was shown.
    """
    _, mark, text = stdout.partition(f"{MARK}\n".encode())
    if not mark:
        return None
    found: dict[str, list[str]] = {}
    for line in text.split(b"\n")[:-1]:
        name, _, raw = line.partition(b"=")
        key, value = _core.printable(name, lines=False), _core.printable(raw, lines=False)
        if key in PATHS and value.encode() != raw:
            raise NodeStartError(
                f"the {key} that it names cannot be used: it is too long, or has unprintable bytes: {value}"
            )
        values = found.setdefault(key, [])
        if len(values) < MOST_VALUES:
            values.append(value)
    return found


def number(text: str) -> int | None:
    """Read a number that a host names; None for anything else, and for what no host has."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def facts(said: dict[str, list[str]]) -> Facts:
    """Read the probe's lines."""

    def one(key: str) -> str:
        return said.get(key, [""])[0].strip()

    libc = re.fullmatch(r"glibc ([0-9]{1,4}(?:\.[0-9]{1,4}){0,3})", one("libc"))
    free = number(one("free"))
    return Facts(
        root=one("root"),
        ready=one("ready") == "yes",
        system=one("system"),
        machine=one("machine"),
        libc=tuple(int(part) for part in libc[1].split(".")) if libc else (),
        python=one("python") or None,
        venv=one("venv") == "yes",
        uv=one("uv") or None,
        free=None if free is None else free // 1024,
        others=tuple(said.get("found", [])),
        why=one("why"),
    )


def interpreter(facts: Facts, env: str) -> str:
    """Name the environment's interpreter on the host. Raises `NodeStartError` for what is no path."""
    _check(facts)
    return f"{facts.root}/{env}-{facts.machine}/bin/python"


def remedy(facts: Facts) -> str:
    """Return what to do about directories that were not taken."""
    unsafe = UNSAFE_TEXT in facts.why
    alone = "make one this user's alone (chmod go-w, and remove what others left in it), " if unsafe else ""
    return f"{alone}free some space, or set XDG_CACHE_HOME for sessions there"


def check_room(facts: Facts) -> None:
    """Raise `NodeStartError` if the host has no place for an environment."""
    if not facts.root:
        raise NodeStartError(f"there is no directory for the environment:{facts.why} {remedy(facts)}")
    _check(facts)
    if facts.free is not None and facts.free < NEEDED:
        raise NodeStartError(f"{facts.root} has {facts.free} MB left, and {NEEDED} MB are needed")


def _check(facts: Facts) -> None:
    """Raise `NodeStartError` if what the host says of itself cannot be part of a path."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}", facts.machine):
        raise NodeStartError(f"`uname -m` printed {facts.machine[:100]!r}, which names no architecture")
    paths = [path for path in (facts.root, facts.python, facts.uv) if path]
    for path in paths:
        if not path.startswith("/") or not path.isprintable() or len(path) > 4096:
            raise NodeStartError(f"it named {path[:200]!r} where the path of a file was expected")


def agent(python: str, arguments: str) -> str:
    """Return the command that starts the agent with an environment's interpreter, for any login shell.

    That nobody else can change the environment is checked once more: time may have passed since it was found. What
    follows " -- " is what is shown of the command.
    """
    unset = " ".join(line for line in PLAIN.splitlines() if line.startswith("unset "))
    check = [
        *UNSAFE.strip().splitlines(),
        'bad=$(unsafe "${1%/*/*/*}");',
        'if [ "$bad" ]; then echo "$1 @UNSAFE@: $bad" >&2; exit 77; fi;',
        f'{unset}; exec "$@"',
    ]
    script = _fill(" ".join(line.strip() for line in check))
    return f"exec sh -c {shlex.quote(script)} -- {shlex.quote(python)} -P -m skyward_lite.node.agent {arguments}"


def build(facts: Facts, image: Image, env: str, uploads: dict[str, str]) -> bytes:
    """Give the script that makes the environment. `uploads` says where on the host the files are that were sent."""
    check_room(facts)
    steps = []
    if image.apt:
        sudo = '$([ "$(id -u)" = 0 ] || echo sudo -n)'
        apt = "apt-get -o DPkg::Lock::Timeout=300"  # a machine that has just booted may be updating itself
        steps.append(f"step {sudo} {apt} update -qq")
        steps.append(f"step {sudo} env DEBIAN_FRONTEND=noninteractive {apt} install -y -qq -- {_words(image.apt)}")
    uv = facts.uv is not None and not facts.venv
    if facts.venv and facts.python:
        steps.append(f'step {shlex.quote(facts.python)} -I -m venv "$tmp"')
    elif facts.uv:
        steps.append(f'step {shlex.quote(facts.uv)} venv --quiet --python {shlex.quote(facts.python or PYTHON)} "$tmp"')
    elif facts.python:
        raise NodeStartError(f"{facts.python} cannot make environments: install python{PYTHON}-venv there, or uv")
    else:
        seen = f" (it has {', '.join(facts.others)})" if facts.others else ""
        raise NodeStartError(
            f"it has no Python {PYTHON}, which is the client's{seen}, and no uv to provide one: install either"
        )
    pip = (
        f'{shlex.quote(facts.uv)} pip install --quiet --python "$tmp/bin/python"'
        if uv and facts.uv
        else ('"$tmp/bin/python" -I -m pip install --quiet --no-input --disable-pip-version-check')
    )
    lines, pip = installer.lines(image, pip, uv=uv)
    steps += lines
    if "wheelhouse" in uploads and image.wheelhouse is not None:
        steps.append(f'step "$tmp/bin/python" -I -m zipfile -e {shlex.quote(uploads["wheelhouse"])} "$tmp/wheels"')
        pip += f' --no-index --find-links "$tmp/wheels"/{shlex.quote(Path(image.wheelhouse).name)}'
    if "wheel" in uploads:
        steps.append(f"step {pip} {shlex.quote(uploads['wheel'])}")
    elif "bundle" in uploads:
        site = 'site=$("$tmp/bin/python" -I -c "import sysconfig; print(sysconfig.get_path(\'purelib\'))") || exit 1'
        steps.append(site)
        steps.append(f'step "$tmp/bin/python" -I -m zipfile -e {shlex.quote(uploads["bundle"])} "$site"')
    else:
        steps.append(f"step {pip} skyward_lite=={__version__}")
    if image.pip:
        steps.append(f"step {pip} -r {installer.PRIVATE}/requirements")
    if "includes" in uploads:
        steps.append(
            'site=$("$tmp/bin/python" -I -c "import sysconfig; print(sysconfig.get_path(\'purelib\'))") || exit 1'
        )
        steps.append(f'step "$tmp/bin/python" -I -m zipfile -e {shlex.quote(uploads["includes"])} "$site"')
    steps.append('step "$tmp/bin/python" -I -c "import skyward_lite._core, cloudpickle"')
    steps.append(f'step rm -rf "$tmp/wheels" {installer.PRIVATE}')
    return _fill(
        BUILD,
        ROOT=shlex.quote(facts.root),
        ENV=shlex.quote(f"{env}-{facts.machine}"),
        UNUSED=str(UNUSED_SECONDS),
        PYTHON=PYTHON,
        PATIENCE=str(PATIENCE),
        STEPS="\n".join(steps),
    ).encode()


VERIFY = r"""
echo '@MARK@'
exec @PYTHON@ - <<'PYTHON_ENDS_HERE'
import sys
if "%d.%d" % sys.version_info[:2] != "@MINOR@":
    print("problem=it is Python %d.%d, the client's is @MINOR@" % sys.version_info[:2])
    sys.exit()
# As -P, which an older Python does not know.
sys.path[:] = [path for path in sys.path if path]
print("python=" + sys.executable)
try:
    import skyward_lite
except ImportError as error:
    print("problem=skyward_lite is not installed in it (%s): install version @VERSION@" % error)
    sys.exit()
if skyward_lite.__version__ != "@VERSION@":
    print("problem=it has skyward_lite %s, the client @VERSION@" % skyward_lite.__version__)
from skyward_lite.image import Image
for problem in Image(pip=@PIP@).missing():
    print("problem=" + problem)
PYTHON_ENDS_HERE
"""


def verify(python: str, image: Image) -> bytes:
    """Give the script that checks an interpreter which is used as it is."""
    home, slash, rest = python.partition("/")
    quoted = f'"$HOME"/{shlex.quote(rest)}' if home == "~" and slash else shlex.quote(python)
    values = {
        "PYTHON": quoted,
        "MINOR": PYTHON,
        "VERSION": __version__,
        "PIP": repr([*map(credentials.bare, image.pip)]),
    }
    return _fill(VERIFY, **values).encode()


def _words(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


# ---------------------------------------------------------------------------------------------------- what is sent


def files(facts: Facts, image: Image) -> Iterator[tuple[str, str, bytes]]:
    """List what is sent to a host: kind, file name, content."""
    if image.wheel is not None:
        yield "wheel", Path(image.wheel).name, Path(image.wheel).read_bytes()
    elif fits(facts):
        yield "bundle", "bundle.zip", bundle()
    if image.wheelhouse is not None:
        yield "wheelhouse", "wheelhouse.zip", _tree(image.wheelhouse)
    if image.includes:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for include in image.includes:
                _pack(archive, include)
        yield "includes", "includes.zip", packed.getvalue()


def fits(facts: Facts) -> bool:
    """Say whether this client's own package runs on the host: system, architecture, and a glibc that is no older."""
    return (
        sys.platform == "linux"
        and facts.system == "Linux"
        and facts.machine == platform.machine()
        and facts.libc >= _needed_libc()
    )


@functools.cache
def _needed_libc() -> tuple[int, ...]:
    """Give the newest glibc version that our binary names."""
    assert _core.__file__ is not None
    versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", Path(_core.__file__).read_bytes())
    return max(((int(a), int(b)) for a, b in versions), default=())


_packing = threading.Lock()
"""Held while our package is read: the hosts of a pool ask for it at once, and one of them does it for all."""


def _package() -> Iterator[tuple[str, bytes]]:
    """List the files of our package and of cloudpickle, as they are here: path where packages go, content."""
    import cloudpickle

    assert cloudpickle.__file__ is not None
    for root in (Path(__file__).parent.parent, Path(cloudpickle.__file__).parent):
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in (".py", ".so", ".pyi", ".typed"):
                yield f"{root.name}/{path.relative_to(root)}", path.read_bytes()
    for package, version in (("skyward_lite", __version__), ("cloudpickle", metadata.version("cloudpickle"))):
        text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        yield f"{package}-{version}.dist-info/METADATA", text.encode()


def _package_digest() -> str:
    # Of the files: a host that has its environment needs no archive, and packing one takes ten times as long.
    with _packing:
        return _digest_once()


@functools.cache
def _digest_once() -> str:
    return _digest(json.dumps([(path, _digest(data)) for path, data in _package()]).encode())


def bundle() -> bytes:
    """Pack our package and cloudpickle: a zip file to be unpacked where packages go."""
    with _packing:
        return _bundle_once()


@functools.cache
def _bundle_once() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path, data in _package():
            _add(archive, path, data)
    return packed.getvalue()


def _add(archive: zipfile.ZipFile, path: str, data: bytes) -> None:
    # A fixed time: the same files make the same bytes, and the same digest.
    archive.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED, 1)


def _tree(path: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        _pack(archive, path)
    return packed.getvalue()


def _pack(archive: zipfile.ZipFile, path: str) -> None:
    """Add a module or a package of the user's, under its own name."""
    root = Path(path)
    if root.is_file():
        _add(archive, root.name, root.read_bytes())
    for file in sorted(root.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            _add(archive, f"{root.name}/{file.relative_to(root)}", file.read_bytes())
