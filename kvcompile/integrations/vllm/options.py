"""What `--model-loader-extra-config` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kvcompile.artifacts import CacheError

CHECK, IGNORE = "check", "ignore"


@dataclass(frozen=True)
class LoaderOptions:
    """`artifact` is a file or a place on the hub (`owner/name`); `fingerprint` is `check`, or `ignore` to serve weights
    that are not known to be the artifact's; `load_format` is how weights are loaded; `staged` is how many sequences'
    exact keys and values there is room for while their prompts are read in chunks; what else is there goes to the
    loader of that format."""

    artifact: str
    fingerprint: str = CHECK
    load_format: str = "auto"
    staged: int = 1
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Any) -> LoaderOptions:
        """Raises CacheError: no artifact, or a value that has no meaning."""
        found = dict(given) if isinstance(given, Mapping) else {}
        own = {f.name: found.pop(f.name) for f in fields(cls) if f.name != "others" and f.name in found}
        if not isinstance(own.get("artifact"), str):
            raise CacheError(
                'there is no artifact to serve with: expected --model-loader-extra-config \'{"artifact": "x.kvb"}\''
            )
        options = cls(**own, others=found)
        if options.fingerprint not in (CHECK, IGNORE):
            raise CacheError(f'"fingerprint" is {options.fingerprint!r}, expected "{CHECK}" or "{IGNORE}"')
        if not isinstance(options.staged, int) or options.staged < 1:
            raise CacheError(f'"staged" is {options.staged!r}, expected a number of sequences, 1 or more')
        return options
