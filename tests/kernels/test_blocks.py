"""Rows as float32, a block at a time."""

from __future__ import annotations

import torch

from kvcompile.kernels.blocks import BLOCK, Scratch, blocks


def test_scratch_of_inference_mode_serves_outside_of_it() -> None:
    held, like = Scratch(), torch.zeros(2, 3)
    with torch.inference_mode():
        held.get("rows", like, torch.float32).fill_(1)
    assert held.get("rows", like, torch.float32).fill_(2).sum() == 12


def test_blocks_are_all_rows() -> None:
    rows = torch.randn(2, 3 + BLOCK // 64, 32, generator=torch.Generator().manual_seed(0)).half()
    found = [(start, stop, block.clone()) for start, stop, block in blocks(rows)]
    assert len(found) == 2
    assert [start for start, _, _ in found] == [0, found[0][1]]
    assert torch.equal(torch.cat([block for _, _, block in found], 1), rows.float())
