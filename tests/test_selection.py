"""`Selection` in its own terms: mask, columns, density and counts of any bits, and how it refuses."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import brute
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import sample

import vecattention as va
from vecattention import bits, spec


@st.composite
def selections(draw: st.DrawFn) -> va.Selection:
    """Any bits at all: blocks that lack their own keys, hold future ones, or nothing."""
    causal, block = draw(st.booleans()), draw(st.sampled_from([16, 32, 48, 64, 128]))
    q_len = draw(st.integers(1, 300))
    k_len = q_len + draw(st.integers(0, 150)) if causal else draw(st.integers(1, 400))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))
    kept = torch.rand(2, 3, math.ceil(q_len / block), k_len, generator=numbers) < share
    return va.Selection(bits.pack(kept), q_len, k_len, block, causal)


@given(selection=selections())
@settings(max_examples=100)
def test_mask_columns_and_counts_agree(selection: va.Selection) -> None:
    kept = bits.unpack(selection.words, selection.k_len)
    mask = selection.mask()
    assert torch.equal(mask, brute.mask(kept, selection.q_len, selection.k_len, selection.block, selection.causal))
    assert torch.equal(selection.kept_pairs(), mask.sum((-1, -2)))
    pairs = spec.allowed_pairs(selection.q_len, selection.k_len, selection.causal)
    assert torch.equal(selection.density(), (mask.sum((-1, -2)).double() / pairs).float())
    assert selection.density().dtype == torch.float32 and selection.density().shape == (2, 3)
    for g in range(selection.blocks):
        rows = mask[:, :, g * selection.block : (g + 1) * selection.block].any(2)
        for b in range(2):
            for h in range(3):
                columns = selection.columns(b, h, g)
                assert columns.dtype == torch.int64
                assert torch.equal(columns, rows[b, h].nonzero().squeeze(-1))


@given(selection=selections())
@settings(max_examples=50)
def test_attend_follows_any_selection(selection: va.Selection) -> None:
    query, key, value = sample(2, 3, 1, selection.q_len, selection.k_len, 16)
    rows = selection.mask()
    outs = [
        va.attend(query, key, value, selection, return_lse=True, backend=backend) for backend in ("reference", "cpu")
    ]
    for out, lse in outs:
        assert torch.equal(lse == -torch.inf, ~rows.any(-1))
        assert not out[~rows.any(-1)].any()
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)


@given(q_len=st.integers(1, 60), more=st.integers(0, 60))
def test_allowed_pairs_counts_what_the_rows_may_see(q_len: int, more: int) -> None:
    k_len = q_len + more
    assert spec.allowed_pairs(q_len, k_len, True) == sum(i + more + 1 for i in range(q_len))
    assert spec.allowed_pairs(q_len, k_len, True) == spec.causal_mask(q_len, k_len, torch.device("cpu")).sum()
    assert spec.allowed_pairs(k_len, q_len, False) == q_len * k_len


@given(q_len=st.integers(1, 300), more=st.integers(0, 100), chunk=st.integers(1, 400), causal=st.booleans())
def test_chunks_of_queries_cover_each_row_once_and_end_at_their_own_position(
    q_len: int, more: int, chunk: int, causal: bool
) -> None:
    parts = list(spec.query_chunks(q_len, q_len + more, chunk, causal))
    assert [i for rows, _ in parts for i in range(rows.start, rows.stop)] == list(range(q_len))
    for rows, keys in parts:
        assert (keys.start, keys.stop) == (0, rows.stop + more if causal else q_len + more)


@given(
    batch=st.integers(1, 5), kv_heads=st.integers(1, 6), group=st.integers(1, 8), most=st.integers(1, 300)
)  # fmt: skip
def test_chunks_of_heads_cover_each_head_once_with_its_own_keys(
    batch: int, kv_heads: int, group: int, most: int
) -> None:
    parts = list(spec.head_chunks(batch, kv_heads * group, kv_heads, most))
    found = [(b, h) for bs, hs, _ in parts for b in range(bs.start, bs.stop) for h in range(hs.start, hs.stop)]
    assert found == list(itertools.product(range(batch), range(kv_heads * group)))
    for bs, hs, ks in parts:
        heads, keys = hs.stop - hs.start, ks.stop - ks.start
        assert (bs.stop - bs.start) * heads <= most
        assert all((hs.start + i) // group == ks.start + i // (heads // keys) for i in range(heads))


def test_density_of_a_long_selection_is_exact_in_float32() -> None:
    """More pairs than float32 counts exactly."""
    words = torch.full((1, 1, 512, 1024), -1, dtype=torch.int32)
    selection = va.Selection(words, 32768, 32768, 64, True)
    assert selection.kept_pairs().item() == 32768 * 32769 // 2
    assert selection.density().item() == 1.0


def test_a_mask_that_is_too_large_is_refused_with_a_way_out() -> None:
    words = torch.zeros(1, 1, 512, 1024, dtype=torch.int32)
    wanted = (
        "mask() wanted at most 2**28 = 268435456 entries, got 1073741824 for Sq=32768, Sk=32768; "
        "look at single blocks with columns(b, h, g), or at density()"
    )
    with pytest.raises(ValueError, match=re.escape(wanted)):
        va.Selection(words, 32768, 32768, 64, True).mask()


@pytest.mark.parametrize(("at", "name", "last"), [((1, 0, 0), "b", 0), ((0, 2, 0), "h", 1), ((0, 0, 4), "g", 3),
                                                  ((0, 0, -1), "g", 3), ((-1, 0, 0), "b", 0)])  # fmt: skip
def test_columns_refuses_what_does_not_exist(at: tuple[int, int, int], name: str, last: int) -> None:
    query, key, _ = sample()
    wanted = rf"{name} is {at['bhg'.index(name)]}, wanted 0 to {last} of \(batch, heads, blocks\) = \(1, 2, 4\); "
    with pytest.raises(IndexError, match=wanted + "blocks hold 64 rows"):
        va.select(query, key).columns(*at)


def test_a_selection_is_a_value() -> None:
    query, key, _ = sample()
    selection = va.select(query, key)
    with pytest.raises(AttributeError):
        selection.block = 32  # type: ignore[misc]
    assert replace(selection, block=32).block == 32


@given(values=st.lists(st.booleans(), max_size=200), offset=st.integers(0, 9))
def test_bits_come_back_from_any_place_in_memory(values: list[bool], offset: int) -> None:
    kept = torch.tensor([False] * offset + values, dtype=torch.bool)[offset:]
    words = bits.pack(kept)
    assert words.shape == (bits.words_for(len(values)),)
    assert torch.equal(bits.unpack(words, len(values)), kept)
    assert int(bits.popcount(words).sum()) == sum(values)
    for j, value in enumerate(values):
        assert bool(int(words[j // 32]) >> (j % 32) & 1) == value


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8))
def test_popcount_counts_every_word(words: list[int]) -> None:
    counted = bits.popcount(torch.tensor(words, dtype=torch.int32)).tolist()
    assert counted == [(word % 2**32).bit_count() for word in words]


@given(limits=st.lists(st.integers(-10, 400), min_size=1, max_size=5), keys=st.integers(1, 300))
def test_below_sets_the_bits_before_each_limit(limits: list[int], keys: int) -> None:
    got = bits.unpack(bits.below(torch.tensor(limits), keys), keys)
    assert torch.equal(got, torch.arange(keys) < torch.tensor(limits)[:, None])
