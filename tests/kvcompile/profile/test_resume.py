from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvcompile.profile.resume import FILE, load, profile_key, save

FRESH = {"items": np.zeros((), np.int64), "loss": np.zeros((2, 3))}
KEPT = {"items": np.ones((), np.int64), "loss": np.full((2, 3), 1 / 3)}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "deep" / "er", KEPT)
    loaded = load(tmp_path / "deep" / "er", FRESH)
    assert {name: array.tolist() for name, array in loaded.items()} == {
        name: array.tolist() for name, array in KEPT.items()
    }
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == [FILE]


@pytest.mark.parametrize("damage", ["missing", "cut", "junk", "shape"])
def test_what_cannot_be_used_is_started_anew(tmp_path: Path, damage: str) -> None:
    save(tmp_path, KEPT | ({"loss": np.ones((2, 4))} if damage == "shape" else {}))
    path = tmp_path / FILE
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "junk":
        path.write_bytes(b"no archive")
    assert load(tmp_path, FRESH) is FRESH


def test_failed_save_keeps_the_old_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, KEPT)

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, FRESH)
    assert load(tmp_path, FRESH)["items"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_key_tells_everything_apart() -> None:
    base = {"fingerprint": "f", "calibration": "c", "dtype": "float32", "seed": 0, "sink": 4, "checks": 12}
    changes = [
        {}, {"fingerprint": "g"}, {"calibration": "d"}, {"dtype": "bfloat16"}, {"seed": 1}, {"sink": 5}, {"checks": 4},
    ]  # fmt: skip
    keys = {profile_key(**(base | change)) for change in changes}  # type: ignore[arg-type]
    assert len(keys) == len(changes)
    assert profile_key(**base) in keys  # type: ignore[arg-type]
