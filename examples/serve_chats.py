"""Several chats at once against a running server (`kvcompile serve x.kvb`), each a conversation of a few turns. The
standard library alone.

python examples/serve_chats.py [--url http://127.0.0.1:8000] [--chats 8] [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

TOPICS = ("bread", "rivers", "chess", "glass", "owls", "bridges", "tea", "the moon", "bees", "maps")
TURNS = ("Tell me one fact about {}.", "Why is that so?", "Say all of it again in one short sentence.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    options = parser.parse_args()
    try:
        model = ask(f"{options.url}/v1/models")["data"][0]["id"]
    except OSError as error:
        sys.exit(f"no server answers at {options.url} ({error}): start one with kvcompile serve")
    together = threading.Barrier(options.chats)
    start = time.monotonic()
    with ThreadPoolExecutor(options.chats) as pool:
        numbers = range(options.chats)
        done = list(pool.map(lambda i: chat(options.url, model, i, options.tokens, together), numbers))
    seconds, tokens = time.monotonic() - start, sum(count for _, count in done)
    for messages, _ in done:
        print("\n".join(f"{message['role']:>9}: {' '.join(message['content'].split())}" for message in messages), "\n")
    print(f"{options.chats} chats at once: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} a second")
    for name in ("kvcompile_sequences", "kvcompile_full_cache_share", "vllm:num_preemptions_total"):
        print(f"{name}: {metric(options.url, name)}")


def chat(
    url: str, model: str, number: int, tokens: int, together: threading.Barrier
) -> tuple[list[dict[str, str]], int]:
    """One conversation, and how many tokens were answered in it; all begin each turn together."""
    messages, answered = [], 0
    for turn in TURNS:
        messages.append({"role": "user", "content": turn.format(TOPICS[number % len(TOPICS)])})
        together.wait(timeout=600)
        body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
        try:
            answer = ask(f"{url}/v1/chat/completions", body)
        except OSError:
            together.abort()  # nobody waits for a chat that is over
            raise
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        answered += answer["usage"]["completion_tokens"]
    return messages, answered


def ask(url: str, body: Any = None) -> Any:
    """The server's JSON answer: to a GET, or to a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def metric(url: str, name: str) -> str:
    """One number of /metrics, of the first engine; `-` where there is none."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return next((line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{name}{{")), "-")


if __name__ == "__main__":
    main()
