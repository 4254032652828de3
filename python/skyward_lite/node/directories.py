"""The directory of an agent that outlives its connections: where it may be, who may have it, how it goes.

It is named by the node's key, belongs to the user alone (0700), and holds

    agent    the Unix socket at which the agent listens
    log      what the agent prints
    pid      the agent's process
    work     a directory that is empty at first, in which the tasks run
    modules  the client's modules, as far as tasks have imported them

The agent has the lock of the directory (flock) for its life: the process that starts it takes the lock, and the agent
inherits it. So no lock means no agent. An agent removes its directory at its end. One that was killed leaves it behind,
and the next connection of the same user to this host removes it.

Only this user and the system may be able to rename or replace the directory: see `_unsafe`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time

PROBLEM = "SKYWARD_LITE_NO_DIRECTORY"
"""The variable that tells an agent why no directory can be used, if none can: it tells its client."""
PREFIX = "skyward-lite-"
SOCKET, LOG, PID = "agent", "log", "pid"
WORK, MODULES = "work", "modules"
MAX_BASE_BYTES = 64
"""Longest `TMPDIR` that is used: a socket's path may have `MAX_SOCKET_BYTES`."""
MAX_SOCKET_BYTES = 107
"""Longest path of a Unix socket, see unix(7)."""
LEFT_SECONDS = 60.0
"""Age from which on a directory without a lock was left behind by an agent that was killed."""

_FILES = (SOCKET, LOG, PID, "stripes")
"""The files that such a directory may have; "stripes" is of earlier versions."""


class UnusableError(Exception):
    """Raised when a directory cannot be an agent's. The argument says which, why, and what to do."""


def bases() -> list[str]:
    """Return the directories that may have an agent's directory, the best first.

    `XDG_RUNTIME_DIR` is none of them: it is removed when its user logs out, and the agent is to outlive this.
    """
    found = []
    temporary = os.environ.get("TMPDIR", "")
    if temporary.startswith("/") and len(os.fsencode(temporary)) <= MAX_BASE_BYTES:
        found.append(temporary.rstrip("/") or "/")
    found.append("/tmp")
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # As its specification says, a relative path is to be ignored. Without HOME this is the home of the user database.
    cache = cache if cache.startswith("/") else os.path.expanduser("~/.cache")
    if cache.startswith("/"):
        found.append(f"{cache}/skyward_lite/run")
    return list(dict.fromkeys(found))


def is_key(word: str) -> bool:
    """Return whether a word may be a node's key: hexadecimal digits."""
    return 8 <= len(word) <= 32 and set(word) <= set("0123456789abcdef")


def at(base: str, key: str) -> str:
    """Return the path of the directory that a node's agent has in `base`."""
    return f"{base}/{PREFIX}{key}"


