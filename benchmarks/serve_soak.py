"""The OpenAI server with a compiled cache under many clients: every greedy answer is the one given alone.

    python benchmarks/serve_soak.py MODEL ARTIFACT --clients 64 --minutes 10 [--plain]

Clients ask completions, streamed completions and chats, some give up half way. Answers to all prompts, asked one by
one before, are what each has to be. Prints a line of JSON: requests, errors, wrong answers, and the server's resident
memory minute by minute; with `--plain`, of vLLM's own cache of as much memory. The cache is small, so that all of it
has been written to after a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from kvcompile.artifacts import read
from kvcompile.integrations.vllm.line import arguments

TEXT = (Path(__file__).parents[1] / "examples" / "handbook.txt").read_text(encoding="utf-8")
KINDS = ("completion", "streamed", "chat", "given up")


def ask(port: int, kind: str, text: str, new: int) -> str | None:
    """An answer; None where the client has given up."""
    body: dict[str, Any] = {"model": "model", "max_tokens": new, "temperature": 0, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": text}]} if kind == "chat" else {"prompt": text}
    body |= {"stream": kind in ("streamed", "given up")}
    place = "chat/completions" if kind == "chat" else "completions"
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{place}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        if not body["stream"]:
            choice = json.load(response)["choices"][0]
            return str(choice["message"]["content"] if kind == "chat" else choice["text"])
        parts = []
        for line in response:
            if line.startswith(b"data: {"):
                parts.append(json.loads(line[6:])["choices"][0]["text"])
                if kind == "given up" and len(parts) == 3:
                    return None
        return "".join(parts)


def memory(server: int) -> int:
    """Resident bytes of a process and of those that it has started."""
    total, todo = 0, [server]
    while todo:
        pid = todo.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            todo += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("artifact")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--megabytes", type=int, default=500, help="of the cache")
    parser.add_argument("--plain", action="store_true", help="vLLM without the artifact")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--log", default=os.devnull, help="the server's output")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = min(2048, read(options.artifact).target.context)
    found = {"max_model_len": context} if options.plain else arguments(options.artifact, context=context)
    words = [
        f"--{name.replace('_', '-')}={v if isinstance(v, int | str) else json.dumps(v)}" for name, v in found.items()
    ]
    command = [
        sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", options.model,
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model",
        "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(options.megabytes * 10**6), *words,
    ]  # fmt: skip
    environment = {"VLLM_NO_USAGE_STATS": "1"} | os.environ
    with open(options.log, "w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            print(json.dumps(measured(port, server.pid, options)), flush=True)
        finally:
            server.terminate()


def measured(port: int, server: int, options: argparse.Namespace) -> dict[str, Any]:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:
            time.sleep(1)
    prompts = [TEXT[300 * i : 300 * i + size] for i, size in enumerate((20, 200, 900, 2500, 60, 4000, 1500, 120))]
    alone = {(kind, text): ask(port, kind, text, options.new) for text in prompts for kind in ("completion", "chat")}
    counts = {"requests": 0, "given_up": 0, "errors": 0, "wrong": 0}
    lock, stop = threading.Lock(), time.monotonic() + 60 * options.minutes

    def client(seed: int) -> None:
        chosen = random.Random(seed)
        while time.monotonic() < stop:
            kind, text = chosen.choice(KINDS), chosen.choice(prompts)
            result = "requests"
            try:
                answer = ask(port, kind, text, options.new)
                if answer is None:
                    result = "given_up"
                elif answer != alone["chat" if kind == "chat" else "completion", text]:
                    result = "wrong"
            except Exception as error:
                print(repr(error), file=sys.stderr, flush=True)
                result = "errors"
            with lock:
                counts["requests"] += result != "requests"
                counts[result] += 1

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(options.clients)]
    for thread in threads:
        thread.start()
    resident = []
    while time.monotonic() < stop:
        time.sleep(min(60, 30 * options.minutes))
        resident.append(memory(server) // 10**6)
    for thread in threads:
        thread.join()
    return counts | {"clients": options.clients, "minutes": options.minutes, "resident_mb": resident}


if __name__ == "__main__":
    main()
