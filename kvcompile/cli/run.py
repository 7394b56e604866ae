"""`kvcompile run`."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from kvcompile.artifacts import (
    PREFILL_CHUNK,
    Artifact,
    CacheError,
    check_identity,
    feed_forward_elements,
    fetch,
    identify,
    prefill_bytes,
)
from kvcompile.cli import output, progress
from kvcompile.cli.launched import launched


@click.command("run", short_help="answer a prompt inside an artifact's budget")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option("--prompt", required=True, metavar="FILE", help="A text file; - reads stdin.")
@click.option("--model", metavar="NAME", help="Where to load the model from.  [default: as the artifact says]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: greedy.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Sample from the likeliest tokens that together have this probability.",
)  # fmt: skip
@click.option(
    "--top-k",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Sample from this many likeliest tokens; 0: from all.",
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(1),
    default=PREFILL_CHUNK,
    show_default=True,
    help="Tokens of the prompt that are read at once; fewer take less memory.",
)
@click.option(
    "--prefill-cut-every",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Cut the prompt to the budget every so many tokens, for memory that does not grow with it; what comes next "
    "sees only what was kept, which costs quality.  [default: after the last one]",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Seed of sampling.")
@click.option("--raw", is_flag=True, help="Continue the text as it stands, without the model's chat template.")
@click.option("--compare", is_flag=True, help="Answer with the full cache too, and show where the answers part.")
@click.option(
    "--device-map",
    metavar="MAP",
    help="Spread the model's layers over this machine's GPUs as transformers does by this name, such as auto, with "
    "the package accelerate.  [default: one device]",
)
@click.option("--json", "as_json", is_flag=True, help="The answer and its figures as JSON on stdout.")
def command(
    artifact: str, prompt: str, model: str | None, max_new_tokens: int, temperature: float, top_p: float, top_k: int,
    prefill_chunk: int, prefill_cut_every: int | None, seed: int, raw: bool, compare: bool, device_map: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Stream the answer to a prompt on stdout; speed and bytes in use go to stderr. With --compare both answers are
    shown when both are done, with their figures.

    Started by torchrun in N processes (torchrun --nproc-per-node N -m kvcompile run ...), they split the model's heads,
    and each holds the cache of its own; the first one answers."""
    plan = fetch(artifact)
    process = launched()
    rank, count = process.rank, process.count
    if count > 1 and (compare or prompt == "-"):
        option = "--compare" if compare else "--prompt -"
        raise CacheError(f"{option} is for one process, and there are {count}: leave torchrun out, or the option")
    text = read_prompt(prompt, raw)

    import torch

    from kvcompile.cli.answer import Asked, prompt_ids, with_budget, with_full_cache
    from kvcompile.models import fast_dtype, load, over_devices
    from kvcompile.runtime import Sampling
    from kvcompile.runtime.tensor_parallel import check_ranks

    check_ranks(plan, count)
    with output.quiet_transformers(), over_devices(count, device_map) as spread:
        with progress.waiting("loading the model") if rank == 0 else nullcontext():
            dtype = fast_dtype(getattr(torch, plan.model.dtype))
            loaded = load(model or plan.model.name, dtype=dtype, spread=spread)
        ids = prompt_ids(loaded.tokenizer, text, raw)
        asked = Asked(ids, max_new_tokens, Sampling(temperature, top_p, top_k), seed, prefill_chunk, prefill_cut_every)
        # Before anything is said of a prompt that another model's artifact has no business with.
        check_identity(plan.model, identify(loaded.model, plan.model.name))
        if rank == 0:
            _note_length(ids.shape[1], plan.target.context)
        if not compare:
            answer = with_budget(loaded, plan, asked, silent=as_json or rank > 0)
            if rank == 0:
                result = figures(plan, loaded.model, asked, answer)
                output.print_json(result) if as_json else _print(result)
            return
        from kvcompile.cli.comparison import Comparison, part, show

        with progress.waiting("answering with the artifact"):
            budget = with_budget(loaded, plan, asked, silent=True, timed=True)
        with progress.waiting("answering with the full cache"):
            full = with_full_cache(loaded, asked, getattr(torch, plan.target.dtype))
    parting = part(loaded.tokenizer, budget.tokens, full.tokens)
    if as_json:
        output.print_json({
            **figures(plan, loaded.model, asked, budget), "full_cache": _own(full), "same": parting is None,
            "parting": None if parting is None else dataclasses.asdict(parting),
        })  # fmt: skip
    else:
        show(output.stdout, Comparison(plan.target.context, ids.shape[1], budget, full, parting))


def read_prompt(path: str, raw: bool) -> str:
    """The prompt's text; without `raw` it is a chat's message, which the line breaks that end a file are no part of.

    Raises:
        CacheError: a file that cannot be read as text, or holds none.
    """
    if path == "-" and sys.stdin is None:
        raise CacheError("there is no standard input to read the prompt from: give --prompt FILE")
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CacheError(f"the prompt {path} cannot be read ({error.strerror}): expected a text file") from None
    except UnicodeDecodeError:
        raise CacheError(f"the prompt {path} is not UTF-8 text: expected a text file") from None
    if not text.strip():
        raise CacheError(f"the prompt {path} is empty: expected some text to answer")
    return text if raw else text.rstrip("\r\n")


def figures(plan: Artifact, model: Any, asked: Any, answer: Any) -> dict[str, Any]:
    """What `--json` says of an answer inside the budget; bytes are those of one sequence. `prefill_bytes` is the most
    that reading the prompt takes beside weights and cache."""
    tokens = asked.ids.shape[1]
    read = prefill_bytes(
        plan, 1, tokens, asked.prefill_chunk, cut_every=asked.prefill_cut_every,
        dtype=str(model.dtype).removeprefix("torch."), inner=feed_forward_elements(model.config.get_text_config()),
    )  # fmt: skip
    return {
        **_own(answer),
        "prompt_tokens": tokens,
        "prefill_bytes": read,
        "artifact_bytes": plan.bytes.resident // plan.target.batch,
        "target_bytes": plan.target.bytes // plan.target.batch,
        "full_bytes": plan.bytes.full // plan.target.batch,
    }


def _own(answer: Any) -> dict[str, Any]:
    """An answer's own figures."""
    return {
        "text": answer.text,
        "new_tokens": len(answer.tokens),
        "prefill_seconds": answer.prefill_seconds,
        "tokens_per_second": answer.tokens_per_second,
        "cache_bytes": answer.cache_bytes,
        **({"rank_bytes": list(answer.rank_bytes)} if answer.rank_bytes else {}),
    }


def _note_length(tokens: int, context: int) -> None:
    if tokens > context:
        click.echo(
            f"note: the prompt has {tokens} tokens, more than the {context} that the artifact was built for; the cache "
            "keeps its size, so a smaller share of them is kept",
            err=True,
        )


def _print(result: dict[str, Any]) -> None:
    share = result["cache_bytes"] / result["full_bytes"]
    ranks = result.get("rank_bytes", [])
    by_rank = f" ({', '.join(map(output.approximate, ranks))} by rank)" if ranks else ""
    click.echo(
        f"\n{result['prompt_tokens']} prompt tokens in {result['prefill_seconds']:.1f} s, "
        f"{result['new_tokens']} new ones at {result['tokens_per_second']:.1f} a second\n"
        f"cache: {output.human(result['cache_bytes'])} in use, {share:.1%} of the full one{by_rank}\n"
        f"target: {output.human(result['target_bytes'])}\n"
        f"reading the prompt: at most {output.human(result['prefill_bytes'])} beside weights and cache",
        err=True,
    )
