"""Build an artifact from Python, answer a prompt inside its budget, and ask a second question on the same cache.

python examples/two_turns.py [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from kvcompile import build
from kvcompile.models import load
from kvcompile.runtime import attach

TEXT = Path(__file__).parent.parent / "README.md"
QUESTIONS = ("In one sentence: what is kvcompile?", "Which command checks an artifact?")


def main() -> None:
    loaded = load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    model, tokenizer = loaded.model, loaded.tokenizer
    artifact = build(model, tokenizer, mem="50%", context=4096, name=loaded.name)
    with attach(model, artifact) as kv, torch.inference_mode():
        cache = kv.new_cache()
        print(f"cache: {cache.nbytes} bytes of {artifact.bytes.full} for the full one")
        text = TEXT.read_text(encoding="utf-8")
        so_far = torch.zeros(1, 0, dtype=torch.int64)
        for question in QUESTIONS:
            turn = f"{text}\n\nQuestion: {question}\nAnswer:"
            new = tokenizer(turn, return_tensors="pt").input_ids
            ids = torch.cat([so_far, new], dim=1)
            # `generate` feeds the model only those tokens that the cache has not seen yet.
            so_far = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=40, do_sample=False
            )
            print(f"\n{question}\n{tokenizer.decode(so_far[0, ids.shape[1] :], skip_special_tokens=True).strip()}")
            text = ""


if __name__ == "__main__":
    main()
