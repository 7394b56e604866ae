"""One rank of a tensor-parallel model: `python tensor_parallel_rank.py FOLDER`, with RANK and WORLD_SIZE set.

FOLDER/cases.json names pairs of a model's folder and an artifact; what the rank finds of each goes to FOLDER/RANK.pt.
They take turns in the modes of torch's autograd."""

from __future__ import annotations

import json
import os
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kvcompile.artifacts import KvcompileError, read
from kvcompile.runtime import Sampling, attach, generate

LENGTH, STEPS, CHUNK = 40, 6, 16
MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)


def answers(model: Any, artifact: Any, seed: int = 0) -> dict[str, Any]:
    """What a model says inside an artifact's budget, where both heads and batches have something to go wrong in: two
    prompts of unequal length, steps, a follow-up and steps again, then chunks and draws."""
    found: dict[str, Any] = {}
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    follow_up = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(8))
    real = torch.ones_like(ids)
    real[1, :9] = 0
    before = parts(model)
    with attach(model, artifact) as kv:
        cache = kv.new_cache(2)
        found["bytes"] = cache.nbytes // 2
        position = (real.cumsum(1) - 1).clamp(min=0)
        found["logits"] = [model(ids, attention_mask=real, position_ids=position, past_key_values=cache).logits[:, -1]]
        position = position[:, -1:]
        for fed in [None] * STEPS + [follow_up] + [None] * STEPS:
            token = found["logits"][-1].argmax(-1, keepdim=True) if fed is None else fed
            here = position + torch.arange(1, token.shape[1] + 1)
            found["logits"].append(model(token, position_ids=here, past_key_values=cache).logits[:, -1])
            position = here[:, -1:]
        found["bytes at the end"] = cache.nbytes // 2
        options = {"max_new_tokens": STEPS, "attention_mask": real}
        found["chunked"] = generate(model, kv.new_cache(2), ids, prefill_chunk=CHUNK, **options)
        torch.manual_seed(seed)
        found["drawn"] = generate(model, kv.new_cache(2), ids, sampling=Sampling(temperature=2.0), **options)
    found["logits"] = [logits.detach() for logits in found["logits"]]
    found["restored"] = all(torch.equal(a, b) for a, b in zip(before, parts(model), strict=True))
    return found


def parts(model: Any) -> list[torch.Tensor]:
    """A copy of the weights that are here."""
    weights = model.state_dict(keep_vars=True).values()
    return [getattr(weight, "to_local", lambda weight=weight: weight)().detach().clone() for weight in weights]


def main(folder: Path) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from transformers.distributed import DistributedConfig

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    cases = json.loads((folder / "cases.json").read_text())
    for (name, case), mode in zip(cases.items(), cycle(MODES), strict=False):
        split = DistributedConfig(tp_size=size)
        model = AutoModelForCausalLM.from_pretrained(case["model"], distributed_config=split).eval()
        try:
            with mode():
                found[name] = answers(model, read(case["artifact"]), seed=rank)
        except KvcompileError as error:
            found[name] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
