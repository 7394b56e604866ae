"""Shared prefixes: the state at the end of one is kept, and forked by the requests that begin with the same tokens.

A request says with `extra_args` (`vllm_xargs` over HTTP) how much of its prompt others share: with
`{"kvcompile_keep": 1200}` it is the first 1,200 tokens, with -1 all of them. These are read and cut to the budget, the
state is kept, and the rest of the prompt is read on top of it: the same whether the state has been kept before or not.
Any later request whose prompt begins with exactly these tokens starts from the state and reads the rest alone, but one
that names another number of tokens.

In vLLM this is a KV connector: `--kv-transfer-config` as `kvcompile serve --prefixes N` writes it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvcompile.integrations.vllm.batch import Mark

KEEP = "kvcompile_keep"


@dataclass
class Loads(KVConnectorMetadata):  # what the scheduler tells the workers for one step
    """`loads`: a kept state, the block it goes to, and its tokens; `marks`: by block, the prefix that is shared."""

    loads: list[tuple[int, int, int]] = field(default_factory=list)
    marks: dict[int, Mark] = field(default_factory=dict)


class States:
    """Which prefixes are kept, in `count` places; the one that has not been used for longest makes room."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: OrderedDict[tuple[int, ...], int] = OrderedDict()

    def longest(self, tokens: list[int], shared: int = 0) -> tuple[int, int] | None:
        """The longest kept prefix of a prompt that leaves a token to be read: its place, and its tokens. Of `shared`
        tokens alone, where it says that it shares so many: what is kept of it is then always the same."""
        lengths = {shared} if 0 < shared < len(tokens) else {len(p) for p in self._kept if len(p) < len(tokens)}
        for length in sorted(lengths, reverse=True):
            prefix = tuple(tokens[:length])
            if prefix in self._kept:
                self._kept.move_to_end(prefix)
                return self._kept[prefix], length
        return None

    def place(self, prefix: list[int]) -> int:
        """Where the state of this prefix is to be kept."""
        key = tuple(prefix)
        if key not in self._kept:
            used = set(self._kept.values())
            free = next((i for i in range(self.count) if i not in used), None)
            self._kept[key] = self._kept.popitem(last=False)[1] if free is None else free
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        self._kept.clear()


class KVCompileConnector(KVConnectorBase_V1, SupportsHMA):
    """Both ends: the scheduler's, which knows prompts, and the workers', which know pages."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        count = int(self._kv_transfer_config.get_from_extra_config("prefixes", 8))
        self._states = States(count)
        self._requests: dict[str, Any] = {}
        self._blocks: dict[str, int] = {}
        self._found: dict[str, tuple[int, int]] = {}
        self._loads: list[tuple[int, int, int]] = []

    # The scheduler's end.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens of the longest kept prefix that the request may start from."""
        self._requests[request.request_id] = request
        tokens = list(request.prompt_token_ids or [])
        found = None if _embedded(request) else self._states.longest(tokens, shared_tokens(request))
        self._found.pop(request.request_id, None)
        if found is None or num_computed_tokens:
            return 0, False
        self._found[request.request_id] = found
        return found[1], False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has its block now."""
        block = blocks.get_block_ids()[0][0]
        self._blocks[request.request_id] = block
        found = self._found.pop(request.request_id, None)
        if found is not None and num_external_tokens:
            self._loads.append((found[0], block, found[1]))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What the workers have to load, and which prefixes end in this step."""
        meta = Loads(self._loads)
        self._loads = []
        ending: dict[int, int] = {}  # by place, the block whose state is to be kept there
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self._requests.get(name)
            if request is None or name not in self._blocks or not (shared := shared_tokens(request)):
                continue
            before = _computed(scheduler_output, name)
            if before is None or before >= shared:
                continue
            ends = before + count >= shared and count > 1
            # What was answered before a preemption, read again in this step, would be in the page as well.
            ends = ends and (shared < request.num_prompt_tokens or before + count == shared)
            block, keep = self._blocks[name], self._states.place(request.prompt_token_ids[:shared]) if ends else -1
            if keep in ending:
                # Of more prefixes that end in a step than there are places, the last keep theirs.
                meta.marks[ending[keep]] = meta.marks[ending[keep]]._replace(keep=-1)
            if ends:
                ending[keep] = block
            meta.marks[block] = Mark(shared, keep)
        return meta

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        for table in (self._requests, self._blocks, self._found):
            table.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def reset_cache(self) -> bool:
        self._states.clear()
        return True

    # The workers' end.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from kvcompile.integrations.vllm.layer import layers_of

        layers = layers_of(self._vllm_config.compilation_config.static_forward_context)
        served, self._pool = layers[0].served, layers[0].kv_cache.flatten(1)
        shape = self._states.count, served.page.nbytes
        self._kept = torch.empty(shape, dtype=torch.int8, pin_memory=self._pool.is_cuda)
        served.states, self._waiting = self._kept, served.waiting

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before every step; `start_load_kv` comes before it only where something has to be loaded."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Loads)
        self._waiting.marks = connector_metadata.marks

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Put kept states into the pages of the requests that begin with them."""
        meta = self._get_connector_metadata()
        assert isinstance(meta, Loads)
        for place, block, tokens in meta.loads:
            self._pool[block].copy_(self._kept[place])
            self._waiting.load(block, tokens)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is under way: states are put into their pages before the first layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do: a layer keeps its part of a state itself, between two pieces of a prompt."""

    def wait_for_save(self) -> None:
        """Nothing is under way."""


def shared_tokens(request: Any) -> int:
    """How many tokens of a request's prompt others share, as it says; 0: none."""
    if _embedded(request):
        return 0
    asked = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(KEEP, 0)
    try:
        count = int(asked)
    except (TypeError, ValueError, OverflowError):  # JSON has 1e999
        return 0
    return int(request.num_prompt_tokens if count < 0 else min(count, request.num_prompt_tokens))


def _embedded(request: Any) -> bool:
    """Whether a prompt has embeddings, which its tokens do not tell apart."""
    return request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None


def _computed(scheduler_output: Any, name: str) -> int | None:
    """Tokens of a request that were there before this step."""
    for new in scheduler_output.scheduled_new_reqs:
        if new.req_id == name:
            return int(new.num_computed_tokens)
    cached = scheduler_output.scheduled_cached_reqs
    return int(cached.num_computed_tokens[cached.req_ids.index(name)]) if name in cached.req_ids else None
