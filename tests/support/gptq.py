"""A checkpoint as GPTQ has it on the hub: 4 bits a weight of every projection, here rounded to the nearest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP, CENTRE = 64, 8


def quantise(source: Path, out: Path) -> Path:
    """Write the model in the folder `source` to `out`; its projections' sizes are multiples of `GROUP`."""
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            found |= {name.removesuffix("weight") + part: t for part, t in _packed(tensor).items()}
        else:
            found[name] = tensor.bfloat16()
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    config |= {"dtype": "bfloat16", "quantization_config": quantisation}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def _packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a weight [out, in]: codes of eight inputs in a number, a scale a group of inputs, zero points less one."""
    grouped = weight.float().T.unflatten(0, (-1, GROUP))  # [groups, GROUP, out]
    scales = grouped.abs().amax(1).clamp(min=1e-6) / (CENTRE - 1)
    codes = (grouped / scales[:, None]).round().add(CENTRE).clamp(0, 15).to(torch.int64).flatten(0, 1)
    shifts = 4 * torch.arange(8)
    packed = (codes.unflatten(0, (-1, 8)) << shifts[:, None]).sum(1)
    zeros = ((CENTRE - 1) << shifts).sum().expand(len(scales), weight.shape[0] // 8)
    return {
        "qweight": _int32(packed), "scales": scales.half(), "qzeros": _int32(zeros).contiguous(),
        "g_idx": torch.arange(len(codes), dtype=torch.int32) // GROUP,
    }  # fmt: skip


def _int32(numbers: torch.Tensor) -> torch.Tensor:
    """The lower 32 bits of int64."""
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32)