def prepare(base: str, key: str) -> tuple[str, int]:
    """Make the directory, unless it is there. Return its path and a descriptor of it. Raise `UnusableError`.

    The caller must have set a umask that leaves the user all permissions and others none.
    """
    path = at(base, key)
    if len(os.fsencode(f"{path}/{SOCKET}")) > MAX_SOCKET_BYTES:
        raise UnusableError(f"{base}: its path is too long for a Unix socket: set TMPDIR to a shorter one")
    try:
        if base.endswith("/skyward_lite/run"):
            os.makedirs(base, 0o700, exist_ok=True)
        bad = _unsafe(base)
        if bad:
            raise UnusableError(f"{base}: {bad}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and os.path.lexists(path):
            raise UnusableError(f"{path}: it is no directory: remove it") from error
        raise UnusableError(explain(base, error)) from error
    state = os.fstat(fd)
    if state.st_uid != os.geteuid():
        bad = f"it belongs to user {state.st_uid}: remove it"
    elif stat.S_IMODE(state.st_mode) & 0o077:
        bad = f"other users may enter it (mode {stat.S_IMODE(state.st_mode):04o}): remove it"
    else:
        return path, fd
    os.close(fd)
    raise UnusableError(f"{path}: {bad}")


def make_spare() -> str | None:
    """Make a directory for an agent that has no socket, and lock it; return None if no directory is safe.

    It ends with the process: `remove` removes it, or `sweep` if the process was killed.
    """
    for base in (*bases(), "/var/tmp", "/dev/shm", os.path.expanduser("~")):
        with contextlib.suppress(OSError):
            path = at(base, os.urandom(8).hex())
            if not _unsafe(base):
                os.mkdir(path, 0o700)
                # Open for the life of the process, which so keeps the lock.
                take_lock(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                prepare_work(path)
                return path
    return None


_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there",
    errno.EROFS: "set TMPDIR to a directory that can be written to",
    errno.EACCES: "let this user write to it",
    errno.ENOENT: "make this directory, or set TMPDIR to another one",
}


def explain(base: str, error: OSError) -> str:
    """Return why a directory in `base` cannot be used, and what to do."""
    remedy = _REMEDIES.get(error.errno or 0, "set TMPDIR to a directory that can be used")
    return f"{base}: {error.strerror or error}: {remedy}"


def _unsafe(base: str) -> str:
    """Return why another user could replace a directory in `base`; empty if no other user can.

    `base` and the directories above it must belong to this user or to the system (root, or the owner of "/"). Nobody
    else may write to them, except to one with the sticky bit, as /tmp, where no user can rename a file of another user.
    """
    path = os.path.realpath(base)
    trusted = {0, os.geteuid(), os.stat("/").st_uid}
    while True:
        state = os.stat(path)
        if not stat.S_ISDIR(state.st_mode):
            return f"{path} is no directory: remove it"
        if state.st_uid not in trusted:
            return f"{path} belongs to user {state.st_uid}: set TMPDIR to a directory of your own"
        if not state.st_mode & stat.S_ISVTX:
            if state.st_mode & stat.S_IWOTH:
                return f"everybody may replace files in {path}: `chmod +t {path}`"
            if state.st_mode & stat.S_IWGRP and not _own_group(state.st_gid):
                return f"its group may replace files in {path}: `chmod g-w {path}`"
        if path == "/":
            return ""
        path = os.path.dirname(path)


def _own_group(group: int) -> bool:
    """Return whether a group is this user's own: it has the user's name, or is root's."""
    if group == 0:
        return True
    # Imported here, because few hosts need them and every connection would wait for them.
    import grp
    import pwd

    try:
        return group == os.getegid() and grp.getgrgid(group).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


def take_lock(fd: int) -> bool:
    """Take the lock of the directory with this descriptor, if no process has it. Return whether it was taken.

    Raise `OSError` where the file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_own(path: str) -> bool:
    """Return whether this is a directory of this user, and no link to one."""
    try:
        state = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()


def is_there(path: str, fd: int) -> bool:
    """Return whether the path still leads to the directory with this descriptor, which its agent may have removed."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except OSError:
        return False


def read(path: str, limit: int) -> bytes:
    """Return the end of a file of the directory; nothing if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return b""
    with os.fdopen(fd, "rb") as file:
        file.seek(max(0, os.fstat(fd).st_size - limit))
        return file.read(limit)


def remove(path: str) -> None:
    """Remove the directory, which must be locked by the caller, with what an agent leaves in it."""
    for name in _FILES:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}/{name}")
    _remove_trees(path)
    with contextlib.suppress(OSError):
        os.rmdir(path)


def prepare_work(path: str) -> None:
    """Make an empty directory for tasks to run in, whatever an agent that was killed has left there."""
    _remove_trees(path)
    os.mkdir(f"{path}/{WORK}", 0o700)


def _remove_trees(path: str) -> None:
    """Remove what the workers have written."""
    trees = [tree for tree in (f"{path}/{WORK}", f"{path}/{MODULES}") if os.path.isdir(tree)]
    if trees:
        # Imported here, because each connection would wait for it, and only the end of an agent needs it.
        import shutil

        for tree in trees:
            shutil.rmtree(tree, ignore_errors=True)


def sweep() -> None:
    """Remove what agents of this user that were killed have left behind."""
    for base in bases():
        with contextlib.suppress(OSError), os.scandir(base) as entries:
            for entry in entries:
                if entry.name.startswith(PREFIX) and is_key(entry.name.removeprefix(PREFIX)):
                    remove_left(entry.path, LEFT_SECONDS)


def remove_left(path: str, seconds: float) -> None:
    """Remove a directory of this user that has no agent, and in which nothing was made for so many seconds."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            state = os.fstat(fd)
            # A directory that was just made gets its lock in a moment.
            left = state.st_uid == os.geteuid() and time.time() - state.st_mtime >= seconds
            if left and take_lock(fd) and is_there(path, fd):
                remove(path)
        finally:
            os.close(fd)
