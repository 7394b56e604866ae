"""What policies keep: the tokens that they are meant to."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from kvcompile.runtime import attach
from kvcompile.runtime.policies.base import Prompt
from kvcompile.runtime.policies.snapkv import SnapKV


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_h2o_keeps_what_draws_attention(llama, make_artifact) -> None:
    """The heavy slots hold the prompt tokens of largest accumulated attention, computed here by plain softmax."""
    llama.set_attn_implementation("eager")
    attention = llama(prompt(40), output_attentions=True).attentions[0][0]
    llama.set_attn_implementation("sdpa")
    drawn = attention.unflatten(0, (3, 2)).sum((1, 2))

    artifact = make_artifact(llama, 9, policy="h2o", sink=2, recent=3)
    cache = attach(llama, artifact).new_cache()
    llama(prompt(40), past_key_values=cache)
    number = cache.layers[0].store.state[0][1][0]
    for place, head in enumerate(artifact.budgets.head_order[0].tolist()):
        want = {0, 1, 37, 38, 39} | set((drawn[head, 2:37].topk(4).indices + 2).tolist())
        assert set(number[place].tolist()) == want


def test_h2o_evicts_the_least_attended_token(llama, make_artifact) -> None:
    cache = attach(llama, make_artifact(llama, 9, policy="h2o", sink=2, recent=3)).new_cache()
    llama(prompt(40), past_key_values=cache)
    for step in range(30):
        cache.layers[1].store.state[0][0].div_(8).round_()  # so that many are equal
        score, number = (t.clone() for t in cache.layers[1].store.state[0])
        llama(prompt(1, seed=step), past_key_values=cache)
        after = cache.layers[1].store.state[0][1]
        for head in range(3):
            now = 40 + step
            open_slots = [s for s in range(9) if 2 <= number[0, head, s] <= now - 3]
            victim = min(open_slots, key=lambda s, head=head: (score[0, head, s].item(), -s))
            changed = (after[0, head] != number[0, head]).nonzero().flatten().tolist()
            assert changed == [victim]
            assert after[0, head, victim] == now


def test_snapkv_keeps_what_the_last_queries_attend_to(llama, make_artifact) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 100, 8, generator=generator) * 0.1
    query = torch.randn(1, 1, 2, SnapKV.queries, 8, generator=generator)
    keys[0, 0, 50] = 4 * query[0, 0].mean((0, 1)) / query[0, 0].mean((0, 1)).norm()
    score = SnapKV().score(Prompt(keys, query, None, 1.0, None, None))
    assert score.shape == (1, 1, 100)
    assert set(score[0, 0].topk(7).indices.tolist()) == set(range(47, 54))  # the hit and its neighbours


def test_a_prompt_of_one_token_too_many_loses_the_worst(llama, make_artifact) -> None:
    """And not the oldest: of 13 tokens and 12 slots, the one that SnapKV likes least."""
    kv = attach(llama, make_artifact(llama, 12, policy="snapkv", recent=3, shuffle=False))
    cache, ids, full = kv.new_cache(), prompt(13, 5), DynamicCache(config=llama.config)
    attended: list[torch.Tensor] = []
    layer = cache.layers[0]
    prefill = layer.store.prefill

    def watch(query: torch.Tensor, keys: torch.Tensor, *rest: object) -> None:
        grouped = query.unflatten(1, (3, -1))
        attended.append(SnapKV().score(Prompt(keys, grouped, None, rest[2], None, None))[0])
        prefill(query, keys, *rest)

    layer.store.prefill = watch
    llama(ids, past_key_values=cache)
    llama(ids, past_key_values=full)
    stored = layer.store.keys.read(layer.store.layout.classes[0], 12, torch.float32)[0]
    lost = []
    for head in range(3):
        worst = 9 - int(attended[0][head, 2:10].flip(0).argmin())  # of equal ones the last: neighbours share a maximum
        kept = [t for t in range(10) if t != worst]
        torch.testing.assert_close(stored[head, :9], full.layers[0].keys[0, head, kept])
        lost.append(worst)
    assert set(lost) != {2}, "the oldest is the worst, so the test shows nothing"
