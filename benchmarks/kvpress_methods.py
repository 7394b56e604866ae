"""The methods of kvpress on the cases that `quality.py cases` wrote, as rows of the same kind.

    python benchmarks/kvpress_methods.py --model FOLDER --cases cases.json --kept 0.5 0.25 --out rows.json -- [NAMES]

For an environment with kvpress, which pins an older transformers than kvcompile's: nothing of kvcompile is imported.
Every method keeps the same share of the tokens in bfloat16; head-wise methods only mask keys, so their quality is a
valid reference and their memory is not.
"""

import argparse
import copy
import json
from pathlib import Path

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache


def press(name, evicted):
    snap = kvpress.SnapKVPress(compression_ratio=evicted)
    expected = kvpress.ExpectedAttentionPress(compression_ratio=evicted, epsilon=1e-2)
    makers = {
        "kvzip": lambda: kvpress.KVzipPress(compression_ratio=evicted),
        "snapkv": lambda: snap,
        "ada-snapkv": lambda: kvpress.AdaKVPress(snap),
        "expected": lambda: expected,
        "ada-expected": lambda: kvpress.AdaKVPress(expected),
        "streaming": lambda: kvpress.StreamingLLMPress(compression_ratio=evicted),
        "tova": lambda: kvpress.TOVAPress(compression_ratio=evicted),
        "keydiff": lambda: kvpress.KeyDiffPress(compression_ratio=evicted),
        "compactor": lambda: kvpress.CompactorPress(compression_ratio=evicted),
    }
    return makers[name]()


@torch.no_grad()
def ask(model, one, cache, masks, length):
    """Log-probabilities of every judged token; `masks` are the keys that a head-wise method hides."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = masks.get(layer.self_attn.layer_idx)
    ids = torch.tensor([one["ids"]])
    positions = torch.arange(length, length + ids.shape[1])[None]
    keep = ids.shape[1] - one["first"]
    logits = model(ids, past_key_values=copy.deepcopy(cache), position_ids=positions, logits_to_keep=keep).logits
    return logits[0, :-1].float().log_softmax(-1)


@torch.no_grad()
def fill(model, context, method):
    cache = DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    if method is None:
        model(context, past_key_values=cache, logits_to_keep=1)
    else:
        with method(model):
            model(context, past_key_values=cache, logits_to_keep=1)
    return cache, {m.layer_idx: m.masked_key_indices for m in (layer.self_attn for layer in model.model.layers)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["kvzip"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(args.model, **options).eval()
    model.config.name_or_path = args.model
    rows = []
    for number, case in enumerate(json.loads(args.cases.read_text())):
        context = torch.tensor([case["context"]])
        reference = None
        for name, kept in [("full cache", 1.0)] + [(name, kept) for name in args.names for kept in args.kept]:
            method = None if name == "full cache" else press(name, 1 - kept)
            cache, masks = fill(model, context, method)
            said = [ask(model, one, cache, masks, context.shape[1]) for one in case["asked"]]
            reference = reference or said
            for one, now, full in zip(case["asked"], said, reference, strict=True):
                target = torch.tensor(one["ids"][one["first"] + 1 :])
                rows.append(
                    {
                        "method": name,
                        "budget": "" if name == "full cache" else str(kept),
                        "share": kept,
                        "family": case["text"],
                        "episode": number,
                        "kind": one["kind"],
                        "loss": -now.gather(-1, target[:, None]).mean().item(),
                        "kl": max((full.exp() * (full - now)).sum(-1).mean().item(), 0.0),
                        "exact": bool((now.argmax(-1) == target).all()),
                    }
                )
            print(case["text"], name, kept, flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
