"""What commands read and print: prompts, numbers of bytes, options that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompile.cli.output import approximate
from kvcompile.cli.run import read_prompt

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_line_breaks_that_end_a_file_are_no_part_of_a_message(tmp_path: Path, end: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(f"One line.\n  Another? {end}".encode())
    assert read_prompt(str(file), raw=False) == "One line.\n  Another? "
    assert read_prompt(str(file), raw=True) == "One line.\n  Another? " + "\n" * end.count("\n")


@pytest.mark.parametrize(
    ("size", "shown"),
    [(999, "999 bytes"), (1000, "1 kB"), (999_499, "999 kB"), (999_944, "1 MB"), (1_234_567, "1.23 MB")],
)
def test_bytes_have_three_digits(size: int, shown: str) -> None:
    assert approximate(size) == shown


@pytest.mark.parametrize("option", [("--mem", "50%"), ("--widths", "4")])
def test_options_for_random_weights_are_refused_beside_an_artifact(kvcompile, option) -> None:
    status, out, err = kvcompile("bench", REFERENCE, *option)
    assert (status, out) == (2, "")
    assert "--mem and --widths are for --random-weights" in err


def test_a_place_that_cannot_be_written_is_refused_before_an_export(kvcompile, tmp_path, monkeypatch) -> None:
    from kvcompile import export

    monkeypatch.setattr(export, "export", lambda *_: pytest.fail("the export has begun"))
    status, out, err = kvcompile("export", REFERENCE, "--to", "headkv", "-o", tmp_path / "none" / "x.json")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "none" in err
