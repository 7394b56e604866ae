"""Our runtime's loss over a continuation, for a process in an environment that the runtime does not run in.

python continuation_loss.py MODEL_FOLDER ARTIFACT IDS.json CONTEXT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from kvcompile.runtime import attach


@torch.inference_mode()
def main() -> None:
    folder, artifact, ids_file, context = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, split = torch.tensor([json.loads(Path(ids_file).read_text())]), int(context)
    with attach(model, artifact) as kv:
        cache = kv.new_cache()
        model(ids[:, :split], past_key_values=cache, logits_to_keep=1)
        logits = model(ids[:, split:], past_key_values=cache).logits
    print(json.dumps(float(cross_entropy(logits[0, :-1], ids[0, split + 1 :]))))


if __name__ == "__main__":
    main()
