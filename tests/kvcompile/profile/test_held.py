"""Tensors that are held in memory or on disk, and what is left of them after an interruption."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcompile.artifacts.errors import ModelError
from kvcompile.models.room import Room
from kvcompile.profile.held import UNLIMITED, Held, LostError

STATES = {
    "a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "b": torch.arange(30.0).bfloat16().reshape(5, 6).T,
    "c": torch.tensor(7.0, dtype=torch.float64),
}


def full(held: Held) -> Held:
    for name, tensor in STATES.items():
        held.put(name, one=tensor)
    return held


def check(held: Held, names: str = "abc") -> None:
    for name in names:
        found = held.one(name)
        assert found.dtype == STATES[name].dtype
        assert torch.equal(found, STATES[name])
        assert found.is_contiguous()


@pytest.mark.parametrize("host", [0, 70, 1 << 20])
def test_what_does_not_fit_in_memory_is_on_disk(tmp_path: Path, host: int) -> None:
    held = full(Held(tmp_path / "states", Room(0, host)))
    check(held)
    files = sorted(path.stem for path in tmp_path.glob("states/*"))
    assert files == {0: ["a", "b", "c"], 70: ["b"], 1 << 20: []}[host]
    held.clear()
    assert not (tmp_path / "states").exists()


def test_without_a_folder_the_disk_is_a_temporary_one() -> None:
    held = full(Held(room=Room(0, 0)))
    check(held)
    folder = held.folder
    assert folder.exists()
    del held
    assert not folder.exists()


def test_room_is_free_again_when_a_step_is_done(tmp_path: Path) -> None:
    held = Held(tmp_path, Room(0, 60))
    held.put("a", one=STATES["a"])
    held.drop("a")
    check(held, "a")
    held.commit()
    with pytest.raises(LostError, match=r"is gone or damaged, the first of it a: start the build again"):
        held.get("a")
    held.put("b", one=STATES["b"])
    assert not list(tmp_path.iterdir())


def test_what_is_spared_makes_room(tmp_path: Path) -> None:
    held = Held(tmp_path / "states", Room(0, 130))
    held.spare("x", STATES["a"])
    held.spare("y", STATES["a"])
    held.spare("too large", torch.zeros(100))
    assert held.take("too large") is None
    held.put("b", one=STATES["b"])  # 60 of 130 bytes, of which 120 are spared
    held.save(lambda: None)
    assert sorted(path.stem for path in tmp_path.glob("states/*")) == ["b"]
    assert held.take("x") is None
    kept = held.take("y")
    assert kept is not None
    assert torch.equal(kept, STATES["a"])
    assert held.take("y") is None
    held.put("a", one=STATES["a"])
    check(held, "ab")
    assert held.take("a") is None


@pytest.mark.parametrize("room", [Room(0, 0), UNLIMITED])
def test_a_save_is_what_another_process_finds(tmp_path: Path, room: Room) -> None:
    held = full(Held(tmp_path, room))
    held.save(lambda: None)
    held.drop("a")
    held.roll_back()
    held.drop("b")
    held.commit()
    check(Held(tmp_path, room))  # what has left since is needed again if this process ends now
    held.save(lambda: check(Held(tmp_path, room)))
    check(Held(tmp_path, room), "ac")
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c"]


PROGRAM = """
import sys, torch
from pathlib import Path
from kvcompile.artifacts.errors import ModelError
from kvcompile.models.room import Room
from kvcompile.profile.held import Held
try:
    Held(Path(sys.argv[1]), Room(0, 0)).put("big", one=torch.zeros(1 << 20))
except ModelError as error:
    print(error)
"""


def test_a_disk_without_room_is_one_sentence(tmp_path: Path) -> None:
    """A limit of the system's on the size of files does what a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "states")], capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"what profiling keeps between its steps cannot be written to {tmp_path / 'states'} (")
    assert "KVCOMPILE_CACHE" in line
    assert not list((tmp_path / "states").iterdir())


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written to"):
        Held(tmp_path / "file" / "states", Room(0, 0)).put("a", one=STATES["a"])
