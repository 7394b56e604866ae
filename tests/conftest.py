"""Settings for every test."""

from __future__ import annotations

import sys
from pathlib import Path

# With the repository's root on the path, our folder `kernels` hides the Hugging Face package of that name, which
# transformers imports where it is installed; and the tests are to see the installed kvcompile.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import os  # noqa: E402

# Several processes with a pool of threads each would wait for one another.
ALONE = "PYTEST_XDIST_WORKER" not in os.environ
if not ALONE:
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU, Triton's kernels run in its interpreter, which must be chosen before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, torch.get_num_threads()) if ALONE else 1)

# An example that takes long on a busy machine is no failure.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

pytest_plugins = ("hub_stand_in",)

LONGEST = ("test_prefill_bytes", "test_real_model", "test_machine_code")
"""The modules that take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first: modules go to the processes in order, and one would be busy alone at the end. Tests
    for which a GPU's kernels are compiled alike stay in one process (`--dist loadgroup`), which compiles them once."""
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))
    for item in items:
        case = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if {"layout", "shape", "dtype"} <= case.keys():
            item.add_marker(pytest.mark.xdist_group(f"{case['layout']} {case['shape']} {case['dtype']}"))
