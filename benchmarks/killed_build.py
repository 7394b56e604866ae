"""A build that is killed at random moments, and what it writes when it comes to its end.

    python benchmarks/killed_build.py [--kills 20] [--seed 0] [--streamed]

A tiny model with random weights is profiled and compiled. Moments are drawn from the whole run of a build that is left
alone: while it loads and draws its text, in its profile, while it solves and writes. A build is ended by SIGKILL where
it has come as far as the first of them, the next one goes on from what is on disk until the second, and so on. What the
last one writes is compared, byte for byte, with the first one's. Builds are forks of this process, which has imported
what they need.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompile.bench.building import byte_tokenizer
from kvcompile.cli import build, main
from kvcompile.profile import job, resume
from kvcompile.profile.measure import STATES

BUILD = [str(build.command.name), "--mem", "30%", "--context", "192"]


@dataclass(frozen=True)
class Builds:
    """Builds of the model in `folder`, `streamed` or held whole, with their cache folder there."""

    folder: Path
    streamed: bool

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def start(self, out: Path) -> int:
        """The number of a process that builds to `out`."""
        if number := os.fork():
            return number
        os.environ["KVCOMPILE_CACHE"] = str(self.cache)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        job.SAVE_EVERY = 0.01
        memory = ["--profile-memory", "1MB"] if self.streamed else []
        sys.argv = ["kvcompile", *BUILD, "--model", str(self.folder / "model"), *memory, "--out", str(out)]
        try:
            main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    def saved(self) -> int:
        """Items of the profile that are on disk."""
        files = self.cache.glob(f"profiles/*/{resume.FILE}")
        return max((int(np.load(file)["items"]) for file in files), default=0)

    def whole(self, out: Path) -> float:
        """Seconds of a build that is left alone."""
        start, number = time.perf_counter(), self.start(out)
        check(os.waitpid(number, 0)[1])
        return time.perf_counter() - start

    def killed(self, out: Path, items: int, seconds: float) -> bool:
        """Whether a build was killed so many seconds after it had saved so many items; else it had ended before."""
        number, stop = self.start(out), float("inf")
        while time.perf_counter() < stop:
            if stop == float("inf") and self.saved() >= items:
                stop = time.perf_counter() + seconds
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                check(status)
                return False
            time.sleep(0.002)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        return True


def check(status: int) -> None:
    if status:
        raise SystemExit("a build failed that nobody had killed")


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def compare(builds: Builds, kills: int, draw: random.Random) -> None:
    """Kill a build so often, and compare what it writes at last with what one that was left alone has written."""
    wanted, out = builds.folder / "whole.kvb", builds.folder / "killed.kvb"
    first = builds.whole(wanted)
    total, again = builds.saved(), builds.whole(out)
    print(f"left alone {first:.1f} s, with a profile from before {again:.1f} s, {total} items")
    shutil.rmtree(builds.cache)
    out.unlink()
    before, profile = again / 2, first - again
    for moment in sorted(draw.uniform(0, first) for _ in range(kills)):
        share = (moment - before) / profile
        # Between two saves in the profile; before it and after it at the very moment.
        seconds = moment if share < 0 else draw.uniform(0, profile / total) if share < 1 else moment - profile
        while not builds.killed(out, int(min(max(share, 0), 1) * total), seconds):
            seconds /= 2  # it came to its end before, as a build that goes on may be the faster one
        print(f"killed at {moment / first:4.0%}, {builds.saved()} items saved, a file there: {out.exists()}")
    builds.whole(out)
    if out.read_bytes() != wanted.read_bytes():
        raise SystemExit("a build that was killed ended with other bytes")
    if left := list(builds.cache.glob(f"profiles/*/{STATES}")):
        raise SystemExit(f"what is held between the passes of a profile was left behind in {left[0].name}")
    print(f"killed {kills} times, and ended with the bytes of a build that was left alone")


def script() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streamed", action="store_true", help="The model is read layer by layer.")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no threads but the one that made it
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model")
        compare(Builds(Path(folder), args.streamed), args.kills, random.Random(args.seed))


if __name__ == "__main__":
    script()
