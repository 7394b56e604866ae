"""A file is there whole or not at all, whatever fails while it is written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

import kvcompile.artifacts.serialize as serialize
from kvcompile.artifacts import ArtifactError, read, to_bytes, write


def fail_with(error):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES])
def test_failing_system_calls(artifact, tmp_path, monkeypatch, call, code, old):
    path = tmp_path / "a.kvb"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(serialize.os, call, fail_with(OSError(code, os.strerror(code))))
    with pytest.raises(ArtifactError, match=os.strerror(code)) as caught:
        write(artifact, path)
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupts_leave_nothing(artifact, tmp_path, monkeypatch, call):
    monkeypatch.setattr(serialize.os, call, fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write(artifact, tmp_path / "a.kvb")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_writing(artifact, tmp_path):
    # A limit on a file's size fails inside write(2), as a full disk does.
    script = (
        "import resource, signal, sys\n"
        "from kvcompile.artifacts import ArtifactError, read, write\n"
        "artifact = read(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write(artifact, sys.argv[2])\n"
        "except ArtifactError as error:\n    print(error)\n"
    )
    write(artifact, tmp_path / "a.kvb")
    command = [sys.executable, "-c", script, tmp_path / "a.kvb", tmp_path / "b.kvb"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout == f"{tmp_path / 'b.kvb'}: the file cannot be written: File too large\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.kvb"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_devices_are_left_alone(artifact):
    with pytest.raises(ArtifactError, match="not a regular file"):
        write(artifact, "/dev/full")


def test_folder_of_that_name(artifact, tmp_path):
    (tmp_path / "a.kvb").mkdir()
    with pytest.raises(ArtifactError, match="not a regular file"):
        write(artifact, tmp_path / "a.kvb")


def test_no_such_folder(artifact, tmp_path):
    with pytest.raises(ArtifactError, match="No such file or directory"):
        write(artifact, tmp_path / "no" / "a.kvb")


@pytest.mark.parametrize("name", ["a\0b.kvb", "n" * 300])
def test_impossible_names(artifact, tmp_path, name):
    with pytest.raises(ArtifactError) as caught:
        write(artifact, tmp_path / name)
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(artifact, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="Permission denied"):
        write(artifact, tmp_path / "a.kvb")


def test_a_link_stays_a_link(artifact, tmp_path):
    (tmp_path / "real.kvb").write_bytes(b"old")
    (tmp_path / "link.kvb").symlink_to("real.kvb")
    write(artifact, tmp_path / "link.kvb")
    assert (tmp_path / "link.kvb").is_symlink()
    assert (tmp_path / "real.kvb").read_bytes() == to_bytes(artifact)


def test_permissions_are_those_of_any_new_file(artifact, tmp_path):
    (tmp_path / "plain").touch()
    write(artifact, tmp_path / "a.kvb")
    assert (tmp_path / "a.kvb").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(("call", "there"), [("fsync", False), ("replace", False), ("_sync_folder", True)])
def test_a_killed_process_leaves_no_partial_file(artifact, tmp_path, call, there):
    script = (
        "import os, signal, sys\n"
        "import kvcompile.artifacts.serialize as serialize\n"
        "from kvcompile.artifacts import read, write\n"
        "artifact = read(sys.argv[1])\n"
        f"owner = serialize if {call!r}.startswith('_') else os\n"
        f"setattr(owner, {call!r}, lambda *args: os.kill(os.getpid(), signal.SIGKILL))\n"
        "write(artifact, sys.argv[2])\n"
    )
    source, target = tmp_path / "a.kvb", tmp_path / "b.kvb"
    write(artifact, source)
    result = subprocess.run([sys.executable, "-c", script, source, target], check=False)
    assert result.returncode == -signal.SIGKILL
    assert target.exists() == there
    if there:
        assert to_bytes(read(target)) == to_bytes(artifact)
