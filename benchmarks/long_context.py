"""Contexts longer than the profile, and texts longer than the context.

    python benchmarks/long_context.py bits --model NAME --contexts 2048,8192,32768 ARTIFACT.kvb TEXT [TEXT ...]
    python benchmarks/long_context.py past --model NAME --new 4000 ARTIFACT.kvb TEXT [TEXT ...]

`bits` stores all keys in 4 bits and nothing else, in contexts of each length: the KL that the artifact's profile
predicts and the measured one. `past` fills the artifact's context with a text, goes on with it, and prints KL to the
full cache by position. KL in nats a token.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from kvcompile.allocators.predicted import family_losses
from kvcompile.artifacts import POLICIES, Artifact, read
from kvcompile.assemble import at_context, stored_parts
from kvcompile.calibration import draw_episodes
from kvcompile.calibration.family import Family, token_ids
from kvcompile.models import load
from kvcompile.problem import pose
from kvcompile.profile.context import pack, read_context
from kvcompile.profile.simulate import divergence, reference
from kvcompile.profile.structure import frozen
from kvcompile.runtime import attach
from kvcompile.stages import Plan

SEED = 20_261
BITS = 4
CHUNK = 4096
"""Tokens that the full cache reads at once: attention within them must fit into memory."""
PIECE = 32
"""Tokens past the context that are fed at once: a few cost hardly more than one, and are stored one after another."""


def bits(args: argparse.Namespace, loaded: Any) -> Table:
    artifact = read(args.artifact)
    parts = stored_parts(artifact)
    families = [Family(path.stem, (lambda path=path: path.read_text(errors="replace"),)) for path in args.texts]
    shown = Table("tokens", "predicted, text", "measured", "predicted, questions", "measured")
    for context in map(int, args.contexts.split(",")):
        target = replace(artifact.target, context=context)
        made = at_context(parts, artifact.model, context)
        plan = quantised_keys(artifact, context)
        problem = pose(artifact.model, parts.profile, target, "recent", 4, (BITS, 16))
        *texts, questions = family_losses(problem, plan)
        measured = []
        for episode in draw_episodes(loaded.tokenizer, families, context, len(families), SEED, replay=False):
            with frozen(loaded.model), torch.no_grad():
                read_once = read_context(loaded.model, episode.context)
                known = reference(loaded.model, read_once, pack(len(read_once), episode.follow_ups))
                measured.append(divergence(loaded.model, known, plan, None, made.quantiser, context))
            print(context, episode.family, measured[-1], flush=True)
        text = np.mean([(one["continuation"] + one["quote"]) / 2 for one in measured])
        asked = np.mean([one["question"] for one in measured])
        shown.add_row(str(context), *(f"{value:.4f}" for value in (np.mean(texts), text, questions, asked)))
    return shown


def quantised_keys(artifact: Artifact, context: int) -> Plan:
    """All tokens kept, keys in 4 bits, values as they are."""
    shape = artifact.budgets.policy.shape
    sink = artifact.solver.get("sink", 4)
    return Plan(
        policy=np.full(shape, POLICIES.index("full"), np.uint8),
        capacity=np.full(shape, context, np.int32),
        sink=np.full(shape, sink, np.int32),
        recent=np.full(shape, context - sink, np.int32),
        k_bits=np.full(shape, BITS, np.uint8),
        v_bits=np.full(shape, 16, np.uint8),
        loss=float("nan"),
    )


@torch.inference_mode()
def past(args: argparse.Namespace, loaded: Any) -> Table:
    model, artifact = loaded.model, read(args.artifact)
    context = artifact.target.context
    bins = np.arange(0, args.new, args.step)
    found = np.zeros((len(args.texts), len(bins)))
    for row, path in enumerate(args.texts):
        tokens = token_ids(loaded.tokenizer, path.read_text(errors="replace"))
        ids = torch.from_numpy(tokens)[None, : context + args.new]
        if ids.shape[1] < context + args.new:
            raise SystemExit(f"{path} is too short: expected {context + args.new} tokens")
        with attach(model, artifact) as kv:  # which reorders heads: both caches are filled after it
            full, cache = DynamicCache(config=model.config), kv.new_cache()
            for start in range(0, context, CHUNK):
                model(ids[:, start : min(start + CHUNK, context)], past_key_values=full, logits_to_keep=1)
            model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
            for number, start in enumerate(bins):
                new = ids[:, context + start : min(context + start + args.step, ids.shape[1])]
                before = model(new, past_key_values=full).logits[0].float().log_softmax(-1)
                pieces = [model(piece, past_key_values=cache).logits[0] for piece in new.split(PIECE, 1)]
                after = torch.cat(pieces).float().log_softmax(-1)
                found[row, number] = (before.exp() * (before - after)).sum(-1).mean()
                print(path.stem, context + start, f"{found[row, number]:.4f}", flush=True)
    shown = Table("tokens past the context", *(path.stem for path in args.texts))
    for number, start in enumerate(bins):
        span = f"{start} to {min(start + args.step, args.new)}"
        shown.add_row(span, *(f"{value:.4f}" for value in found[:, number]))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bits", "past"])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--contexts", default="2048,8192,32768", help="tokens, parted by commas")
    parser.add_argument("--new", type=int, default=4000, help="tokens past the context")
    parser.add_argument("--step", type=int, default=500, help="tokens of one row")
    args = parser.parse_args()
    loaded = load(args.model, dtype=torch.bfloat16)
    Console(width=110).print({"bits": bits, "past": past}[args.what](args, loaded))


if __name__ == "__main__":
    main()
