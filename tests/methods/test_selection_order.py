"""`Selection.order`: rows that lie apart share a list of keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vecattention import Selection, attend, bits
from vecattention.recall import recall

LENGTH, KEYS, BLOCK = 150, 203, 32


@pytest.fixture
def ordered() -> tuple[Selection, Tensor]:
    """A random selection of other blocks for every head, and its mask written row by row."""
    dice = torch.Generator().manual_seed(0)
    blocks = -(-LENGTH // BLOCK)
    lists = torch.rand(2, 4, blocks, KEYS, generator=dice) < 0.3
    order = torch.rand(2, 4, LENGTH, generator=dice).argsort(-1)
    mask = torch.zeros(2, 4, LENGTH, KEYS, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            for place, row in enumerate(order[b, h].tolist()):
                mask[b, h, row] = lists[b, h, place // BLOCK]
    return Selection(bits.pack(lists), LENGTH, KEYS, BLOCK, False, order), mask


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(1)
    shapes = (2, 4, LENGTH, 16), (2, 2, KEYS, 16), (2, 2, KEYS, 16)
    query, key, value = (torch.randn(shape, generator=dice) for shape in shapes)
    return query, key, value


def test_mask_density_and_columns(ordered: tuple[Selection, Tensor]) -> None:
    selection, mask = ordered
    assert torch.equal(selection.mask(), mask)
    torch.testing.assert_close(selection.density(), mask.float().mean((-1, -2)))
    assert selection.order is not None
    row = int(selection.order[1, 2, BLOCK])
    assert torch.equal(selection.columns(1, 2, 1), mask[1, 2, row].nonzero().squeeze(1))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_attend_and_recall(ordered: tuple[Selection, Tensor], backend: str) -> None:
    selection, mask = ordered
    query, key, value = tensors()
    wide_k, wide_v = (x.repeat_interleave(2, dim=1) for x in (key, value))
    logits = query @ wide_k.mT / 4
    hidden = logits.masked_fill(~mask, -torch.inf)
    out, lse = attend(query, key, value, selection, return_lse=True, backend=backend)
    torch.testing.assert_close(out, torch.softmax(hidden, -1) @ wide_v, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, hidden.logsumexp(-1), rtol=0, atol=1e-5)
    wanted = (torch.softmax(logits, -1) * mask).sum(-1).mean(-1)
    torch.testing.assert_close(recall(query, key, selection), wanted, rtol=0, atol=1e-5)


def test_the_order_moves_the_result(ordered: tuple[Selection, Tensor]) -> None:
    selection, _ = ordered
    assert not torch.equal(attend(*tensors(), selection), attend(*tensors(), replace(selection, order=None)))


def test_orders_that_do_not_fit_are_refused(ordered: tuple[Selection, Tensor]) -> None:
    selection, _ = ordered
    query, key, value = tensors()
    assert selection.order is not None
    for bad, message in [
        (
            replace(selection, order=selection.order[0]),
            r"selection.order is torch.int64 \(4, 150\), wanted int64 \(2, 4, ",
        ),
        (replace(selection, order=selection.order.int()), "selection.order is torch.int32"),
        (replace(selection, causal=True), "selection has an order and causal=True, wanted one of them"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(query, key, value, bad)
