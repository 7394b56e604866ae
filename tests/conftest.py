"""Settings for every test."""

from __future__ import annotations

import sys
from pathlib import Path

# With the repository's root on the path, our folder `kernels` hides the Hugging Face package of that name, which
# transformers imports where it is installed; and the tests are to see the installed kvcompile.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import torch  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))
