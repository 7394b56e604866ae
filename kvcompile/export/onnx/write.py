"""A model with its budgeted cache as a folder: the graph, its weights, the tokenizer, and what every input is."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import torch
from onnx import TensorProto

from kvcompile.artifacts import Artifact, ExchangeError, check_identity, identify
from kvcompile.export.onnx.builder import DTYPES, Builder, Root
from kvcompile.export.onnx.groups import Group, layer_groups
from kvcompile.export.onnx.model import LOGITS, NEW, SEEN, TOKENS, decoder_graph
from kvcompile.export.onnx.parts import decoder
from kvcompile.models import ending_tokens

GRAPH, WEIGHTS, DESCRIPTION, TOKENIZER = "model.onnx", "model.onnx.data", "kvcompile.json", "tokenizer.json"

ALIGNMENT = 4096
"""Of every tensor in the file of weights, so that it can be mapped into memory."""

PLACEHOLDER = "PROMPT"
"""Stands for the prompt while the chat template is written out."""


@dataclass(frozen=True)
class Exported:
    """Sizes in bytes: `cache` of all buffers, which is what the artifact promises, and `weights`; `nodes` of the graph
    and its branches."""

    cache: int
    weights: int
    nodes: int


@torch.no_grad()
def export(artifact: Artifact, model: Any, tokenizer: Any, out: Path) -> Exported:
    """Write the files into the folder `out`, which is made where it is missing; all of them or none.

    `model` is a transformers causal LM, whose weights are written in float32, and `tokenizer` its own.

    Raises:
        ExchangeError: heads of a policy that has no words in standard operators, or a folder that cannot be written.
        ModelError: another model than the artifact's, or one of an unknown kind.
    """
    check_identity(artifact.model, identify(model, artifact.model.name))
    builder = Builder()
    graph = decoder_graph(builder, decoder(model, artifact), artifact)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ExchangeError(f"{out} cannot be written: {error.strerror or error}") from None
    try:
        with open(folder / WEIGHTS, "wb") as file:
            _write_weights(builder.root, graph, file)
        onnx.save(graph, folder / GRAPH)
        onnx.checker.check_model(folder / GRAPH, full_check=True)
        tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
        described = description(artifact, model, tokenizer)
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        weights = (folder / WEIGHTS).stat().st_size
        for name in (WEIGHTS, GRAPH, TOKENIZER, DESCRIPTION):
            os.replace(folder / name, out / name)
    except OSError as error:
        raise ExchangeError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Exported(described["cache_bytes"], weights, _count(graph.graph))


def _write_weights(root: Root, model: onnx.ModelProto, file: BinaryIO) -> None:
    """Write one weight after another, so that no more than one is held, and tell the graph where each is."""
    for name, make in root.weights.items():
        data = make().detach().to("cpu", torch.float32).contiguous()
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=list(data.shape))
        proto.data_location = TensorProto.EXTERNAL
        places = {"location": WEIGHTS, "offset": str(file.tell()), "length": str(data.numel() * 4)}
        for key, entry in places.items():
            proto.external_data.add(key=key, value=entry)
        file.write(data.numpy().astype("<f4", copy=False).tobytes())
        model.graph.initializer.append(proto)


def description(artifact: Artifact, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What a program has to know to run the graph, as JSON."""
    target, orders, layers = artifact.target, artifact.budgets.head_order.tolist(), layer_groups(artifact)
    buffers = [
        {
            "past": buffer.past, "present": buffer.present, "dtype": buffer.dtype,
            "element_type": int(DTYPES[buffer.dtype]), "shape": list(buffer.shape), "layer": layer, "group": i,
        }
        for layer, groups in enumerate(layers) for i, group in enumerate(groups)
        for buffer in group.buffers()
    ]  # fmt: skip
    return {
        "format": "kvcompile-onnx", "version": 1, "graph": GRAPH, "weights": WEIGHTS, "tokenizer": TOKENIZER,
        "model": {key: value for key, value in asdict(artifact.model).items() if key != "samples"},
        "context": target.context, "batch": target.batch, "cache_bytes": artifact.bytes.resident,
        "inputs": {
            TOKENS: "int64 [batch, T]: new tokens of every sequence, from the left; the rest of a row is ignored",
            SEEN: "int64 [batch]: how many tokens of the sequence the cache has been given before this call",
            NEW: "int64 [batch]: how many of this call's are real; with T = 1 and all 1 the cheap branch runs",
            "past.*": "the cache: zeros before the first call, then what the call before has written",
        },
        "outputs": {
            LOGITS: "float32 [batch, vocabulary]: after the last real token of every sequence",
            "present.*": "the cache after this call; may be bound to the memory of past.*",
        },
        "layers": [[_group(group, orders[layer]) for group in groups] for layer, groups in enumerate(layers)],
        "buffers": buffers,
        "ends": sorted(ending_tokens(model, tokenizer)),
        "chat": _chat(tokenizer),
    }  # fmt: skip


def _group(group: Group, order: list[int]) -> dict[str, Any]:
    names = ("policy", "capacity", "sink", "recent")
    return {
        "heads": order[group.start : group.start + group.count], **{name: getattr(group, name) for name in names},
        "key_bits": group.keys.bits, "value_bits": group.values.bits,
    }  # fmt: skip


def _chat(tokenizer: Any) -> dict[str, str] | None:
    """What stands before and after a prompt in the model's chat template, None where it has none."""
    if not tokenizer.chat_template:
        return None
    message = [{"role": "user", "content": PLACEHOLDER}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = text.rpartition(PLACEHOLDER)
    return {"before": before, "after": after}


def _count(graph: onnx.GraphProto) -> int:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return len(graph.node) + sum(_count(branch) for branch in inner)
