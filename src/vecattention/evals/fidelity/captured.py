"""Samples from a Qwen2.5-VL model that watches a procedural movie: the testbed's own, or a checkpoint directory."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import torch

from vecattention.evals.fidelity.samples import Sample
from vecattention.testbed import load, movies, prepare, question_for


def capture_movies(
    path: str | os.PathLike[str] | None = None,
    tokens: int = 8192,
    seeds: Sequence[int] = (0,),
    layers: Collection[int] | None = None,
    device: str | torch.device = "cpu",
) -> list[Sample]:
    """Queries, keys and values of a dense prefill of one movie a seed, with its question.

    Args:
        path: checkpoint directory of a Qwen2.5-VL model; None: the testbed's trained model.
        tokens: vision tokens of a movie at one token a frame pair, 8 needles in each.
        seeds: of the movies.
        layers: to capture; None for all.
        device: where the model runs; the samples are on the CPU.

    Raises:
        ValueError, ModelError: no such model or layer, or a movie too short.
    """
    from vecattention.integrations.capture import capture

    model, processor = load(path, device=device)
    samples = []
    for seed in seeds:
        movie = movies.make(seed=seed, tokens=tokens, needles=8, depth=0.5)
        question = question_for(movie.asked.shape)
        inputs = prepare(processor, movies.render(movie), movie.fps, question, max_tokens=tokens)
        with torch.no_grad(), capture(model, layers) as maps:
            model(**{name: value.to(device) for name, value in inputs.items()}, logits_to_keep=1)
        for layer, one in sorted(maps.items()):
            query, key, value = (x.cpu() for x in (one.query, one.key, one.value))
            samples.append(Sample(f"movie{seed}-layer{layer}", query, key, value, True, one.scaling))
    return samples
