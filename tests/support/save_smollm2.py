"""SmolLM2-135M in float32 as a folder that any transformers loads.

python save_smollm2.py FOLDER
"""

from __future__ import annotations

import sys

import torch

from kvcompile.models import load

loaded = load("smollm2-135m", dtype=torch.float32, device="cpu")
loaded.model.save_pretrained(sys.argv[1])
loaded.tokenizer.save_pretrained(sys.argv[1])
