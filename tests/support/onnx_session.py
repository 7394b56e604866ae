"""An exported folder in ONNX Runtime, with the cache in reach."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvcompile.artifacts import Artifact

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "uint8": np.uint8}


class Tokenizer:
    """What `export` needs of one."""

    chat_template = None
    eos_token_id = 2
    backend_tokenizer = SimpleNamespace(save=lambda path: Path(path).write_text("{}"))


def exported(model: Any, artifact: Artifact, folder: Path) -> Path:
    from kvcompile.export.onnx import export

    export(artifact, model, Tokenizer(), folder)
    return folder


class Session:
    """An exported folder in ONNX Runtime, its cache bound in place; or, where not `bound`, handed in and out."""

    def __init__(self, folder: Path, bound: bool = True) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.description = json.loads((folder / "kvcompile.json").read_text())
        self.bound, self.seen = bound, np.zeros(self.description["batch"], np.int64)
        self.arrays = {b["past"]: np.zeros(b["shape"], NUMPY[b["dtype"]]) for b in self.description["buffers"]}
        self.types = {b["past"]: b["element_type"] for b in self.description["buffers"]}
        self.presents = {b["past"]: b["present"] for b in self.description["buffers"]}

    def __call__(self, ids: np.ndarray, new: Sequence[int] | None = None) -> np.ndarray:
        count = np.array([ids.shape[1]] * len(ids) if new is None else new, np.int64)
        feeds = {"input_ids": ids.astype(np.int64), "seen": self.seen, "new": count}
        self.seen = self.seen + count
        if not self.bound:
            names = ["logits", *self.presents.values()]
            logits, *presents = self.session.run(names, feeds | self.arrays)
            self.arrays = dict(zip(self.presents, presents, strict=True))
            return logits
        import onnxruntime as ort

        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for past, array in self.arrays.items():
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, self.types[past])
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(self.presents[past], value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    def fill(self, cache: Any, artifact: Artifact) -> None:
        """Put what a runtime's cache holds into the buffers."""
        from kvcompile.export.onnx.groups import layer_groups

        for store, groups in zip((layer.store for layer in cache.layers), layer_groups(artifact), strict=True):
            for group, cls in zip(groups, store.layout.classes, strict=True):
                for side, stored in zip(group.sides(), (store.keys, store.values), strict=True):
                    for buffer, view in zip(side.buffers(), stored.views(cls), strict=True):
                        self.arrays[buffer.past][...] = _bits(view)
                    if side.anchor is not None:
                        order = _order(side.bits, artifact.model.head_dim)
                        self.arrays[side.anchor.past][:, :, 0] = _bits(stored.anchor(cls)[..., order])
                if group.scores is not None:
                    self.arrays[group.scores.past][...] = _bits(store.state[store.layout.classes.index(cls)][0])


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _order(bits: int, head_dim: int) -> list[int]:
    """The order in which the graph has the elements of transformed vectors."""
    from kvcompile.kernels.codecs import codec_of, is_quantised

    return codec_of(bits).load("onnx").order(head_dim).tolist() if is_quantised(bits) else list(range(head_dim))
