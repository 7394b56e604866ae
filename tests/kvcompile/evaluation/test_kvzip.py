"""KVzip's scores against attention written out, and what is kept by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import ModelError, TargetError
from kvcompile.calibration import Episode, FollowUp
from kvcompile.evaluation.caches import FullCache
from kvcompile.evaluation.kvzip import KVzip, kvzip, most_useful, scores
from kvcompile.evaluation.participant import Question
from kvcompile.evaluation.repeating import FIRST, LATER, repeats
from kvcompile.models import Loaded, load
from kvcompile.profile.context import read_context
from kvcompile.runtime import read_prompt

CONTEXT = 90


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Loaded:
    return load(str(model_folder))


@pytest.fixture(scope="module")
def episode() -> Episode:
    rng = np.random.default_rng(0)
    asked = [FollowUp("continuation", 0, rng.integers(3, 97, 20)), FollowUp("question", 4, rng.integers(3, 97, 9))]
    return Episode("noise", rng.integers(3, 97, CONTEXT), tuple(asked))


def test_the_context_is_repeated_in_chunks(loaded: Loaded, episode: Episode) -> None:
    ids = episode.context
    chunks = repeats(loaded.model, ids, 40)
    assert [part for part, _ in chunks] == [slice(0, 40), slice(40, 80), slice(80, 90)]
    texts = [loaded.tokenizer.decode(one.ids) for _, one in chunks]
    assert texts[0] == FIRST + "\n" + loaded.tokenizer.decode(ids[:40])
    assert texts[2] == LATER + loaded.tokenizer.decode(ids[72:80]) + "\n" + loaded.tokenizer.decode(ids[80:])
    assert all(one.first == 0 for _, one in chunks)


def test_a_model_from_nowhere_has_no_prompts(episode: Episode) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        repeats(tiny_model(CONFIGS["llama"]), episode.context, 40)


@pytest.mark.parametrize("size", [40, 2048])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_scores_are_the_largest_attention_of_repeating(episode: Episode, family: str, size: int) -> None:
    """Of sinks, chunk and repetition alone: attention over all, renormalised. Sliding layers as they are."""
    ids, model = episode.context, tiny_model(CONFIGS[family])
    parts = [slice(start, min(start + size, CONTEXT)) for start in range(0, CONTEXT, size)]
    chunks = [(part, FollowUp("replay", 0, np.concatenate([[9, 8, 7], ids[part]]))) for part in parts]
    found = scores(model, read_context(model, ids), chunks)
    model.set_attn_implementation("eager")
    for part, repeat in chunks:
        both = torch.from_numpy(np.concatenate([ids, repeat.ids]))[None]
        with torch.no_grad():
            layers = model(both, output_attentions=True).attentions
        for layer, weights in enumerate(layers):
            rows = weights[0, :, CONTEXT:]
            sinks = rows[..., : min(4, part.start)]
            total = sinks.sum(-1) + rows[..., part].sum(-1) + rows[..., CONTEXT:].sum(-1)
            if family == "gemma3" and layer != 1:
                total = torch.ones_like(total)
            most = (rows[..., part] / total[..., None]).amax(1)
            expected = most.view(len(found[layer]), -1, most.shape[-1]).amax(1)
            torch.testing.assert_close(found[layer][:, part], expected, rtol=1e-4, atol=1e-6)


def test_the_best_of_all_layers_together_are_kept() -> None:
    score = [torch.rand(2, 30, generator=torch.Generator().manual_seed(i)) / (1 + i / 2) for i in range(3)]
    kept = most_useful(score, (False, True, False), 50)
    assert kept[1] is None
    first, last = kept[0], kept[2]
    assert first is not None
    assert last is not None
    assert int(first.sum() + last.sum()) == 50
    assert first[:, :4].all()
    assert last[:, :4].all()
    assert first.sum() > last.sum()  # whose scores are half as high
    lowest = min(score[0][:, 4:][first[:, 4:]].min(), score[2][:, 4:][last[:, 4:]].min())
    assert lowest > max(score[0][~first].max(), score[2][~last].max())


def participant(loaded: Loaded, budget: str, context: int = CONTEXT) -> KVzip:
    return kvzip(make_artifact(loaded.model, context=context), "kvzip", budget, context)


def test_with_all_pairs_it_is_the_full_cache(loaded: Loaded, episode: Episode) -> None:
    with FullCache().read(loaded.model, episode.context) as held:
        full = [held.ask(one) for one in episode.follow_ups]
    with participant(loaded, "100%").read(loaded.model, episode.context) as held:
        for one, before in zip(episode.follow_ups, full, strict=True):
            torch.testing.assert_close(held.ask(one), before, rtol=1e-4, atol=1e-4)
            assert held.share(len(one.ids)) == pytest.approx(1 + len(one.ids) / CONTEXT)


def test_with_all_pairs_it_answers_as_the_full_cache(loaded: Loaded, episode: Episode) -> None:
    question = Question(episode.context, episode.follow_ups[1].ids, 12)
    (full,) = FullCache().answer(loaded.model, [question], set())
    whole, tokens = participant(loaded, "100%"), full.tokens.tolist()
    (same,) = whole.answer(loaded.model, [question], set())
    assert same.tokens.tolist() == tokens
    assert same.share == pytest.approx(1 + (len(question.ids) + 12) / CONTEXT)
    (ended,) = whole.answer(loaded.model, [question], {tokens[2]})
    assert ended.tokens.tolist() == tokens[: tokens.index(tokens[2]) + 1]


def test_with_states_of_linear_attention_it_answers_as_the_full_cache(episode: Episode) -> None:
    model = tiny_model(CONFIGS["qwen3.5"])
    question = Question(episode.context, episode.follow_ups[1].ids, 12)
    (full,) = FullCache().answer(model, [question], set())
    whole = kvzip(make_artifact(model, context=CONTEXT), "kvzip", "100%", CONTEXT)
    (same,) = whole.answer(model, [question], set())
    assert same.tokens.tolist() == full.tokens.tolist()


def test_a_context_that_was_read_before_is_not_read_and_scored_anew(
    loaded: Loaded, episode: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = Question(episode.context, episode.follow_ups[1].ids, 12)
    before = read_prompt(loaded.model, torch.from_numpy(episode.context)[None])
    given = replace(question, before=before)
    own = [participant(loaded, budget).answer(loaded.model, [question], set())[0] for budget in ("50%", "20%")]
    assert own[0].tokens.tolist() != own[1].tokens.tolist()
    (first,) = participant(loaded, "50%").answer(loaded.model, [given], set())
    for name in ("read_context", "scores"):
        monkeypatch.setattr(f"kvcompile.evaluation.kvzip.{name}", None)
    (second,) = participant(loaded, "20%").answer(loaded.model, [given], set())
    assert [first.tokens.tolist(), second.tokens.tolist()] == [one.tokens.tolist() for one in own]


def test_exactly_the_share_is_kept_and_what_follows_is_counted(loaded: Loaded, episode: Episode) -> None:
    with FullCache().read(loaded.model, episode.context) as held:
        full = [held.ask(one) for one in episode.follow_ups]
    pairs = 3 * 2 * CONTEXT
    differences = []
    for share in (0.5, 0.2):
        with participant(loaded, f"{share:.0%}").read(loaded.model, episode.context) as held:
            assert sum(int(kept.sum()) for kept in held.kept) == share * pairs
            for one in episode.follow_ups:
                assert held.share(len(one.ids)) == pytest.approx(share + len(one.ids) / CONTEXT)
            differences.append(float((held.ask(episode.follow_ups[0]) - full[0]).abs().mean()))
    assert 1e-3 < differences[0] < differences[1]


def test_sliding_layers_keep_their_window() -> None:
    model = tiny_model(CONFIGS["gemma3"])
    found = kvzip(make_artifact(model, context=CONTEXT), "kvzip", "60%", CONTEXT)
    assert found.sliding == (True, False, True)
    assert (found.fixed, found.full) == (2 * 3 * 24, 3 * (CONTEXT + 2 * 24))
    assert found.pairs + found.fixed == int(0.6 * found.full)


def test_too_little_is_refused(loaded: Loaded) -> None:
    with pytest.raises(TargetError, match="kvzip cannot keep to 3%: the first 4 tokens"):
        participant(loaded, "3%")
