"""Two and four processes on the CPU (gloo) compute what one does."""

from __future__ import annotations

import pytest
import torch

from vecattention.integrations.context_parallel import Groups, ulysses_attention

ROUNDING = 2e-6  # float32; values of order 1


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("shape", "lengths", "arguments"), [
    ((1, 4, 4, 256, 256), None, {}),
    ((2, 8, 4, 200, 200), None, {"threshold": 0.3, "causal": True}),
    ((1, 4, 4, 128, 300), None, {"threshold": torch.tensor([0.1, 0.3, 0.6, 0.9])}),
    ((2, 4, 4, 152, 152), None, {"threshold": torch.rand(2, 4) * 0.8 + 0.1, "order": torch.tensor([1, 3, 0, 2])}),
    ((1, 4, 4, 152, 152), None, {"density": torch.tensor([0.1, 0.3, 0.6, 0.9]), "order": torch.tensor([1, 3, 0, 2])}),
    ((1, 4, 4, 152, 152), None, {"density": 0.2, "order": torch.tensor([1, 3, 0, 2])}),  # heads together
    ((2, 4, 4, 152, 152), None, {"coverage": 0.7, "max_scope": "row"}),
    ((1, 8, 4, 152, 152), None, {"order": torch.tensor([3, 2, 1, 0]), "q_block_size": 32, "max_scope": "row"}),
])  # fmt: skip
def test_ulysses_equals_one_process_bit_for_bit(pools, ranks, shape, lengths, arguments) -> None:
    answers = pools.run(ranks, "parallel.sharded", "attention", "ulysses", shape, lengths, arguments)
    assert [answer["same"] for answer in answers] == [True] * ranks


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
@pytest.mark.parametrize("lengths", [[50, 61, 38, 72], [64, 64, 64, 17]])
def test_uneven_lengths(pools, kind: str, lengths: list[int]) -> None:
    answers = pools.run(
        4, "parallel.sharded", "attention", kind, (1, 4, 4, sum(lengths), sum(lengths)), lengths, {"threshold": 0.4}
    )
    assert max(max(answer["out"], answer["lse"]) for answer in answers) <= 1.0


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_a_rank_with_as_many_rows_as_keys_among_others_that_have_not(pools, kind: str) -> None:
    answers = pools.run(
        4, "parallel.sharded", "attention", kind, (1, 4, 4, 227, 200), [50, 61, 44, 72], {"threshold": 0.4}
    )
    assert max(max(answer["out"], answer["lse"]) for answer in answers) <= 1.0


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("shape", "arguments"), [
    ((1, 4, 4, 256, 256), {}),
    ((2, 6, 3, 200, 200), {"threshold": 0.3}),  # any number of heads; shards end within blocks
    ((1, 3, 3, 128, 300), {"threshold": torch.tensor([0.1, 0.5, 0.9]), "q_block_size": 32}),
    ((2, 3, 3, 200, 200), {"density": 0.2}),  # one cut-off of all ranks
    ((1, 3, 3, 200, 328), {"coverage": torch.tensor([0.3, 0.6, 0.9]), "max_scope": "row", "q_block_size": 32}),
    ((1, 2, 2, 136, 136), {"threshold": 1.0, "max_scope": "row", "scale": 0.5}),  # most shards give a row no key
])  # fmt: skip
def test_ring_equals_one_process(pools, ranks, shape, arguments) -> None:
    answers = pools.run(ranks, "parallel.sharded", "attention", "ring", shape, None, arguments)
    assert max(max(answer["out"], answer["lse"]) for answer in answers) <= 1.0


@pytest.mark.parametrize("target", ["threshold", "density"])
@pytest.mark.parametrize("balance", [False, True])
def test_ulysses_inside_of_a_ring(pools, balance: bool, target: str) -> None:
    answers = pools.run(4, "parallel.sharded", "both", (2, 4, 4, 248, 248), balance, target)
    assert max(max(answer["out"], answer["lse"]) for answer in answers) <= 1.0
    assert all(answer["kept"] and answer["shards"] == 4 for answer in answers)


@pytest.mark.parametrize(("kind", "lengths"), [("ulysses", None), ("ring", None)])
def test_every_rank_gets_the_counts_of_all_heads(pools, kind, lengths) -> None:
    for answer in pools.run(4, "parallel.sharded", "counts", kind, (2, 4, 4, 200, 200), lengths):
        assert answer["kept"] == answer["wanted"] and len(set(map(str, answer["kept"][0]))) > 1


def test_what_does_not_fit_is_refused_by_name_on_every_rank(pools) -> None:
    wanted = [
        "query has 6 heads, wanted a multiple of the 4 ranks of group",
        "key has 2 heads, wanted a multiple of the 4 ranks",
        "lengths has 2 entries, wanted 4, one for each rank",
        "wanted the 64 tokens that this rank holds",
        "order has shape (3,), wanted (4,)",
        "causal is True, wanted False in a ring",
        "a rank holds 10 tokens, wanted at least q_block_size - 1 = 63",
        "threshold is 2.0, wanted a number in (0, 1]",
    ]
    for messages in pools.run(4, "parallel.sharded", "errors"):
        assert len(messages) == len(wanted)
        assert all(part in message for part, message in zip(wanted, messages, strict=True)), messages


def test_without_torch_distributed() -> None:
    x = torch.randn(1, 2, 64, 16)
    with pytest.raises(ValueError, match="group is None, wanted an initialized torch.distributed, got none"):
        ulysses_attention(x, x, x)
    assert Groups().shards == 1


def test_within_torch_compile(pools) -> None:
    assert max(pools.run(2, "parallel.sharded", "compiled")) < ROUNDING


@pytest.mark.parametrize(("ranks", "config", "heads"), [
    (2, {"ulysses_degree": 2}, 2), (4, {"ulysses_degree": 4}, 8),
])  # fmt: skip
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_wan_sharded_by_diffusers(pools, ranks, config, heads, dense_steps) -> None:
    for answer in pools.run(ranks, "parallel.sharded", "generation", config, heads, dense_steps, (16, 20)):
        assert answer["out"] < ROUNDING and answer["density"] == 0.0 and answer["pairs"]
        assert answer["sparse"] == (8 if dense_steps == 0 else 4) and answer["least"] < 0.9


@pytest.mark.parametrize(("ranks", "config"), [
    (2, {"ring_degree": 2}), (4, {"ring_degree": 4}), (4, {"ring_degree": 2, "ulysses_degree": 2}),
])  # fmt: skip
@pytest.mark.parametrize("target", ["threshold", "coverage"])
def test_wan_sharded_in_a_ring_by_diffusers(pools, ranks, config, target) -> None:
    for answer in pools.run(ranks, "parallel.sharded", "generation", config, 4, 0, (16, 20), target):
        assert answer["out"] < ROUNDING and answer["density"] < 1e-6 and answer["pairs"]
        assert answer["sparse"] == 8 and answer["least"] < 0.9


@pytest.mark.parametrize(("config", "heads", "message"), [
    ({"ulysses_degree": 2}, 3, "ulysses_degree is 2, wanted a divisor of the 3 attention heads"),
    ({"ulysses_degree": 2, "ulysses_anything": True}, 4, "ulysses_anything is True, wanted False"),
    ({"ring_degree": 2, "ring_anything": True}, 4, "ring_anything is True, wanted False"),
])  # fmt: skip
def test_apply_refuses_a_sharding_by_name_before_anything_runs(pools, config, heads, message) -> None:
    for answer in pools.run(2, "parallel.sharded", "refused", config, heads):
        assert message in answer
