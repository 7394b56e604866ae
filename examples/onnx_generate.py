"""Generate with a model that `kvcompile export --to onnx` has written: onnxruntime and tokenizers, nothing else.

python examples/onnx_generate.py FOLDER --prompt FILE [--max-new-tokens N] [--chunk N] [--threads N] [--raw]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

MEMORY = {1: np.float32, 2: np.uint8, 10: np.float16, 16: np.uint16}
"""By ONNX element type, a numpy type of the same size; numpy has no bfloat16 (16)."""


class Model:
    """One sequence. The cache is bound once as input and as output, so that it is written in place."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.description = json.loads((folder / "kvcompile.json").read_text(encoding="utf-8"))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        graph = folder / self.description["graph"]
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.cache_bytes = self.seen = 0
        for buffer in self.description["buffers"]:
            zeros = np.zeros(buffer["shape"], MEMORY[buffer["element_type"]])
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, buffer["element_type"])
            self.binding.bind_ortvalue_input(buffer["past"], value)
            self.binding.bind_ortvalue_output(buffer["present"], value)
            self.cache_bytes += zeros.nbytes
        logits = next(output for output in self.session.get_outputs() if output.name == "logits")
        self.logits = ort.OrtValue.ortvalue_from_numpy(np.zeros(logits.shape, np.float32))
        self.binding.bind_ortvalue_output("logits", self.logits)

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """Logits [vocabulary] after the last of some new tokens."""
        for name, numbers in (("input_ids", [tokens]), ("seen", [self.seen]), ("new", [len(tokens)])):
            self.binding.bind_cpu_input(name, np.array(numbers, np.int64))
        self.session.run_with_iobinding(self.binding)
        self.seen += len(tokens)
        return self.logits.numpy()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=0, help="tokens of the prompt a call; 0: all, as the runtime does")
    parser.add_argument("--threads", type=int, default=0, help="0: as onnxruntime likes")
    parser.add_argument("--raw", action="store_true", help="without the model's chat template")
    options = parser.parse_args()

    model = Model(options.folder, options.threads)
    if model.description["batch"] != 1:
        sys.exit(f"this example has one sequence, and the graph is for {model.description['batch']}")
    tokenizer = Tokenizer.from_file(str(options.folder / model.description["tokenizer"]))
    text, chat = options.prompt.read_text(encoding="utf-8"), model.description["chat"]
    if chat and not options.raw:
        text = chat["before"] + text.rstrip("\r\n") + chat["after"]
    ids = tokenizer.encode(text, add_special_tokens=options.raw or not chat).ids

    start = time.perf_counter()
    step = options.chunk or len(ids)
    for first in range(0, len(ids), step):
        logits = model(ids[first : first + step])
    begin = time.perf_counter()
    new: list[int] = []
    shown = ""
    while len(new) < options.max_new_tokens:
        new.append(int(logits.argmax()))
        if new[-1] in model.description["ends"]:
            break
        text = tokenizer.decode(new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the rest of a character is still to come
            print(text[len(shown) :], end="", flush=True)
            shown = text
        if len(new) < options.max_new_tokens:
            logits = model(new[-1:])
    end = time.perf_counter()
    print(
        f"\n{len(ids)} prompt tokens in {begin - start:.1f} s, {len(new)} new ones at "
        f"{(len(new) - 1) / max(end - begin, 1e-9):.1f} a second\ncache: {model.cache_bytes} bytes, the artifact "
        f"promises {model.description['cache_bytes']}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
