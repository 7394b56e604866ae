"""Checkpoints in the formats that quantised ones have on the hub, every projection rounded to the nearest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP, CENTRE = 64, 8

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours each half byte of a number is, lowest first."""

INPUTS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Which projections read what a layer's norms give."""

Tensors = dict[str, Tensor]


def gptq(source: Path, out: Path) -> Path:
    """4 bits a weight, eight inputs in a number; the model in the folder `source` is written to `out`."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    return _written(source, out, settings, _gptq)


def awq(source: Path, out: Path) -> Path:
    """4 bits a weight, eight outputs in a number; weights are scaled by input, which the norms before them undo."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _written(source, out, settings, _awq, _scaled)


def int8(source: Path, out: Path) -> Path:
    """8 bits a weight with a scale by output, activations rounded by token: compressed-tensors' W8A8."""
    arguments = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": arguments | {"strategy": "channel", "dynamic": False},
        "input_activations": arguments | {"strategy": "token", "dynamic": True},
    }
    settings = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    return _written(source, out, settings, _int8)


def fp8(source: Path, out: Path) -> Path:
    """8-bit floats with a scale a tensor, activations alike."""
    return _written(source, out, {"quant_method": "fp8", "activation_scheme": "static"}, _fp8)


def _written(
    source: Path,
    out: Path,
    settings: dict[str, Any],
    stored: Callable[[Tensor], Tensors],
    prepared: Callable[[Tensors], Tensors] = dict,
) -> Path:
    shutil.copytree(source, out)
    found: Tensors = {}
    for name, tensor in prepared(load_file(source / "model.safetensors")).items():
        if name.endswith("_proj.weight"):
            found |= {name.removesuffix("weight") + part: t.contiguous() for part, t in stored(tensor.float()).items()}
        else:
            found[name] = tensor.bfloat16()
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": "bfloat16", "quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def _scaled(tensors: Tensors) -> Tensors:
    """The same model with each input of a projection scaled by the root of its mean weight."""
    found = dict(tensors)
    for norm, projections in INPUTS.items():
        for name in [name for name in tensors if name.endswith(f"{norm}.weight")]:
            layer = name.removesuffix(f"{norm}.weight")
            weights = [f"{layer}{projection}.weight" for projection in projections]
            scale = torch.cat([found[w].float() for w in weights]).abs().mean(0).sqrt().clamp(min=1e-3)
            found |= {w: found[w] / scale for w in weights}
            found[name] = found[name] * scale
    return found


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight [out, in]: codes int64 [in, out] about `CENTRE`, and a scale a group of inputs."""
    grouped = weight.T.unflatten(0, (-1, GROUP))  # [groups, GROUP, out]
    scales = grouped.abs().amax(1).clamp(min=1e-6) / (CENTRE - 1)
    codes = (grouped / scales[:, None]).round().add(CENTRE).clamp(0, 15).to(torch.int64)
    return codes.flatten(0, 1), scales.half()


def _gptq(weight: Tensor) -> Tensors:
    codes, scales = _codes(weight)
    shifts = 4 * torch.arange(8)
    packed = (codes.unflatten(0, (-1, 8)) << shifts[:, None]).sum(1)
    # Zero points are stored less one.
    zeros = ((CENTRE - 1) << shifts).sum().expand(len(scales), weight.shape[0] // 8)
    index = torch.arange(len(codes), dtype=torch.int32) // GROUP
    return {"qweight": _int32(packed), "scales": scales, "qzeros": _int32(zeros), "g_idx": index}


def _awq(weight: Tensor) -> Tensors:
    codes, scales = _codes(weight)
    shifts = 4 * torch.arange(8)
    packed = (codes.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)] << shifts).sum(-1)
    zeros = (CENTRE << shifts).sum().expand(len(scales), weight.shape[0] // 8)
    return {"qweight": _int32(packed), "scales": scales, "qzeros": _int32(zeros)}


def _int8(weight: Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale.bfloat16()}


def _fp8(weight: Tensor) -> Tensors:
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return {
        "weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale,
        "input_scale": torch.tensor(0.05),  # activations up to 22
    }  # fmt: skip


def _int32(numbers: Tensor) -> Tensor:
    """The lower 32 bits of int64."""
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32)
