"""Who a model is: the same weights in any element type, and nobody else."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvcompile.artifacts import ModelError, check_identity, chunk_of, identify
from kvcompile.artifacts.shapes import shape_of

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA = {
    "llama": {},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 20},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tiny(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(SIZES | EXTRA.get(family, {}) | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {family: tiny(family) for family in EXTRA}


@pytest.mark.parametrize(
    ("family", "head_dim", "windows"),
    [("llama", 8, (0, 0, 0)), ("gemma3_text", 16, (16, 0, 16)), ("phi3", 8, (20, 20, 20))],
)
def test_shape(models, family, head_dim, windows):
    found = identify(models[family], "some/name")
    assert (found.name, found.architecture, found.dtype) == ("some/name", family, "float32")
    assert (found.num_layers, found.num_attention_heads, found.num_kv_heads) == (3, 4, 2)
    assert (found.head_dim, found.hidden_size, found.windows) == (head_dim, 32, windows)
    assert len(found.fingerprint) == 64
    assert found.samples.dtype == np.float32


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {"sliding_window": None}, (0, 0, 0)),
        ("mistral", {"sliding_window": 16}, (16, 16, 16)),
        ("qwen2", {"sliding_window": 16}, (0, 0, 0)),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, (0, 16, 16)),
        ("qwen3", {}, (0, 0, 0)),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, (0, 0, 16)),
        ("phi3", {"sliding_window": None}, (0, 0, 0)),
        ("mixtral", {"num_local_experts": 2}, (0, 0, 0)),
        ("mixtral", {"num_local_experts": 2, "sliding_window": 16}, (16, 16, 16)),
        ("qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}, (0, 0, 0)),
    ],
)
def test_windows_of_the_families(family, changes, windows):
    assert identify(tiny(family, **changes), "x").windows == windows


def test_multi_head_attention_is_a_group_of_one():
    assert identify(tiny("llama", num_key_value_heads=4), "x").num_kv_heads == 4
    assert identify(tiny("gpt2", num_key_value_heads=None), "x").num_kv_heads == 4


def test_names_do_not_matter(models):
    check_identity(identify(models["llama"], "a"), identify(models["llama"], "b"))


def test_it_does_not_change_the_model(models):
    before = copy.deepcopy(models["llama"].state_dict())
    assert identify(models["llama"], "x").fingerprint == identify(models["llama"], "x").fingerprint
    assert all(torch.equal(before[key], tensor) for key, tensor in models["llama"].state_dict().items())


@pytest.mark.parametrize("family", EXTRA)
@pytest.mark.parametrize(("was", "now"), list(product(DTYPES, DTYPES)))
def test_the_same_weights_in_another_element_type(models, family, was, now):
    expected = identify(copy.deepcopy(models[family]).to(DTYPES[was]), "a")
    found = identify(copy.deepcopy(models[family]).to(DTYPES[now]), "b")
    check_identity(expected, found)


@pytest.mark.parametrize("family", EXTRA)
@pytest.mark.parametrize(("was", "now"), list(product(DTYPES, DTYPES)))
def test_one_scaled_matrix_is_noticed(models, family, was, now):
    expected = identify(copy.deepcopy(models[family]).to(DTYPES[was]), "a")
    changed = copy.deepcopy(models[family])
    with torch.no_grad():
        # bfloat16 against float16 rounds twice, hence 1.02 for what is 1.01 within one element type.
        changed.model.layers[1].mlp.down_proj.weight.mul_(1.01 if was == now else 1.02)
    with pytest.raises(ModelError, match="weights are not those the artifact is for: load a or build"):
        check_identity(expected, identify(changed.to(DTYPES[now]), "b"))


def test_one_scaled_matrix_is_noticed_across_element_types_at_one_percent(models):
    expected = identify(copy.deepcopy(models["llama"]).bfloat16(), "a")
    changed = copy.deepcopy(models["llama"])
    with torch.no_grad():
        changed.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    with pytest.raises(ModelError, match="weights"):
        check_identity(expected, identify(changed, "b"))


def test_another_initialisation_is_noticed(models):
    with pytest.raises(ModelError, match="weights"):
        check_identity(identify(models["llama"], "a"), identify(tiny("llama", seed=1), "b"))


def test_swapped_layers_are_noticed(models):
    changed = copy.deepcopy(models["llama"])
    changed.model.layers[0], changed.model.layers[1] = changed.model.layers[1], changed.model.layers[0]
    with pytest.raises(ModelError, match="weights"):
        check_identity(identify(models["llama"], "a"), identify(changed, "b"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "qwen2"),
        ("num_layers", 4),
        ("num_attention_heads", 8),
        ("num_kv_heads", 1),
        ("head_dim", 64),
        ("hidden_size", 64),
        ("windows", (0, 0, 8)),
    ],
)
def test_a_shape_mismatch_is_named(models, field, value):
    identity = identify(models["llama"], "x")
    with pytest.raises(ModelError, match=field) as caught:
        check_identity(replace(identity, **{field: value}), identity)
    assert str(value) in str(caught.value)
    assert str(caught.value).isprintable()


def test_other_tensors_are_named(models):
    other = tiny("llama", vocab_size=98)
    with pytest.raises(ModelError, match="name or shape"):
        check_identity(identify(models["llama"], "a"), identify(other.bfloat16(), "b"))


def test_another_number_of_samples_is_another_model(models):
    identity = identify(models["llama"], "a")
    with pytest.raises(ModelError, match="weights"):
        check_identity(replace(identity, samples=identity.samples[:-1], dtype="bfloat16"), identity)


def test_tied_weights():
    tied = tiny("llama", tie_word_embeddings=True)
    identity = identify(tied, "x")
    check_identity(identity, identify(copy.deepcopy(tied), "y"))
    assert identity.samples.size == 16 * len(tied.state_dict())
    with torch.no_grad():
        tied.lm_head.weight.mul_(1.01)
    with pytest.raises(ModelError, match="weights"):
        check_identity(identity, identify(tied, "y"))


def test_a_matrix_that_is_not_contiguous(models):
    changed = copy.deepcopy(models["llama"])
    weight = changed.lm_head.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    check_identity(identify(models["llama"], "a"), identify(changed, "b"))


def test_weights_that_are_not_there():
    with torch.device("meta"):
        model = tiny("llama")
    with pytest.raises(ModelError, match="meta device"):
        identify(model, "x")


def test_packed_weights(models):
    packed = copy.deepcopy(models["llama"])
    matrix = packed.model.layers[0].mlp.up_proj
    matrix.weight = torch.nn.Parameter(torch.zeros(64, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"up_proj\.weight of type uint8, expected weights that are not packed"):
        identify(packed, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(models, value):
    broken = copy.deepcopy(models["llama"])
    with torch.no_grad():
        broken.model.norm.weight.fill_(value)
    with pytest.raises(ModelError, match=r"NaN or infinity in model\.norm\.weight"):
        identify(broken, "x")


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        (
            "gemma3n_text",
            {"num_kv_shared_layers": 0},
            "gemma3n_text model, which has embeddings of the tokens for every layer",
        ),
        (
            "gemma4_text",
            {
                "num_hidden_layers": 3,
                "hidden_size_per_layer_input": 0,
                "layer_types": ["full_attention"] * 3,
                "per_layer_config": {1: {"head_dim": 16}},
            },
            r"gemma4_text model, which has layers of full attention with different heads \(\d of 8 and \d of 16\)",
        ),
        (
            "gemma3n_text",
            {"num_kv_shared_layers": 1},
            "gemma3n_text model, which has layers that share keys and values",
        ),
    ],
)
def test_families_that_a_plan_by_head_cannot_describe(family, changes, sentence):
    with pytest.raises(ModelError, match=sentence):
        shape_of(AutoConfig.for_model(family, **(SIZES | {"head_dim": 8} | changes)), "x")


def test_chunks_are_windows_by_another_rule(models):
    config = AutoConfig.for_model("llama4_text", **(SIZES | {"num_hidden_layers": 4, "head_dim": 8}))
    found = shape_of(config, "x")
    assert found["windows"] == (8192, 8192, 8192, 0)
    identity = identify(models["llama"], "x")
    assert chunk_of(replace(identity, architecture="llama4_text", windows=found["windows"])) == 8192
    assert chunk_of(replace(identity, windows=found["windows"])) is None


def test_layers_of_linear_attention_have_no_number_but_a_state():
    config = AutoConfig.for_model("qwen3_5_text", **(SIZES | {"num_hidden_layers": 8, "head_dim": 16}))
    found = shape_of(config, "x")
    assert (found["num_layers"], found["windows"]) == (2, (0, 0))
    # Six layers: convolutions of 4 over 2 x 16 x 128 + 32 x 128 channels, and 32 matrices of 128 x 128.
    assert found["states"] == (6 * 8192 * 4, 6 * 32 * 128 * 128)


def test_models_of_another_kind(models):
    with pytest.raises(ModelError, match="float64"):
        identify(copy.deepcopy(models["llama"]).double(), "x")
    other = copy.deepcopy(models["llama"])
    other.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(ModelError, match="a layer of type chunked_attention, expected full_attention"):
        identify(other, "x")
