"""`kvcompile run`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from kvcompile.artifacts import Artifact, CacheError, fetch
from kvcompile.cli import display


@click.command("run", short_help="answer a prompt inside an artifact's budget")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option("--prompt", required=True, metavar="FILE", help="A text file; - reads stdin.")
@click.option("--model", metavar="NAME", help="Where to load the model from.  [default: as the artifact says]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0: all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--raw", is_flag=True, help="Continue the text as it stands, without the model's chat template.")
@click.option("--json", "as_json", is_flag=True, help="The answer and its figures as JSON on stdout.")
def command(
    artifact: str, prompt: str, model: str | None, max_new_tokens: int, temperature: float, top_p: float, top_k: int,
    seed: int, raw: bool, as_json: bool,
) -> None:  # fmt: skip
    """Stream the answer to a prompt on stdout; speed and bytes in use go to stderr."""
    plan = fetch(artifact)
    text = read_prompt(prompt)

    import torch

    from kvcompile.models import fast_dtype, load

    with display.quiet_transformers():
        with display.stderr.status("loading the model"):
            loaded = load(model or plan.model.name, dtype=fast_dtype(getattr(torch, plan.model.dtype)))
        torch.manual_seed(seed)
        from kvcompile.runtime import Sampling

        result = answer(loaded, plan, text, raw, as_json, max_new_tokens, Sampling(temperature, top_p, top_k))
    if as_json:
        display.print_json(result)
    else:
        _print(result)


def read_prompt(path: str) -> str:
    """The prompt's text.

    Raises:
        CacheError: a file that cannot be read as text, or holds none.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CacheError(f"the prompt {path} cannot be read ({error.strerror}): expected a text file") from None
    except UnicodeDecodeError:
        raise CacheError(f"the prompt {path} is no UTF-8 text: expected a text file") from None
    if not text.strip():
        raise CacheError(f"the prompt {path} is empty: expected some text to answer")
    return text


def answer(
    loaded: Any, plan: Artifact, text: str, raw: bool, silent: bool, max_new_tokens: int, sampling: Any
) -> dict[str, Any]:
    """Generate inside the budget, streaming to stdout unless `silent`; the text and its figures."""
    from kvcompile.cli.streamer import TimedStreamer
    from kvcompile.models import ending_tokens
    from kvcompile.runtime import attach, generate

    tokenizer, model = loaded.tokenizer, loaded.model
    if not raw and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(text, return_tensors="pt").input_ids
    cache = attach(model, plan).new_cache()
    if ids.shape[1] > plan.target.context:
        click.echo(
            f"note: the prompt has {ids.shape[1]} tokens and the artifact was built for {plan.target.context}; "
            "what does not fit its budget is dropped",
            err=True,
        )
    streamer = TimedStreamer(tokenizer, silent)
    streamer.put(ids)
    ids = ids.to(model.device)
    output = generate(
        model, cache, ids, max_new_tokens=max_new_tokens, sampling=sampling, eos=ending_tokens(model, tokenizer),
        on_token=streamer.put,
    )  # fmt: skip
    streamer.end()
    end = time.perf_counter()
    new = output[0]
    decoding = max(end - streamer.first_token, 1e-9)
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": int(ids.shape[1]),
        "new_tokens": len(new),
        "prefill_seconds": streamer.first_token - streamer.start,
        "tokens_per_second": (len(new) - 1) / decoding,
        "cache_bytes": cache.nbytes,
        "artifact_bytes": plan.bytes.resident // plan.target.batch,
        "target_bytes": plan.target.bytes // plan.target.batch,
        "full_bytes": plan.bytes.full // plan.target.batch,
    }


def _print(result: dict[str, Any]) -> None:
    share = result["cache_bytes"] / result["full_bytes"]
    click.echo(
        f"\n{result['prompt_tokens']} prompt tokens in {result['prefill_seconds']:.1f} s, "
        f"{result['new_tokens']} new ones at {result['tokens_per_second']:.1f} a second\n"
        f"cache: {display.human(result['cache_bytes'])} in use, {share:.1%} of the full one\n"
        f"target: {display.human(result['target_bytes'])}",
        err=True,
    )
