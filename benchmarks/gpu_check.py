"""What a GPU makes of the kernels, decoding and `build`, beside what is asked for: `make gpu-check`.

    python benchmarks/gpu_check.py [--seconds 450] [--out gpu-check.jsonl] [--parts smoke,decode] [--resume]
    python benchmarks/gpu_check.py --dry-run

Smoke tests, then the judged rows (attention of one layer, decoding end to end, `build`), then the rest of the
matrix while time is left. Every row is a line of JSON in `--out` as soon as it is there; `--resume` goes on with a
sheet that was cut. A dry run does the same rows with tiny shapes on the CPU and judges nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sheet import Found, Sheet
from supervise import begin, finish, supervise

PARTS = ("smoke", "attention", "decode", "build", "prefill", "matrix")
"""Those that are asked for first."""
PACKAGES = ("kvcompile", "torch", "triton", "transformers", "flashinfer-python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450, help="that all rows may take together")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.jsonl"))
    parser.add_argument("--parts", default=",".join(PARTS), help="parted by commas, in this order [%(default)s]")
    parser.add_argument("--resume", action="store_true", help="keep what was found in --out")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of the process that measures
    args = parser.parse_args()
    chosen = args.parts.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    if args.until is not None:
        sheet = Sheet(args.out, args.until - args.seconds, args.until, judges=not args.dry_run)
        rows(sheet, [part for part in PARTS if part in chosen], args.dry_run)
        return
    start = time.time()
    begin(args.out, resume=args.resume)
    own = [sys.executable, __file__, "--seconds", str(args.seconds), "--out", str(args.out)]
    own += ["--parts", args.parts, "--until", str(start + args.seconds), *(["--dry-run"] if args.dry_run else [])]
    supervise(own, args.out, start, start + args.seconds)
    sys.exit(finish(args.out))


def rows(sheet: Sheet, parts: Sequence[str], dry: bool) -> None:
    """All rows of these parts."""
    import attention_rows
    import build_rows
    import decode_rows
    import smoke
    import torch
    from sizes import Model, Sizes

    if not dry and not torch.cuda.is_available():
        sys.exit("gpu_check needs a GPU; --dry-run does without")
    sizes = Sizes(dry)
    model = Model(sizes)
    sheet.measure("setting", lambda: setting(sizes.device), seconds=-1)
    if "smoke" in parts:
        for name, check in smoke.CHECKS:
            work = partial(_checked, check, sizes.device)
            sheet.measure(f"smoke: {name}", work, asked="as the reference", seconds=5)
    if "attention" in parts:
        attention_rows.bars(sheet, sizes)
    if "decode" in parts:
        decode_rows.bars(sheet, sizes, model)
    if "build" in parts:
        build_rows.building(sheet, sizes, model)
    if "prefill" in parts:
        build_rows.reading(sheet, sizes, model)
    if "matrix" in parts:
        model.release()
        attention_rows.matrix(sheet, sizes, attention_rows.GROUPS[:1])
        decode_rows.matrix(sheet, sizes, model)
        model.release()
        attention_rows.matrix(sheet, sizes, attention_rows.GROUPS[1:])


def _checked(check: Callable[[Any], str], device: Any) -> Found:
    return Found(check(device), True)


def setting(device: Any) -> Found:
    """What a reader has to know to compare figures."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    found = {"date": datetime.date.today().isoformat(), "python": platform.python_version(), **versions}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"gpu": card.name, "memory": card.total_memory, "l2": card.L2_cache_size,
                  "processors": card.multi_processor_count, "cuda": torch.version.cuda}  # fmt: skip
    else:
        found["cpu threads"] = torch.get_num_threads()
    return Found(", ".join(f"{name} {value}" for name, value in found.items()), None, found)


if __name__ == "__main__":
    main()
