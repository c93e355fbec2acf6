"""A coverage or a density from some of the blocks of queries: near that of all, the same whatever the split."""

from __future__ import annotations

import pytest
import torch

from vecattention import ops, targets
from vecattention.integrations import shares
from vecattention.integrations.context_parallel import Groups, parallel_attention

RULE = {"q_pooling_size": 16, "q_block_size": 16, "max_scope": "row", "causal": False}


def tensors(length: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, length, 16, generator=generator) for _ in range(2))
    return query * torch.tensor([1.0, 3.0])[None, :, None, None] + key.mean(2, keepdim=True), key


@pytest.mark.parametrize("asked", [{"density": 0.2}, {"density": torch.tensor([0.1, 0.4])}, {"coverage": 0.8}])
def test_a_sample_meets_the_target_nearly(asked: dict[str, object]) -> None:
    query, key = tensors()
    (kind, target), rule = next(iter(asked.items())), ops.rule_of(16, **RULE)
    exact = targets.alpha_for(query, key, torch.as_tensor(target), kind, rule)
    every = shares.at_cut_off(query, key, {**RULE, **asked}, q_len=4096)["alpha"]
    assert torch.equal(every, exact), "without a sample, and"
    assert torch.equal(shares.at_cut_off(query, key, {**RULE, **asked}, q_len=4096, sample=129)["alpha"], exact)
    some = shares.at_cut_off(query, key, {**RULE, **asked}, q_len=4096, sample=64)["alpha"]
    assert not torch.equal(some, exact)
    if kind == "density":
        met = ops.select_at(query, key, some, rule).density()
        assert ((met.mean() if isinstance(target, float) else met[0]) - torch.as_tensor(target)).abs().max() < 0.02
    else:
        assert (some - exact).abs().max() < 0.05 * exact.max()


def test_a_sample_is_of_the_whole_sequence_however_it_is_split() -> None:
    """Two parts that begin at blocks 0 and 81: their histograms add up to that of one process."""
    query, key = tensors()
    rule = ops.rule_of(16, **RULE)
    one = ops.histogram(query, key, "density", rule, 8)
    first, second = query[:, :, : 81 * 16], query[:, :, 81 * 16 :]
    parts = [ops.histogram(part, key, "density", rule, 8, start) for part, start in ((first, 0), (second, 81))]
    assert int(one.sum()) == int(sum(parts).sum()) == 2 * 32 * 16 * 4096  # type: ignore[arg-type]
    assert (one - sum(parts)).abs().sum() <= 1e-4 * one.sum(), "but for rounding of scores"
    assert not ops.histogram(query[:, :, :16], key, "density", rule, 8, 1).any(), "no block of it is counted"


@pytest.mark.parametrize("asked", [{"coverage": 0.5}, {"density": 0.5}])
def test_tensors_that_do_not_fit_are_named(asked: dict[str, float]) -> None:
    query, key = tensors(128)
    with pytest.raises(ValueError, match="query has 2 heads, wanted a multiple of key's 4"):
        parallel_attention(query, key.repeat(1, 2, 1, 1), key.repeat(1, 2, 1, 1), groups=Groups(), **RULE, **asked)


def test_the_pass_says_what_it_was_when_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    query, key = tensors(128)
    monkeypatch.setattr(targets, "histogram", full)
    with pytest.raises(
        torch.OutOfMemoryError, match="^CUDA out of memory.*the pass over the scores that a coverage asks"
    ):
        shares.at_cut_off(query, key, {**RULE, "coverage": 0.5}, q_len=128)


def test_other_lengths_are_not_compiled_anew() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    call = torch.compile(
        lambda q, k: parallel_attention(q, k, k, groups=Groups(), sample=4, coverage=0.7, **RULE)[0],
        backend=counter, fullgraph=True,
    )  # fmt: skip
    query, key = tensors()
    for length in range(512, 512 + 12 * 48, 48):
        call(query[:, :, :length], key[:, :, :length])
    assert counter.frame_count <= 3


def test_a_sample_serves_one_process_too() -> None:
    query, key = tensors()
    arguments = {**RULE, "density": 0.2}
    out, _, kept = parallel_attention(query, key, key, groups=Groups(), sample=64, **arguments)
    assert abs(float(kept.sum()) / (2 * 4096**2) - 0.2) < 0.02
    alpha = shares.at_cut_off(query, key, arguments, q_len=4096, sample=64)["alpha"]
    assert torch.equal(out, ops.counted(query, key, key, alpha=alpha, **RULE)[0])


def test_a_threshold_is_left_alone() -> None:
    query, key = tensors(128)
    arguments = {**RULE, "threshold": 0.5}
    assert shares.at_cut_off(query, key, arguments, q_len=128, sample=4) is arguments
