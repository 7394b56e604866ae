"""A tiny model in a folder, and the stand-in of the hub that serves it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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
def hub(hub_server: Any, tiny_model: Path) -> Any:
    """The stand-in, serving the tiny model as tiny/llama; tiny/gated is gated."""
    hub_server.repos["tiny/llama"] = tiny_model
    hub_server.gated.add("tiny/gated")
    return hub_server


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server on loopback that takes connections, which wait in its queue, and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.setblocking(False)
        yield listener
