"""The page: its data, that nothing in an artifact can break out of it, and how it looks to a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from kvcompile.artifacts import Artifact, read
from kvcompile.compiler import resolve
from kvcompile.report import page, report_data

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-4096-25pct.kvb"


@pytest.fixture(scope="module")
def artifact(model_folder: Path) -> Artifact:
    from kvcompile.compiler import build
    from kvcompile.models import load

    loaded = load(str(model_folder))
    return build(loaded.model, loaded.tokenizer, mem="30%", context=192, name="tiny")


def test_data_tells_everything(artifact: Artifact) -> None:
    data = report_data(artifact)
    json.dumps(data, allow_nan=False)
    assert data["shape"][0] == len(data["capacity"]) == 3
    assert data["curves"]["families"][-1] == "retrieval"
    assert len(data["curves"]["loss"]) == 6
    for name in ("optimal", "uniform"):
        losses = [point["loss"] for point in data["front"][name]]
        assert losses == sorted(losses, reverse=True) or name == "uniform"
    assert sum(map(sum, data["size"])) == artifact.bytes.resident


def test_an_artifact_without_curves_still_has_a_page(artifact: Artifact) -> None:
    data = report_data(dataclasses.replace(artifact, profile={}))
    assert (data["curves"], data["front"]) == (None, None)
    assert "</html>" in page(data)


def test_names_cannot_become_markup(artifact: Artifact) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    model = dataclasses.replace(artifact.model, name=evil)
    text = page(report_data(dataclasses.replace(artifact, model=model)))
    assert evil not in text
    assert text.count("</script>") == 2
    assert "innerHTML" not in text
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    assert json.loads(found[1])["summary"]["model"] == evil


def test_the_page_needs_nothing_else(artifact: Artifact) -> None:
    text = page(report_data(artifact))
    assert not re.findall(r"(?:src|href)=|@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


def open_page(browser: str, text: str, folder: Path, *options: str, place: str = "") -> str:
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=3000", *options, f"file://{folder / 'page.html'}{place}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


@pytest.mark.parametrize("which", ["tiny", "real"])
def test_a_browser_shows_heads_curves_and_front(browser: str, artifact: Artifact, tmp_path: Path, which: str) -> None:
    shown = artifact if which == "tiny" else resolve(read(REFERENCE), mem="25%")
    layers, heads = shown.budgets.capacity.shape
    dom = open_page(browser, page(report_data(shown)), tmp_path, "--dump-dom", place="#head=2,1")
    assert 'data-ready="yes"' in dom
    assert not re.search("<body[^>]*data-error", dom)
    assert len(re.findall(r'class="cell"', dom)) == layers * heads
    assert len(re.findall(r'aria-pressed="true"', dom)) == 1
    assert re.search(r'aria-label="layer 2, head 1:[^"]*"[^>]*aria-pressed="true"', dom)
    assert "Layer 2, head 1" in dom
    curves, front = (len(re.findall('class="series"', part)) for part in dom.split('id="front-title"'))
    shares = len(shown.profile.get("shares", [1]))
    assert curves == shares
    assert 1 <= front <= 2
    assert len(re.findall(r"<tr>", dom.split('id="all"')[1])) == layers * heads + 1


def test_a_hostile_name_does_nothing_in_a_browser(browser: str, artifact: Artifact, tmp_path: Path) -> None:
    model = dataclasses.replace(artifact.model, name="<img src=x onerror=\"document.body.dataset.error='1'\">")
    dom = open_page(browser, page(report_data(dataclasses.replace(artifact, model=model))), tmp_path, "--dump-dom")
    assert 'data-ready="yes"' in dom
    assert not re.search("<body[^>]*data-error", dom)
    assert "<img" not in dom


def test_a_picture_of_the_page_is_not_blank(browser: str, artifact: Artifact, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    open_page(browser, page(report_data(artifact)), tmp_path, "--window-size=1200,900", f"--screenshot={shot}")
    data, pixels, place = shot.read_bytes(), b"", 8
    while place < len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        pixels += data[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += size + 12
    assert len(set(zlib.decompress(pixels))) > 60


def test_the_command_writes_the_page(kvcompile, artifact: Artifact, tmp_path: Path) -> None:
    from kvcompile.artifacts import write

    write(artifact, tmp_path / "a.kvb")
    status, _, err = kvcompile("inspect", tmp_path / "a.kvb", "--html", tmp_path / "a.html")
    assert (status, err) == (0, "")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.kvb"]
