from __future__ import annotations

from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from kvcompile.models import one_blas_thread


def threads() -> dict[str, int]:
    """Of every BLAS that numpy or scipy brings, by its file."""
    return {
        one["filepath"]: one["num_threads"]
        for one in threadpool_info()
        if one["user_api"] == "blas" and Path(one["filepath"]).parent.name in ("numpy.libs", "scipy.libs")
    }


@pytest.mark.skipif(not threads(), reason="numpy's BLAS is not one that it brings")
def test_numpys_blas_has_one_thread_and_torch_all_of_its_own() -> None:
    with threadpool_limits(2, "blas"):  # also where the environment asks for one
        before, torchs = threads(), torch.get_num_threads()
        assert set(before.values()) == {2}
        with one_blas_thread():
            assert set(threads().values()) == {1}
            assert torch.get_num_threads() == torchs
        assert threads() == before
