"""Three tensor-parallel processes answer as one does, with the artifact's own placement of heads and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")
import vllm_engines
from vllm_engines import EXACT, solved

CODE = """
import json, sys
from pathlib import Path
from vllm_engines import engine, greedy

if __name__ == "__main__":
    model, artifact, prompts = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    with engine(model, artifact, tensor_parallel_size=3, max_num_batched_tokens=256) as llm:
        print(json.dumps(greedy(llm, prompts, 16)))
"""


@pytest.mark.parametrize("placed", [True, False])
def test_three_ranks(
    smollm2: Path, text_ids: list[int], ours: Callable[..., list[int]], tmp_path: Path, placed: bool
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(CODE)
    artifact = solved(EXACT, tmp_path / "x.kvb", "--mem", "20%", *(["--tp", "3"] if placed else []))
    prompts = [text_ids[:30], text_ids[50:900]]
    environment = os.environ | {
        "PYTHONPATH": str(Path(vllm_engines.__file__).parent), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }  # fmt: skip
    command = [sys.executable, "-P", str(script), str(smollm2), str(artifact), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[[")))
    assert found == [ours(smollm2, artifact, prompt, 16) for prompt in prompts]
