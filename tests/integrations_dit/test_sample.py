"""The blocks that a pipeline looks at are enough for its targets."""

from __future__ import annotations

import pytest
import torch

from vecattention import ops, targets
from vecattention.evals.fidelity.synthetic import synthetic
from vecattention.integrations import shares
from vecattention.integrations.dit import processors


@pytest.mark.parametrize(("kind", "target"), [("coverage", 0.9), ("density", 0.4)])
def test_what_pipelines_look_at_meets_the_target_on_all(kind: str, target: float) -> None:
    """Maps like those of video, 256 blocks: within a tenth, a coverage in each head, a density in the mean of heads."""
    one = synthetic(0, 32, 16, 16, causal=False)
    given = {"q_pooling_size": 32, "q_block_size": 32, "max_scope": "row", "causal": False}
    limit = {kind: torch.full((8,), target, dtype=torch.float64)}
    sample = processors.SAMPLE[kind]
    alpha = shares.at_cut_off(one.query, one.key, {**given, **limit}, q_len=8192, sample=sample)["alpha"]
    taken = ops.histogram(one.query, one.key, kind, ops.rule_of(64, **given))
    reached = taken.cumsum(-1).gather(-1, targets.bin_of(alpha).long()[..., None] + 1)[..., 0]
    all_of_it = taken.sum(-1) if kind == "coverage" else 8192**2
    missed = (reached / all_of_it / target - 1).abs()
    assert 0 < (missed.max() if kind == "coverage" else missed.mean()) < 0.1
