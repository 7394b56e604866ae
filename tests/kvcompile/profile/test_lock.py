"""A profile's lock: one process has it, another waits, and without locks nothing is different."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompile.profile import lock
from kvcompile.profile.lock import alone

PROGRAM = """
import sys, time
from pathlib import Path
from kvcompile.profile.lock import alone
with alone(Path(sys.argv[1])):
    print("there", flush=True)
    sys.stdin.readline()
"""


def free(store: Path) -> bool:
    """Whether nobody has the lock."""

    def taken() -> None:
        raise InterruptedError

    try:
        with alone(store, taken):
            return True
    except InterruptedError:
        return False


@pytest.mark.parametrize("killed", [False, True])
def test_another_process_waits_until_the_first_is_done_or_gone(tmp_path: Path, killed: bool) -> None:
    store = tmp_path / "profiles" / "key"
    command = [sys.executable, "-c", PROGRAM, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        assert not free(store)
        assert free(store.with_name("another"))
        told = []

        def waiting() -> None:
            told.append("waiting")
            other.kill() if killed else other.stdin.close()  # type: ignore[union-attr]

        with alone(store, waiting):
            assert not free(store)
    assert told == ["waiting"]
    assert free(store)
    assert not list(store.parent.iterdir()), "nothing is left of it"


def test_without_locks_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert free(tmp_path / "file" / "key"), "a folder that cannot be made"

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", none)
        with alone(tmp_path / "key"):
            assert free(tmp_path / "key")
    monkeypatch.setattr(lock, "fcntl", None)
    with alone(tmp_path / "key"):
        assert free(tmp_path / "key")
