"""Which rows are real, which keys they see, which are sparse: against a plain count, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecattention.integrations.layout import Part, parts
from vecattention.integrations.masks import CausalSpans, attention_mask


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    batch, rows, first = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.sampled_from([0, 0, 7, 16]))
    last = first + rows

    def span(end: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(0, end), st.integers(0, end)).map(lambda ends: (min(ends), max(ends)))

    spans = draw(st.none() | st.lists(span(last), min_size=batch, max_size=batch).map(tuple))
    vision = draw(st.none() | st.lists(st.none() | span(last + 10), min_size=batch, max_size=batch))
    mask = CausalSpans(first, rows, spans, lambda: None)
    return {"mask": mask, "batch": batch, "vision": vision, "min_length": draw(st.sampled_from([0, 1, 9, 30]))}


@settings(max_examples=400, deadline=None)
@given(problems())
def test_each_row_is_where_it_belongs(problem: dict[str, Any]) -> None:
    mask, batch, vision, least = (problem[name] for name in ("mask", "batch", "vision", "min_length"))
    found = parts(**problem)
    assert [b for part in found for b in range(batch)[part.batch]] == list(range(batch))
    for part in found:
        for b in range(batch)[part.batch]:
            start, end = mask.spans[b] if mask.spans else (0, mask.last)
            real = [i for i in range(mask.rows) if start <= mask.first + i < end]
            assert list(range(mask.rows))[part.rows] == real
            if not real:
                continue
            keys = range(mask.last)[part.keys]
            for i, row in enumerate(real):  # bottom-right aligned: the row sees the real keys up to itself
                assert list(keys[: part.before + i + 1]) == list(range(start, mask.first + row + 1))
            want = (0, mask.last) if vision is None else vision[b]
            wanted = [] if want is None else [i for i, row in enumerate(real) if want[0] <= mask.first + row < want[1]]
            if wanted and part.before + wanted[-1] + 1 < least:
                wanted = []
            assert list(range(part.low, part.high)) == wanted


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from([1, 4, 16]))
def test_pairs_are_counted_row_by_row(problem: dict[str, Any], block: int) -> None:
    for part in parts(**problem):
        elements = part.batch.stop - part.batch.start
        seen = [part.before + i + 1 for i in range(part.count)]
        assert part.all_pairs == elements * sum(seen)
        first = part.low // block * block
        assert part.first_block(block) == first
        sparse = seen[first : part.high] if part.high > part.low else []
        assert part.sparse_pairs(block) == elements * sum(sparse)


def test_elements_that_are_alike_share_a_part() -> None:
    plain = CausalSpans(0, 300, None, lambda: None)
    assert parts(plain, 5, None, 129) == (Part(slice(0, 5), slice(0, 300), slice(0, 300), 0, 300),)
    padded = CausalSpans(0, 300, ((0, 300), (0, 300), (50, 300)), lambda: None)
    assert [part.batch for part in parts(padded, 3, None, 129)] == [slice(0, 2), slice(2, 3)]
    assert [part.batch for part in parts(plain, 2, [(10, 200), (10, 201)], 129)] == [slice(0, 1), slice(1, 2)]


def mask_of(**changes: Any) -> Any:
    wish = {"batch_size": 2, "q_length": 6, "kv_length": 6, "device": "cpu", "attention_mask": None}
    return attention_mask(**{**wish, **changes})


def padding(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row] for row in rows])


@pytest.mark.parametrize(
    "changes, spans",
    [
        ({"attention_mask": padding("111111", "001111")}, ((0, 6), (2, 6))),
        ({"attention_mask": padding("111100", "111111")}, ((0, 4), (0, 6))),
        ({"attention_mask": padding("000000", "111111")}, ((6, 6), (0, 6))),
        ({"kv_length": 9, "q_offset": 3}, None),
        ({"kv_length": 9, "q_offset": torch.tensor(3)}, None),
        ({"kv_length": 12, "q_offset": 3, "attention_mask": padding("111111111", "011111111")}, ((0, 9), (1, 9))),
        ({"kv_length": 9, "q_offset": 3, "attention_mask": padding("11111111", "11111111")}, ((0, 8), (0, 8))),
    ],
)
def test_bounds_of_masks(changes: dict[str, Any], spans: Any) -> None:
    mask = mask_of(**changes)
    assert isinstance(mask, CausalSpans)
    assert (mask.first, mask.rows, mask.spans) == (int(changes.get("q_offset", 0)), 6, spans)
    assert mask.dense() is mask.dense(), "made once"
    shown = torch.zeros(2, 1, 6, changes.get("kv_length", 6), dtype=torch.bool)
    for b, (start, end) in enumerate(spans or ((0, mask.last),) * 2):
        for i in range(6):
            shown[b, 0, i, start : min(end, mask.first + i + 1)] = True
    assert torch.equal(torch.as_tensor(mask.dense()), shown)
    assert mask_of(attention_mask=mask) is mask, "one that was made ahead"


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_mask": padding("111111", "111111")}, {"kv_length": 9, "q_offset": 0}],
)
def test_nothing_to_bound(changes: dict[str, Any]) -> None:
    assert mask_of(**changes) is None


def test_masks_of_other_kinds_are_those_of_sdpa() -> None:
    from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

    window = {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3}
    hole = {"attention_mask": padding("110111", "111111")}
    for changes in (window, hole, {"allow_is_causal_skip": False}, {"q_length": 1, "kv_length": 6, **hole}):
        wish = {"batch_size": 2, "q_length": 6, "kv_length": 6, "device": "cpu", **changes}
        assert torch.equal(mask_of(**changes), sdpa_mask(**wish))
