"""What one selection keeps of dense attention, head by head, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from vecattention import dispatch, ops
from vecattention.evals.fidelity.dense import Head
from vecattention.evals.fidelity.samples import Sample
from vecattention.spec import Problem, Rule, Selection


@dataclass(frozen=True)
class Figures:
    """Of one selection on one sample, one number a query head.

    Attributes:
        density: kept over allowed pairs.
        recall: mean over rows of the dense softmax mass on the kept keys.
        l1, l2: relative error of the output against dense attention in float64.
    """

    density: list[float]
    recall: list[float]
    l1: list[float]
    l2: list[float]

    def row(self) -> dict[str, list[float]]:
        """As a dict of lists, rounded to 7 digits."""
        return {name: [float(f"{x:.7g}") for x in values] for name, values in asdict(self).items()}


def figures(sample: Sample, heads: list[Head], selection: Selection) -> Figures:
    """Attend the selection and compare with dense attention.

    Recall needs no map: a row's selected mass is exp(lse of the selected keys - lse of all keys).
    """
    answer = ops.attend(sample.query, sample.key, sample.value, selection, scale=sample.scale, return_lse=True)
    out, lse = answer[0][0].double(), answer[1][0].double()
    recall, l1, l2 = [], [], []
    for h, head in enumerate(heads):
        recall.append(float((lse[h] - head.lse).exp().mean()))
        miss = out[h] - head.out
        l1.append(float(miss.abs().sum() / head.out.abs().sum()))
        l2.append(float(miss.square().sum().sqrt() / head.out.square().sum().sqrt()))
    return Figures(selection.density()[0].tolist(), recall, l1, l2)


def times(sample: Sample, select: Callable[[], Selection], repeats: int) -> dict[str, list[float]]:
    """Seconds of the selection and of the attention over it, one warm-up and ``repeats`` runs each."""
    selection = select()

    def attend() -> object:
        return ops.attend(sample.query, sample.key, sample.value, selection, scale=sample.scale)

    return {"select": _seconds(sample, select, repeats), "attend": _seconds(sample, attend, repeats)}


def dense_times(sample: Sample, repeats: int) -> dict[str, list[float]]:
    """Seconds of torch's own dense attention on the sample."""
    query, key, value = sample.query, sample.key, sample.value

    def attend() -> object:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=sample.causal, scale=sample.factor, enable_gqa=query.shape[1] != key.shape[1]
        )

    return {"attend": _seconds(sample, attend, repeats)}


def device_name(sample: Sample) -> str:
    """The GPU's name, or "cpu"."""
    device = sample.query.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def where(sample: Sample, selection: Selection | None = None) -> dict[str, object]:
    """With what such times are taken: dtype, torch's threads, and the backend of the attention over a selection."""
    facts: dict[str, object] = {"dtype": str(sample.query.dtype).removeprefix("torch.")}
    facts["threads"] = torch.get_num_threads()
    if selection is not None:
        rule = Rule(selection.block, selection.block, causal=sample.causal, scale=sample.factor)
        problem = Problem.of(sample.query, sample.key, rule)
        facts["backend"] = next(name for name in dispatch.BACKENDS if not dispatch.why_not(name, problem))
    return facts


def _seconds(sample: Sample, call: Callable[[], object], repeats: int) -> list[float]:
    call()
    spent = []
    for _ in range(repeats):
        _wait(sample)
        start = time.perf_counter()
        call()
        _wait(sample)
        spent.append(time.perf_counter() - start)
    return spent


def _wait(sample: Sample) -> None:
    if sample.query.is_cuda:
        torch.cuda.synchronize(sample.query.device)
