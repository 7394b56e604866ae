"""Processes that split models by heads: `run` starts them, and each is this file as a program.

FOLDER/cases.json names pairs of a model's folder and an artifact; what a rank finds of each goes to FOLDER/RANK.pt.
Cases take turns in the modes of torch's autograd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(7)).to(model.device)
    follow_up = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(8)).to(model.device)
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
            here = position + torch.arange(1, token.shape[1] + 1, device=model.device)
            found["logits"].append(model(token, position_ids=here, past_key_values=cache).logits[:, -1])
            position = here[:, -1:]
        found["bytes at the end"] = cache.nbytes // 2
        options = {"max_new_tokens": STEPS, "attention_mask": real}
        found["chunked"] = generate(model, kv.new_cache(2), ids, prefill_chunk=CHUNK, **options)
        theirs = model.generate(ids, past_key_values=kv.new_cache(2), do_sample=False, **options)
        found["generated"] = theirs[:, LENGTH:].cpu()
        torch.manual_seed(seed)
        found["drawn"] = generate(model, kv.new_cache(2), ids, sampling=Sampling(temperature=2.0), **options)
    found["logits"] = [logits.detach().cpu() for logits in found["logits"]]
    found["restored"] = all(torch.equal(a, b) for a, b in zip(before, parts(model), strict=True))
    return found


def parts(model: Any) -> list[torch.Tensor]:
    """A copy of the weights that are here."""
    weights = model.state_dict(keep_vars=True).values()
    return [getattr(weight, "to_local", lambda weight=weight: weight)().detach().clone() for weight in weights]


def run(
    folder: Path, cases: Mapping[str, tuple[Path, Path]], backend: str, gpus: Sequence[str]
) -> list[dict[str, Any]]:
    """What each rank finds, by case: a model's folder and an artifact. The ranks talk by this backend of
    torch.distributed, and see the GPUs of `gpus`, one text a rank."""
    (folder / "cases.json").write_text(json.dumps({name: list(map(str, pair)) for name, pair in cases.items()}))
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(len(gpus)), "LOCAL_RANK": "0"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), backend], stderr=subprocess.PIPE,
            env={**settings, "RANK": str(rank), "CUDA_VISIBLE_DEVICES": seen},
        )
        for rank, seen in enumerate(gpus)
    ]  # fmt: skip
    complaints = [process.communicate(timeout=600)[1].decode() for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(complaints)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(gpus))]


def main(folder: Path, backend: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from transformers.distributed import DistributedConfig

    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    cases = json.loads((folder / "cases.json").read_text())
    for (name, (source, artifact)), mode in zip(cases.items(), cycle(MODES), strict=False):
        split = DistributedConfig(tp_size=size)
        model = AutoModelForCausalLM.from_pretrained(source, distributed_config=split).eval()
        try:
            with mode():
                found[name] = answers(model, read(artifact), seed=rank)
        except KvcompileError as error:
            found[name] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
