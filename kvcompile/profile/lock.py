"""One build at a time for a profile: the others wait, and find it finished."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone(store: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Let no other process have the folder `store` within the block; `waiting` is called if another one has it, before
    the wait for its end. The system gives up what a killed process had.

    The lock is on an empty file beside the folder, which goes with the block. Where the system or the file system knows
    no locks, or the file cannot be made, the block goes on without.
    """
    file = store.with_name(f"{store.name}.lock")
    handle = None if fcntl is None else _acquired(file, waiting)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):  # another user's, who has it for later
                file.unlink()
            fcntl.flock(handle, fcntl.LOCK_UN)  # Closing would not do where a child process has the file too.
            os.close(handle)


def _acquired(file: Path, waiting: Callable[[], None] | None) -> int | None:
    """A handle of the file with the lock on it, None where there are no locks."""
    while (handle := _opened(file)) is not None:
        kept = locked = False
        try:
            locked = _lock(handle, waiting)
            kept = locked and _is(handle, file)
        finally:
            if not kept:
                os.close(handle)
        if kept:
            return handle
        if not locked:
            return None
        # Who had it has removed the file meanwhile: the lock that counts is on the one that is there now.
    return None


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except OSError:
        return False


def _opened(file: Path) -> int | None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    # Locks of network file systems want a file that can be written; another user's often can only be read.
    for access in (os.O_RDWR, os.O_RDONLY):
        try:
            return os.open(file, access | os.O_CREAT, 0o666)
        except OSError:
            continue
    return None


def _lock(handle: int, waiting: Callable[[], None] | None) -> bool:
    """Whether there is a lock now; it is waited for."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        pass
    except OSError:
        return False
    if waiting is not None:
        waiting()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
