from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from kvcompile.models import one_blas_thread


def threads() -> dict[str, int]:
    return {
        one["filepath"]: one["num_threads"]
        for one in threadpool_info()
        if one["user_api"] == "blas" and Path(np.__file__).parents[1] in Path(one["filepath"]).parents
    }


@pytest.mark.skipif(not threads(), reason="numpy's BLAS is not one that it brings")
def test_numpys_blas_has_one_thread_and_torch_all_of_its_own() -> None:
    before, torchs = threads(), torch.get_num_threads()
    with one_blas_thread():
        assert set(threads().values()) == {1}
        assert torch.get_num_threads() == torchs
    assert threads() == before
