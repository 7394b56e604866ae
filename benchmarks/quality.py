"""Quality of artifacts on texts of one's own, and the same cases for `kvpress_methods.py`.

    python benchmarks/quality.py cases --model NAME --context 2048 --out cases.json TEXT [TEXT ...]
    python benchmarks/quality.py run --model NAME --cases cases.json --out rows.json ARTIFACT.kvb [ARTIFACT.kvb ...]
    python benchmarks/quality.py table rows.json [rows.json ...]

A case is a passage of a text with facts hidden in it; continuation, quotes and questions are asked only after it was
compressed, all from a fork of the same cache. Rows are those of `kvcompile eval`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kvcompile.artifacts import read
from kvcompile.calibration import Episode, FollowUp, draw_episodes
from kvcompile.calibration.family import Family
from kvcompile.evaluation import Contender, Row, evaluate, summarise
from kvcompile.models import load

SEED = 20_261


def make_cases(args: argparse.Namespace) -> None:
    tokenizer = load(args.model, dtype=torch.bfloat16).tokenizer
    families = [Family(path.stem, (lambda path=path: path.read_text(errors="replace"),)) for path in args.inputs]
    episodes = draw_episodes(tokenizer, families, args.context, len(families), SEED, replay=False)
    cases = [
        {
            "text": episode.family,
            "context": episode.context.tolist(),
            "asked": [{"kind": f.kind, "first": f.first, "ids": f.ids.tolist()} for f in episode.follow_ups],
        }
        for episode in episodes
    ]
    args.out.write_text(json.dumps(cases))


def run(args: argparse.Namespace) -> None:
    episodes = [
        Episode(
            case["text"],
            np.array(case["context"]),
            tuple(FollowUp(f["kind"], f["first"], np.array(f["ids"])) for f in case["asked"]),
        )
        for case in json.loads(args.cases.read_text())
    ]
    plans = [Contender("kvcompile", path.stem, read(path)) for path in args.inputs]
    rows = evaluate(load(args.model, dtype=torch.bfloat16).model, episodes, plans)
    args.out.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")


def table(args: argparse.Namespace) -> None:
    rows: dict[tuple[object, ...], Row] = {}
    for path in args.inputs:
        for number, row in enumerate(json.loads(path.read_text())):
            # Several files each have the full cache; its rows count once.
            key = number if row["method"] != "full cache" else (row["episode"], row["kind"], number)
            rows[row["method"], row["budget"], key, "" if row["method"] == "full cache" else str(path)] = Row(**row)
    shown = Table("method", "bytes", "quote loss", "KL", "answer loss", "KL", "continuation loss", "KL")
    for one in sorted(summarise(list(rows.values())), key=lambda one: (one.share, one.kinds["quote"].kl)):
        numbers = [f"{value:.4f}" for kind in one.kinds.values() for value in (kind.loss, kind.kl)]
        shown.add_row(one.method, f"{one.share:.2%}", *numbers[2:], *numbers[:2])
    Console(width=110).print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cases", "run", "table"])
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    {"cases": make_cases, "run": run, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
