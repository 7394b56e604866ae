"""An artifact as a kvpress press, so that kvpress's own evaluation can judge its plan (github.com/NVIDIA/kvpress).

    from kvcompile.integrations.kvpress import KvcompilePress

    press = KvcompilePress("a.kvb")
    pipeline("kv-press-text-generation", model=...)(context, question=question, press=press)

What a press can do is quality, not memory: tokens that a head has let go of are masked in a full cache (as kvpress's
`AdaKVPress` does), and quantised ones are replaced by what their codes stand for. As every press it acts on the prompt
alone: tokens that come later are all kept, exactly, where kvcompile's runtime keeps within the budget.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpress.presses.base_press import BasePress
from kvpress.utils import get_prerope_query_states

from kvcompile.artifacts import (
    POLICIES,
    Artifact,
    CacheError,
    ModelError,
    check_identity,
    chunk_of,
    fetch,
    identify,
)
from kvcompile.kernels import HeadClass, LayerLayout, Transform, read_back
from kvcompile.kernels.codecs import codec_of, is_quantised
from kvcompile.kernels.softmax import PLAIN
from kvcompile.runtime.fitted import fit_head
from kvcompile.runtime.layer_scorer import LayerScorer
from kvcompile.runtime.layouts import layer_layouts
from kvcompile.runtime.references import Attended, HeadReferences, reference_tokens, uses_references
from kvcompile.runtime.rotation import Rotation, layer_rotation
from kvcompile.runtime.store import kept_tokens
from kvcompile.runtime.transforms import layer_transform

SUPPORTED = ("full", "recent", "scored")

logger = logging.getLogger(__name__)


@dataclass
class KvcompilePress(BasePress):
    """Budgets, scorer and codecs of an artifact: a file, a repository on the hub, or what `read` gave.

    Raises:
        ArtifactError: a file or repository that cannot be read or fails a check.
        CacheError: heads of a policy that learns from attention, or a model with layers of linear or chunked
            attention.
    """

    artifact: str | Path | Artifact
    _layers: list[_Layer] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self._plan = self.artifact if isinstance(self.artifact, Artifact) else fetch(self.artifact)
        if any(self._plan.model.states):
            raise CacheError(
                f"a press cannot number the layers of {self._plan.model.architecture} models, as a plan is not for all "
                "of them"
            )
        if chunk_of(self._plan.model) is not None:
            raise CacheError("a press cannot end sequences with the model's first chunk: use kvcompile.runtime.attach")
        for code in self._plan.budgets.policy.flat:
            if POLICIES[code] not in SUPPORTED:
                raise CacheError(
                    f"a press cannot follow heads of policy {POLICIES[code]!r}: expected {', '.join(SUPPORTED)}"
                )

    @property
    def compression_ratio(self) -> float:
        """The share of the full cache's bytes that the artifact does without."""
        return 1 - self._plan.bytes.resident / self._plan.bytes.full

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        """kvpress's evaluation sets it on every press; the artifact's budgets stay what they are."""
        if abs(value - self.compression_ratio) > 0.005:
            logger.warning(
                "the artifact's compression ratio is %.3f and stays that, not %s", self.compression_ratio, value
            )

    def post_init_from_model(self, model: Any) -> None:
        """Raises ModelError for another model than the artifact's."""
        check_identity(self._plan.model, identify(model, self._plan.model.name))
        like = model.get_input_embeddings().weight
        order = np.tile(np.arange(self._plan.model.num_kv_heads, dtype=np.int32), (self._plan.model.num_layers, 1))
        budgets = replace(self._plan.budgets, head_order=order)  # kvpress leaves heads where they are
        layouts = layer_layouts(replace(self._plan, budgets=budgets))
        self._layers = [_Layer.of(self._plan, index, layout, like) for index, layout in enumerate(layouts)]

    def compress(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's prompt as its heads store it; what they do not is masked through `masked_key_indices`."""
        if not self._layers:
            raise ModelError("this press has seen no model: use it as `with press(model):`")
        layer = self._layers[int(module.layer_idx)]
        if layer.sliding:
            return keys, values
        references = layer.references(module, hidden_states, kwargs["position_embeddings"][0], keys, values)
        alive = layer.kept(hidden_states, references)
        module.masked_key_indices = None if bool(alive.all()) else (~alive).nonzero(as_tuple=True)
        values = layer.fitted(references, keys, values, alive)
        return layer.stored(keys, 0), layer.stored(values, 1)


_Looks = dict[tuple[int, int], tuple[HeadReferences, Attended]]
"""Reference queries and what they have attended to, by sequence and KV head."""


@dataclass(frozen=True)
class _Layer:
    """One layer's heads in the model's own order, each a class of its own."""

    heads: list[HeadClass]
    scorer: LayerScorer | None
    transform: Transform | None
    rotation: Rotation | None
    dtype: torch.dtype
    sliding: bool

    @classmethod
    def of(cls, plan: Artifact, index: int, layout: LayerLayout, like: torch.Tensor) -> _Layer:
        order = list(range(layout.num_kv_heads))
        heads = [replace(head, start=head.start + i, count=1) for head in layout.classes for i in range(head.count)]
        scored = any(head.policy == "scored" for head in heads)
        scorer = LayerScorer(plan.scorer, index, order, like) if scored and plan.scorer is not None else None
        transform = layer_transform(plan.quantiser, index, order, layout, like.device)
        rotation = layer_rotation(plan, index, like.device)
        return cls(heads, scorer, transform, rotation, getattr(torch, plan.target.dtype), layout.window > 0)

    def kept(self, hidden: torch.Tensor, references: _Looks) -> torch.Tensor:
        """Which of n tokens the heads keep, bool [B, H, n], by the attention block's input [B, n, d]."""
        scores = None if self.scorer is None else self.scorer(hidden).half().float()
        count = hidden.shape[1]
        alive = torch.zeros(len(hidden), len(self.heads), count, dtype=torch.bool, device=hidden.device)
        for b in range(len(hidden)):
            for h, head in enumerate(self.heads):
                score = scores[b, :, h] if scores is not None and head.policy == "scored" else None
                if score is not None and (b, h) in references:
                    score = references[b, h][1].scores(score)
                row = None if score is None else score[None]
                alive[b, h, kept_tokens(head, count, row, hidden.device)[0]] = True
        return alive

    def references(
        self, module: Any, hidden: torch.Tensor, cos: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> _Looks:
        """The reference queries after prompts, from the attention block's input [B, n, d], where the runtime looks at
        them (`kvcompile.runtime.references`), and their attention to keys and values [B, H, n, D]; `cos` [B, n, w] has
        what the model multiplies its rotation with at position 0."""
        count = hidden.shape[1]
        using = [h for h, head in enumerate(self.heads) if uses_references(head, count)]
        if self.rotation is None or not using:
            return {}
        group = module.config.num_attention_heads // len(self.heads)
        token = reference_tokens(torch.tensor([count], device=hidden.device), group)[0]
        queries = get_prerope_query_states(module, hidden[:, token])
        place = count + torch.arange(len(token), device=hidden.device)
        turned = self.rotation.turned(queries, place) * cos[0, 0, 0].float()
        grouped = turned.reshape(len(hidden), len(self.heads), group, *turned.shape[2:])
        scaling = float(module.scaling)
        found = {(b, h): HeadReferences(grouped[b, h], scaling, PLAIN) for b in range(len(hidden)) for h in using}
        return {at: (one, one.attended(keys[at], values[at])) for at, one in found.items()}

    def fitted(self, references: _Looks, keys: torch.Tensor, values: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """Values [B, H, n, D] with those of kept tokens fitted, where there are references."""
        new = values.clone()
        for (b, h), (own, attended) in references.items():
            at = b, h, alive[b, h]
            new[at] = fit_head(own, attended.output, keys[at], values[at]).to(new.dtype)
        return new

    def stored(self, vectors: torch.Tensor, side: int) -> torch.Tensor:
        """Keys (`side` 0) or values [B, H, n, D] as they are read back: in the cache dtype, or quantised."""
        found = vectors.to(self.dtype).to(vectors.dtype)
        for h, head in enumerate(self.heads):
            bits = (head.k_bits, head.v_bits)[side]
            if not is_quantised(bits):
                continue
            where = slice(h, h + 1)
            y = vectors[:, where]
            if self.transform is not None:
                y = (self.transform.keys, self.transform.values)[side](y, where).to(vectors.dtype)
            read = read_back(y, bits)
            if head.sink and codec_of(bits).needs_anchor:  # token 0 is kept exactly
                read[:, :, 0] = y[:, :, 0].to(self.dtype).float()
            if self.transform is not None:
                inverse, mean = (
                    (self.transform.key_inverse, self.transform.key_mean),
                    (self.transform.value_inverse, self.transform.value_mean),
                )[side]
                read = read @ inverse[where].mT + mean[where, None]
            found[:, where] = read.to(vectors.dtype)
        return found
