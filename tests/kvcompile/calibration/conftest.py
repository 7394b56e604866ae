"""A small byte-level tokenizer, with and without a BOS token."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SAMPLE = ["The special magic number is 1234567. def read(path): return open(path).read()\n\n    import sys\n"] * 4


def byte_level(bos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SAMPLE, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="session", params=[True, False], ids=["bos", "no-bos"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return byte_level(request.param)


@pytest.fixture(scope="session")
def bos(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    return list(tokenizer("").input_ids)
