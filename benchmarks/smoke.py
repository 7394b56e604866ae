"""Small checks of the real operations on a GPU, each against its reference: they say in a minute what works.

    python benchmarks/smoke.py [--skip recorded] [--only "3 bits"]

On a machine without a GPU the same is checked on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial

import torch

from kvcompile.artifacts import identify
from kvcompile.bench.subjects import ragged_plan
from kvcompile.kernels import Buffers, HeadSpec, LayerLayout, append, compact, new_token, ragged_decode
from kvcompile.kernels.append import reference as append_reference
from kvcompile.kernels.codecs import names
from kvcompile.kernels.compact import reference as compact_reference
from kvcompile.kernels.new_token import dense as new_token_dense
from kvcompile.kernels.new_token.parts import LinearScorer
from kvcompile.kernels.ragged_decode import reference as decode_reference

DIM = 128
INT2, INT3, MIX1, MIX2, MIX3 = (names()[name] for name in ("int2", "int3", "mix1", "mix2", "mix3"))
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
BITS = {"16": [(16, 16)], "8": [(8, 8)], "4": [(4, 4)], "mixed": [(16, 16), (8, 4), (4, 16), (4, 8)],
        "fewer": [(MIX3, INT3), (MIX2, INT2), (MIX1, INT2), (4, INT3)]}  # fmt: skip
SEEN = [3000, 37]
"""Tokens of two sequences: more than any head keeps, and fewer than most do."""


def layout(widths: str) -> LayerLayout:
    """Four ragged heads, of which the first is long enough for several programs."""
    pairs = [BITS[widths][i % len(BITS[widths])] for i in range(4)]
    shapes = [("scored", 1500, 4, 64), ("scored", 131, 4, 27), ("recent", 9, 0, 9), ("snapkv", 70, 1, 8)]
    return LayerLayout.from_heads([HeadSpec(*shape, *pair) for shape, pair in zip(shapes, pairs, strict=True)])


def sides(of: LayerLayout, dtype: torch.dtype, device: torch.device, batch: int = 2) -> list[Buffers]:
    """Keys and values, every slot with a random vector as its codec stores it."""
    found = []
    for name in ("k_bits", "v_bits"):
        stored = Buffers(of, [getattr(c, name) for c in of.classes], DIM, dtype, device, batch)
        for cls in of.classes:
            slot = torch.arange(cls.capacity, device=device).expand(batch, cls.count, -1)
            new = torch.randn(batch, cls.count, cls.capacity, DIM, device=device).to(dtype)
            stored.write(cls, new, slot, slot[:, :, :0], slot[:, :, :0])
            stored.write_anchor(cls, new, slot)
        found.append(stored)
    return found


def on_cpu(stored: Buffers) -> Buffers:
    """A copy for the reference."""
    copied = copy.copy(stored)
    copied.exact, copied.anchors = stored.exact.cpu().clone(), stored.anchors.cpu().clone()
    copied.codes, copied.scales = stored.codes.cpu().clone(), stored.scales.cpu().clone()
    return copied


def attention(widths: str, group: int, length: int = 1) -> Callable[[torch.device], str]:
    """Attention in bfloat16 over a store of these widths, of `length` new tokens with padding among them if several."""

    def check(device: torch.device) -> str:
        torch.manual_seed(group)
        of, dtype = layout(widths), torch.bfloat16
        keys, values = sides(of, dtype, device)

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(2, heads, length, DIM, device=device).to(dtype)

        query, new = draw(4 * group), {}
        if length > 1:
            mask = torch.ones(length, length, dtype=torch.bool, device=device).tril().repeat(2, 1, 1, 1)
            mask[1, :, :, :2] = False
            mask[1, :, :2, :2] = torch.eye(2, dtype=torch.bool, device=device)  # no row without a token
            new = {"new_keys": draw(4), "new_values": draw(4), "new_mask": mask}
        seen = torch.tensor(SEEN, dtype=torch.int32, device=device)
        out = ragged_decode(query, keys, values, of, seen, scaling=DIM**-0.5, **new)
        expected = decode_reference.ragged_decode(
            query.cpu(), on_cpu(keys), on_cpu(values), of, SEEN, scaling=DIM**-0.5,
            **{name: tensor.cpu() for name, tensor in new.items()},
        )  # fmt: skip
        return near(out, expected, TOLERANCE[dtype])

    return check


def appending(device: torch.device, widths: str = "mixed") -> str:
    """Six tokens into stores that are full or not, beside the reference."""
    torch.manual_seed(0)
    of, dtype = layout(widths), torch.float16
    ours, seen = sides(of, dtype, device), torch.tensor([200, 5], dtype=torch.int32, device=device)
    theirs = [on_cpu(side) for side in ours]
    scores = torch.randint(-3, 3, (2, of.scored_slots), device=device).half()  # with ties
    other = scores.cpu().clone()
    for step in range(6):
        new = [torch.randn(2, 4, DIM, device=device).to(dtype) for _ in range(2)]
        score = torch.randint(-3, 3, (2, 4), device=device).float()
        append(*ours, scores, of, *new, score, seen + step)
        append_reference.append(*theirs, other, of, *(n.cpu() for n in new), score.cpu(), (seen + step).cpu())
    assert torch.equal(scores.cpu(), other), "scores differ"
    return same_store(ours, theirs, 0.02)


def storing(device: torch.device) -> str:
    """A new token from its projections to the store, beside torch."""
    torch.manual_seed(0)
    of, dtype, group, size = layout("mixed"), torch.float16, 7, 96
    ours = sides(of, dtype, device)
    theirs = copy.deepcopy(ours)
    scores = torch.randn(2, of.scored_slots, device=device).half()
    other = scores.clone()
    qkv = torch.randn(2, 4 * (group + 2) * DIM, device=device).to(dtype)
    angle = torch.randn(2, DIM // 2, device=device).repeat(1, 2)
    rotary = angle.cos().to(dtype), angle.sin().to(dtype)
    looks = {
        "hidden": torch.randn(2, size, device=device).to(dtype),
        "scorer": LinearScorer(torch.randn(4, size, device=device), torch.randn(4, device=device)),
    }
    seen = torch.tensor(SEEN, dtype=torch.int32, device=device)
    found = new_token(qkv, *rotary, *ours, scores, of, seen, **looks)
    expected = new_token_dense.new_token(qkv, *rotary, *theirs, other, of, seen, None, None, *looks.values())
    torch.testing.assert_close(scores, other, atol=2e-2, rtol=1e-2)
    error = near(found, expected.cpu().double(), TOLERANCE[dtype])
    return f"{error}, {same_store(ours, [on_cpu(side) for side in theirs], 0.02)}"


def compacting(device: torch.device, widths: str = "mixed") -> str:
    """Two prompts of 300 tokens, cut in one call: rows as the reference writes them."""
    torch.manual_seed(0)
    of, dtype = layout(widths), torch.float16
    ours = sides(of, dtype, device)
    theirs = [on_cpu(side) for side in ours]
    prompt = [torch.randn(2, 4, 300, DIM, device=device).to(dtype) for _ in range(2)]
    tokens = [torch.rand(2, c.count, 300).argsort(2)[:, :, : c.capacity].sort().values for c in of.classes]
    seen = torch.tensor([300, 300], dtype=torch.int32)
    compact(*ours, of, *prompt, [t.to(device) for t in tokens], seen.to(device))
    compact_reference.compact(*theirs, of, *(side.cpu() for side in prompt), tokens, seen, None)
    return same_store(ours, theirs, 0.02)


def recorded(device: torch.device) -> str:
    """A tiny model's decode loop, recorded as a graph on a GPU, beside the same steps done one by one, and a step's
    logits beside the model's own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvcompile.runtime import Decoder, attach
    from kvcompile.runtime.fused import FusedStep

    torch.manual_seed(0)
    # With weights twice as large, the last bits of norms move logits by 3 to 9 % after three layers.
    config = LlamaConfig(
        vocab_size=199, hidden_size=224, intermediate_size=128, num_hidden_layers=3, num_attention_heads=14,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).eval()
    plan = ragged_plan(identify(model, "tiny"), 600, 2, 0.5, "bfloat16", "mixed")
    prompts, length = torch.randint(0, 199, (2, 500), device=device), 40
    with attach(model, plan) as kv, torch.inference_mode():
        decoder = Decoder(model, kv.new_cache(2))
        replayed = [decoder.prefill(prompts), *(decoder.step().clone() for _ in range(length))]
        if device.type == "cuda":
            assert decoder.recorded, "the loop has not recorded its step"
        plain = Decoder(model, kv.new_cache(2))
        plain._records = False
        called = [plain.prefill(prompts), *(plain.step().clone() for _ in range(length))]
        caches = [kv.new_cache(2) for _ in range(2)]
        for cache in caches:
            model(prompts, past_key_values=cache, logits_to_keep=1)
        position = torch.full((2, 1), 500, device=device)
        logits = model(called[0][:, None], position_ids=position, past_key_values=caches[0]).logits[:, -1]
        ours = FusedStep(model)(called[0][:, None], position, caches[1])
        error = float((ours - logits).float().abs().max() / logits.float().abs().max())
        assert error < 0.05, f"logits of a step differ by {error:.1%} of the largest"
    equal = [torch.equal(a, b) for a, b in zip(replayed, called, strict=True)]
    assert all(equal), f"token {equal.index(False)} differs"
    different = len({int(token) for step in called for token in step})
    assert different > 8, f"{different} different tokens show nothing"
    return f"{length} tokens equal, logits within {error:.1%}"


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    found = found.cpu().double()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    return f"largest error {float((found - expected).abs().max()):.1e}"


