"""The published kernel loses the P - B keys before each block whose number is a multiple of its tile of 64 pooled rows.

At P=64 these are the 48 keys before position 4,096, 8,192 and so on. No such hole here.
"""

from __future__ import annotations

import pytest
import torch
from strategies import sample

import vecattention as va
from vecattention import bits

LENGTH = 8192
each_scope = pytest.mark.parametrize("scope", ["window", "row"])
each_pool = pytest.mark.parametrize("pool", [64, 128])


@each_scope
@each_pool
def test_with_a_tiny_threshold_every_past_key_is_kept(scope: str, pool: int) -> None:
    query, key, _ = sample(heads=1, q_len=LENGTH, head_dim=16)
    selection = va.select(query, key, threshold=1e-300, q_pooling_size=pool, max_scope=scope, backend="cpu")
    ends = (torch.arange(selection.blocks) + 1) * pool
    assert torch.equal(bits.unpack(selection.words, LENGTH)[0, 0], torch.arange(LENGTH) < ends[:, None])
    assert selection.density().item() == 1.0


@each_scope
@each_pool
@pytest.mark.parametrize("threshold", [1.0, 0.9])
def test_the_best_keys_are_kept_where_the_hole_was(scope: str, pool: int, threshold: float) -> None:
    """Keys just before each block score highest of all, so that no rule may leave them out."""
    query, key, _ = sample(heads=1, q_len=LENGTH, head_dim=16)
    query, key = query * 0, key * 0
    query[..., 0] = 1.0
    for block in (4096, 8192 - pool):
        key[0, 0, block - pool : block, 0] = block / 1000  # those before the later block score higher still
        selection = va.select(query[:, :, : block + pool], key[:, :, : block + pool], threshold=threshold,
                              q_pooling_size=pool, max_scope=scope, backend="cpu")  # fmt: skip
        columns = selection.columns(0, 0, block // pool)
        assert torch.isin(torch.arange(block - pool, block + pool), columns).all()
        if scope == "row":
            assert torch.equal(columns, torch.cat([torch.arange(pool), torch.arange(block - pool, block + pool)]))


def test_one_new_block_after_8192_cached_keys_sees_them_all() -> None:
    query, key, value = sample(heads=1, q_len=64, k_len=LENGTH + 64, head_dim=16)
    assert va.select(query, key, threshold=1e-300).density().item() == 1.0
    out = va.vec_attention(query, key, value, threshold=1e-300)
    mask = torch.ones(64, LENGTH + 64, dtype=torch.bool).tril(LENGTH)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(out, dense)
