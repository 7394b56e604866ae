"""Profiles as an artifact holds them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from profiles import tiny_profile
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import Artifact, ArtifactError
from kvcompile.assemble.tables import profile_arrays, stored_profile
from kvcompile.stages import KeptLosses, Profile


def with_kept() -> Profile:
    profile = tiny_profile()
    key, value = (np.stack([2 * table, 3 * table], -2) for table in (profile.key_loss, profile.value_loss))
    return dataclasses.replace(profile, kept=KeptLosses(np.array([4, 16], np.int32), key, value))


@pytest.mark.parametrize("profile", [tiny_profile(), with_kept()], ids=["without kept", "with kept"])
def test_what_is_stored_comes_back(profile: Profile) -> None:
    artifact = _holding(profile)
    found = stored_profile(artifact)
    assert (found.kept is None) == (profile.kept is None)
    for name, table in profile_arrays(profile).items():
        np.testing.assert_array_equal(profile_arrays(found)[name], table)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("kept_tokens", np.array([16, 4], np.int32)),
        ("kept_tokens", np.array([4, 64], np.int32)),
        ("kept_tokens", np.zeros(0, np.int32)),
        ("kept_key_loss", np.zeros((2, 2, 3, 1, 2), np.float32)),
        ("kept_value_loss", None),
    ],
)
def test_losses_of_kept_tokens_that_do_not_fit_are_refused(name: str, table) -> None:
    arrays = profile_arrays(with_kept())
    arrays = {key: value for key, value in arrays.items() if key != name} | ({} if table is None else {name: table})
    artifact = dataclasses.replace(_holding(with_kept()), profile=arrays)
    with pytest.raises(ArtifactError, match=rf"carries no usable profile\.{name}"):
        stored_profile(artifact)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("correlation", lambda _: np.zeros((1, 2), np.float32)),
        ("correlation", lambda _: np.array(0.5, np.float32)),
        *((name, lambda table: table - 1) for name in ("loss", "key_loss", "value_loss")),
        *((f"kept_{kind}_loss", lambda table: table - 1) for kind in ("key", "value")),
    ],
)
def test_tables_that_no_profile_has_are_refused(name: str, change) -> None:
    artifact = _holding(with_kept())
    arrays = {**artifact.profile, name: change(artifact.profile.get(name))}
    with pytest.raises(ArtifactError, match=rf"carries no usable profile\.{name}: expected"):
        stored_profile(dataclasses.replace(artifact, profile=arrays))


def _holding(profile: Profile) -> Artifact:
    artifact = make_artifact(tiny_model(CONFIGS["llama"]), 14)
    layers, heads = profile.baklava.shape
    identity = dataclasses.replace(artifact.model, num_layers=layers, num_kv_heads=heads)
    return dataclasses.replace(artifact, model=identity, profile=profile_arrays(profile))