def same_store(ours: list[Buffers], theirs: list[Buffers], most: float) -> str:
    """All tensors equal, but for a share of at most `most`: sums in another order may round to the other side of a
    code's edge, or to a scale's neighbour."""
    pairs = [
        pair for one, two in zip(ours, theirs, strict=True) for pair in zip(one.tensors(), two.tensors(), strict=True)
    ]
    shares = [float((a.cpu() != b).float().mean()) for a, b in pairs]
    assert max(shares) <= most, f"{max(shares):.2%} of a tensor's elements differ"
    return f"{max(shares):.2%} differ"


CHECKS: list[tuple[str, Callable[[torch.device], str]]] = [
    ("attention, 16 bits, groups of 7", attention("16", 7)),
    ("attention, mixed bits, groups of 7", attention("mixed", 7)),
    ("append", appending),
    ("new_token", storing),
    ("compact", compacting),
    ("attention, 4 bits, groups of 7", attention("4", 7)),
    ("attention, 8 bits, groups of 7", attention("8", 7)),
    ("attention, 16 bits, groups of 5", attention("16", 5)),
    ("attention, mixed bits, groups of 5", attention("mixed", 5)),
    ("attention, new tokens with padding", attention("mixed", 7, 3)),
    ("attention, 3 bits and fewer, groups of 7", attention("fewer", 7)),
    ("attention, 3 bits and fewer, new tokens", attention("fewer", 5, 3)),
    ("append, 3 bits and fewer", partial(appending, widths="fewer")),
    ("compact, 3 bits and fewer", partial(compacting, widths="fewer")),
    ("decode loop, recorded", recorded),
]
"""First one of every kernel, for a run that is cut."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", default="nothing", help="leave out the checks with this word in their name")
    parser.add_argument("--only", default="", help="do no others than those with this in their name")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = 0
    for name, check in CHECKS:
        if args.skip in name or args.only not in name:
            continue
        try:
            print(f"{name}: {check(device)}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
