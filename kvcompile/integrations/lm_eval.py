"""The model `kvcompile` of lm-evaluation-harness: any task, inside an artifact's budget.

    python -m kvcompile.integrations.lm_eval --model kvcompile --model_args artifact=a.kvb --tasks hellaswag

is `lm_eval` with that model registered; from Python, importing this module registers it. The harness (0.4.13) looks for
models in a table of its own and reads no entry points, so `lm_eval --model kvcompile` alone cannot find ours.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from kvcompile.artifacts import CacheError, KvcompileError, fetch
from kvcompile.models import ending_tokens, fast_dtype, load
from kvcompile.runtime import Decoder, Sampling, attach

Score = tuple[float, bool]
"""Log-likelihood, and whether greedy decoding would have said the same."""


@register_model("kvcompile")
class KvcompileLM(TemplateLM):
    """One sequence at a time. What is scored or generated meets the context only as the budgeted cache holds it:

    * `loglikelihood`: all of the context but its last token is read and cut to the budget; the last token and the
      continuation then see what was stored, and each other.
    * `loglikelihood_rolling`: the text is read in chunks, each of which sees what the cache has kept of those before.
    * `generate_until`: token by token, as `kvcompile run --raw` does, up to a stop or a token that ends an answer.
    """

    def __init__(
        self,
        artifact: str,
        model: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        chunk: int = 256,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """`artifact` is a file or a place on the hub; `model` says where to load the model from (default: as the
        artifact says), `dtype` is that of its weights (default: as when it was built), `chunk` the tokens of a chunk in
        `loglikelihood_rolling`. Batch sizes are taken and change nothing.

        Raises:
            KvcompileError: what cannot be loaded, or does not belong together.
        """
        super().__init__()
        plan = fetch(artifact)
        if dtype is not None and dtype not in ("bfloat16", "float16", "float32"):
            raise CacheError(f"there is no dtype {dtype!r}: expected bfloat16, float16 or float32")
        if int(chunk) < 1:
            raise CacheError(f"a chunk of {chunk} tokens was asked for, expected 1 or more")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness asks for the first GPU unless it is told otherwise
        kind = getattr(torch, dtype) if dtype else fast_dtype(getattr(torch, plan.model.dtype), device)
        loaded = load(model or plan.model.name, dtype=kind, device=device)
        self.attachment = attach(loaded.model, plan)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.ends = ending_tokens(loaded.model, loaded.tokenizer)
        self.max_length, self.chunk, self.max_gen_toks = plan.target.context, int(chunk), int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = first is None or not string.startswith(first)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        """Questions with one context in a row share its prefill."""
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        found: dict[int, Score] = {}
        known: tuple[list[int], Any] | None = None
        for i in tqdm(order, disable=disable_tqdm, desc="kvcompile"):
            request, context, continuation = requests[i]
            context = context[-max(self.max_length - len(continuation), 1) :]
            if known is None or known[0] != context:
                cache = self.attachment.new_cache()
                if len(context) > 1:
                    self._read(cache, context[:-1])
                known = context, cache
            logits = self._read(copy.deepcopy(known[1]), [context[-1], *continuation[:-1]], every=True)
            found[i] = _score(logits, continuation)
            self.cache_hook.add_partial("loglikelihood", request, found[i])
        return [found[i] for i in range(len(requests))]

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="kvcompile"):
            ids, cache, total = self.tok_encode(text), self.attachment.new_cache(), 0.0
            before = [self.prefix_token_id, *ids[:-1]]
            for first in range(0, len(ids), self.chunk):
                last = first + self.chunk
                total += _score(self._read(cache, before[first:last], every=True), ids[first:last])[0]
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for context, settings in tqdm([request.args for request in requests], disable=disable_tqdm, desc="kvcompile"):
            until = settings.get("until") or []
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            longest = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or self.max_gen_toks)
            text = self._answer(context, stops, longest, _sampling(settings))
            texts.append(text)
            self.cache_hook.add_partial("generate_until", (context, settings), text)
        return texts

    def _answer(self, context: str, stops: list[str], longest: int, sampling: Sampling) -> str:
        ids = self.tok_encode(context)[-max(self.max_length - longest, 1) :] or [self.prefix_token_id]
        decoder = Decoder(self.model, self.attachment.new_cache(), sampling)
        text = ""
        for text in self._growing(decoder, ids, longest):
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def _growing(self, decoder: Decoder, ids: list[int], longest: int) -> Iterator[str]:
        """The answer so far, one token longer each time."""
        new: list[int] = []
        token = decoder.prefill(torch.tensor([ids], device=self.model.device))
        while len(new) < longest and int(token) not in self.ends:
            new.append(int(token))
            yield str(self.tokenizer.decode(new, skip_special_tokens=True))
            if len(new) < longest:
                token = decoder.step()

    def _read(self, cache: Any, ids: Iterable[int], every: bool = False) -> torch.Tensor:
        """Feed tokens; their logits [n, vocabulary], or the last one's alone."""
        tokens = torch.tensor([list(ids)], device=self.model.device)
        logits: torch.Tensor = self.model(tokens, past_key_values=cache, logits_to_keep=0 if every else 1).logits[0]
        return logits


def _score(logits: torch.Tensor, expected: list[int]) -> Score:
    """Of expected tokens, one after each row of logits."""
    target = torch.tensor(expected, device=logits.device)
    likelihood = logits.float().log_softmax(-1).gather(1, target[:, None]).sum()
    return float(likelihood), bool((logits.argmax(-1) == target).all())


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Greedy unless a task asks to sample."""
    temperature = settings.get("temperature")
    if settings.get("do_sample") is False or (settings.get("do_sample") is None and not temperature):
        return Sampling()
    temperature = 1.0 if temperature is None else float(temperature)
    return Sampling(temperature, float(settings.get("top_p") or 1.0), int(settings.get("top_k") or 0))


def main() -> None:
    """`lm_eval` with this model; our own refusals are one sentence and status 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except KvcompileError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
