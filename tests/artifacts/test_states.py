"""Layers of linear attention in a file: version 4, and bytes beside those of heads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcompile.artifacts import Artifact, ArtifactError, from_bytes, state_bytes, to_bytes
from kvcompile.artifacts.schema import needed_version

STATES = (100, 30)


def with_states(artifact: Artifact, extra: int) -> Artifact:
    """The artifact of a model with states, its account larger by `extra` bytes a sequence."""
    account, batch = artifact.bytes, artifact.target.batch
    account = replace(account, resident=account.resident + batch * extra, full=account.full + batch * extra)
    target = replace(artifact.target, bytes=artifact.target.bytes + batch * extra)
    return replace(artifact, model=replace(artifact.model, states=STATES), bytes=account, target=target)


def test_they_are_written_as_version_4_and_read_back(artifact: Artifact) -> None:
    found = with_states(artifact, 100 * 2 + 30 * 4)  # float16, and float32
    assert state_bytes(found.model, found.target.dtype) == 320
    assert (needed_version(artifact), needed_version(found)) == (1, 4)
    assert b"states" not in to_bytes(artifact)
    again = from_bytes(to_bytes(found), "a.kvb")
    assert again.model == found.model
    assert again.bytes == found.bytes


def test_a_reader_of_an_older_version_does_not_look_for_them(artifact: Artifact) -> None:
    assert from_bytes(to_bytes(artifact), "a.kvb").model.states == (0, 0)


def test_an_account_without_them_is_refused(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"bytes\.resident is \d+, expected \d+ for these budgets"):
        from_bytes(to_bytes(with_states(artifact, 0)), "a.kvb")
