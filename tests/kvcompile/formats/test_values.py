"""What a format writes says, read again, what it was given; and formats from outside of the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcompile.artifacts import Artifact, ExchangeError
from kvcompile.artifacts import read as read_artifact
from kvcompile.compiler import resolve
from kvcompile.formats import FORMATS, Curves, Format, Gates, Importance, Value, Windows, read, register

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"
RNG = np.random.default_rng(0)
VALUES: dict[str, Value] = {
    "duoattention": Gates("model", RNG.uniform(0, 1, (5, 4)), sink=3, recent=77),
    "lukv": Curves("model", RNG.uniform(0, 1, (99, 5, 4))),
    "headkv": Importance("model", RNG.uniform(0, 9, (5, 8))),
    "windows": Windows("model", RNG.integers(1, 9000, 5), sink=2),
}


def put(name: str, value: Value, folder: Path) -> Path:
    """The files of a value under the names that the format gives them."""
    files = FORMATS[name].write(value)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder if FORMATS[name].folder else folder / next(iter(files))


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back(name: str, tmp_path: Path) -> None:
    value = VALUES[name]
    path = put(name, value, tmp_path)
    found = read(path)
    assert type(found) is type(value)
    assert found.source == str(path)
    for field, given in vars(value).items():
        if field != "source":
            np.testing.assert_allclose(getattr(found, field), given, rtol=1e-6, atol=1e-7)


def test_a_window_without_sinks_says_nothing_of_them(tmp_path: Path) -> None:
    found = read(put("windows", Windows("model", np.array([5, 6]), None), tmp_path))
    assert isinstance(found, Windows)
    assert found.sink is None


def test_a_head_counts_as_the_largest_of_its_cluster(tmp_path: Path) -> None:
    weights = np.array([[0.9, 0.1], [0.0, 0.0], [0.3, 0.8], [0.2, 0.7], [0.6, 0.4]])
    found = read(put("tangram", Importance("model", weights), tmp_path))
    assert isinstance(found, Importance)
    # The layer without weight, as of a sliding window, is left out; eight heads make two clusters.
    expected = np.array([[0.9, 0.4], [0.4, 0.9], [0.4, 0.9], [0.9, 0.4]])
    np.testing.assert_allclose(found.weights, expected, rtol=1e-6)


def test_whole_numbers_are_written_as_such() -> None:
    assert FORMATS["headkv"].write(Importance("model", np.array([[3.0, 0.5]]))) == {
        "head_scores.json": b'{"0-0": [3], "0-1": [0.5]}\n'
    }


def test_levels_that_lukv_has_no_place_for_are_refused() -> None:
    with pytest.raises(ExchangeError, match="no place for 3 levels: expected 99"):
        FORMATS["lukv"].write(Curves("model", np.ones((3, 5, 4))))


def read_toy(path: Path) -> Importance:
    return Importance(str(path), np.loadtxt(path, skiprows=1, ndmin=2))


def write_toy(value: Importance) -> dict[str, bytes]:
    lines = [" ".join(f"{weight:g}" for weight in row) for row in value.weights.tolist()]
    return {"heads.json": "\n".join(["toy", *lines, ""]).encode()}


def owns_toy(path: Path) -> bool:
    return path.suffix == ".json" and path.read_bytes().startswith(b"toy")


TOY = Format(read_toy, write_toy, owns_toy, looks="a toy")


@pytest.fixture
def toy() -> Iterator[Format]:
    register("toy", TOY)
    yield TOY
    del FORMATS["toy"]


@pytest.fixture(scope="module")
def reference() -> Artifact:
    return read_artifact(REFERENCE)


def test_a_format_from_outside_is_an_allocator_s_file(toy: Format, reference: Artifact, tmp_path: Path) -> None:
    weights = np.random.default_rng(1).integers(1, 5, (30, 3)).astype(np.float64)
    file = put("toy", Importance("model", weights), tmp_path)
    plan = resolve(reference, mem="25%", policy="recent", allocator=f"file:{file}")
    shares = plan.budgets.capacity / plan.budgets.capacity.sum()
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=1e-4)
    assert plan.solver["allocator"] == f"file:{file}"
    # Other JSON files are still those of the formats that were there before.
    (tmp_path / "windows.json").write_text('{"max_attention_window": [64]}')
    assert isinstance(read(tmp_path / "windows.json"), Windows)
    with pytest.raises(ExchangeError, match=r"expected a folder of DuoAttention's, or \.tsv.*\.json or a toy"):
        read(tmp_path / "none.txt")


def test_a_taken_name_is_refused(toy: Format) -> None:
    register("toy", TOY)  # the same one
    with pytest.raises(ValueError, match="'headkv' already"):
        register("headkv", TOY)
    assert FORMATS["headkv"] != TOY


def test_without_it_the_file_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_bytes(b"toy\n1 2\n")
    with pytest.raises(ExchangeError, match="is not such a file"):
        read(tmp_path / "heads.json")
