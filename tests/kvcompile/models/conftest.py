"""A tiny model in a folder, and a local stand-in of the hub that serves it."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn(ThreadingHTTPServer):
    """The hub's answers to a download. Every `owner/name` in `repos` is a folder; `gated` ones are refused."""

    def __init__(self, repos: dict[str, Path], gated: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.gated = repos, gated
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        repo_id = f"{owner}/{name}"
        if repo_id in self.server.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if repo_id not in self.server.repos:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        folder = self.server.repos[repo_id]
        if is_api and rest[:1] in ([], ["revision"]):
            return self._send(200, json.dumps({"id": repo_id, "sha": COMMIT}).encode(), {}, body)
        if is_api and rest[:1] == ["tree"]:
            files = [_listed(path) for path in sorted(folder.iterdir())]
            return self._send(200, json.dumps(files).encode(), {}, body)
        if rest[:1] == ["resolve"]:
            content = (folder / rest[2]).read_bytes()
            if body:
                self.server.downloads.append(rest[2])
            etag = hashlib.sha1(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        return self._send(404, b"", {}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _listed(path: Path) -> dict[str, Any]:
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers in bfloat16 with a word tokenizer, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", "hello", "world"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[HubStandIn]:
    """The stand-in, serving the tiny model as tiny/llama; tiny/gated is gated."""
    server = HubStandIn({"tiny/llama": tiny_model}, {"tiny/gated"})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port on loopback that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]
