"""What a cache is made of: groups of alike heads in a layer, and the buffers of a group."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from kvcompile.artifacts import POLICIES, Artifact, ExchangeError
from kvcompile.kernels.codecs import CODECS, Codec, codec_of, is_quantised

SUPPORTED = ("full", "recent", "scored")


@dataclass(frozen=True)
class Buffer:
    """A part of the cache: the graph's input `past.NAME` and its output `present.NAME`, which may be one memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def past(self) -> str:
        return f"past.{self.name}"

    @property
    def present(self) -> str:
        return f"present.{self.name}"


@dataclass(frozen=True)
class Side:
    """Keys or values of a group. Quantised ones have `rows` (codes) and `scales`, and an exact copy of token 0, the
    `anchor`, where the heads have sinks and the codec asks for it; exact ones have `rows` alone."""

    bits: int
    rows: Buffer
    scales: Buffer | None = None
    anchor: Buffer | None = None

    @property
    def codec(self) -> Codec:
        """The codec of a quantised side. Raises ValueError for an exact one."""
        return codec_of(self.bits)

    def buffers(self) -> list[Buffer]:
        """Those that have something for every slot."""
        return [buffer for buffer in (self.rows, self.scales) if buffer is not None]


@dataclass(frozen=True)
class Group:
    """`count` heads of equal shape at storage positions `start` and on. Of `capacity` slots the first `sink` and the
    last `recent` are protected; between them are `heavy` slots for what scores best, where heads are scored."""

    start: int
    count: int
    policy: str
    capacity: int
    sink: int
    recent: int
    keys: Side
    values: Side
    scores: Buffer | None

    @property
    def heavy(self) -> int:
        return self.capacity - self.sink - self.recent

    @property
    def quantised(self) -> bool:
        """Whether keys or values are."""
        return self.keys.scales is not None or self.values.scales is not None

    def sides(self) -> tuple[Side, Side]:
        return self.keys, self.values

    def slotted(self) -> list[Buffer]:
        """Buffers with something for every slot."""
        scores = [] if self.scores is None else [self.scores]
        return [*self.keys.buffers(), *self.values.buffers(), *scores]

    def buffers(self) -> list[Buffer]:
        return [*self.slotted(), *(side.anchor for side in self.sides() if side.anchor is not None)]


def layer_groups(artifact: Artifact) -> list[list[Group]]:
    """The groups of every layer, in storage order.

    Raises:
        ExchangeError: heads of a policy that learns from attention, or of a codec without ONNX operators.
    """
    model, target, budgets = artifact.model, artifact.target, artifact.budgets
    found = []
    for layer, order in enumerate(budgets.head_order.tolist()):
        tables = (budgets.policy, budgets.capacity, budgets.sink, budgets.recent, budgets.k_bits, budgets.v_bits)
        heads = [tuple(int(table[layer, h]) for table in tables) for h in order]
        start = 0
        made: list[Group] = []
        for shape, members in groupby(heads):
            count, name = len(list(members)), f"{layer}.{len(made)}"
            policy, capacity, sink, recent, *bits = shape
            if POLICIES[policy] not in SUPPORTED:
                raise ExchangeError(
                    f"layer {layer} has heads of policy {POLICIES[policy]!r}: expected {', '.join(SUPPORTED)}, as "
                    "others need attention weights, which standard operators do not give: build with one of these"
                )
            for stored in bits:
                _check_codec(stored, layer)
            slots = (target.batch, count, capacity)
            keys, values = (
                _side(f"{name}.{side}", slots, model.head_dim, stored, sink > 0, target.dtype)
                for side, stored in zip(("key", "value"), bits, strict=True)
            )
            scores = Buffer(f"{name}.scores", "float16", slots) if POLICIES[policy] == "scored" else None
            made.append(Group(start, count, POLICIES[policy], capacity, sink, recent, keys, values, scores))
            start += count
        found.append(made)
    return found


def _check_codec(bits: int, layer: int) -> None:
    if is_quantised(bits) and not codec_of(bits).has("onnx"):
        known = ", ".join(codec.name for codec in CODECS.values() if codec.has("onnx"))
        raise ExchangeError(
            f"layer {layer} has heads stored as {codec_of(bits).name}, which is not written in standard operators: "
            f"expected the cache dtype or {known}: build with one of these"
        )


def _side(name: str, slots: tuple[int, int, int], head_dim: int, bits: int, sinks: bool, dtype: str) -> Side:
    if not is_quantised(bits):
        return Side(bits, Buffer(name, dtype, (*slots, head_dim)))
    codec = codec_of(bits)
    anchored = sinks and codec.needs_anchor
    return Side(
        bits,
        Buffer(f"{name}_codes", "uint8", (*slots, codec.code_bytes(head_dim))),
        Buffer(f"{name}_scales", "float16", (*slots, codec.groups(head_dim))),
        Buffer(f"{name}_anchor", dtype, (*slots[:2], 1, head_dim)) if anchored else None,
    )
