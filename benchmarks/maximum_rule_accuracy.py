"""Right answers of the testbed's model under the two maximum rules, at the density that each threshold reaches.

    python benchmarks/maximum_rule_accuracy.py benchmarks/results/fidelity-accuracy.jsonl

Fresh films of 4,096 vision tokens, two questions each: with full attention, with sparse rows for the film alone
(vision_span="auto", the published way) and with all rows sparse, where the question's rows share a list too. A setting
with a density has a threshold for each head, calibrated on another film. One row of JSON a setting; finished ones are
skipped.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import vecattention
from vecattention.evals.fidelity.captured import capture_movies
from vecattention.evals.fidelity.records import Records, provenance
from vecattention.ops import rule_of
from vecattention.targets import alpha_for
from vecattention.testbed import answer, load, movies, prepare, question_for

FILMS, QUESTIONS, TOKENS, FIRST = 24, 2, 4096, 9_000_000
WINDOW: dict[str, Any] = {"max_scope": "window"}
ROW: dict[str, Any] = {"max_scope": "row"}
WIDE: dict[str, Any] = {"max_scope": "row", "q_pooling_size": 32, "q_block_size": 128}
AUTO: dict[str, Any] = {"vision_span": "auto"}
SETTINGS: list[dict[str, Any]] = [
    *({"density": density} | WIDE for density in (0.05, 0.1)),
    {"density": 0.1} | WINDOW,
    *({"threshold": theta} | WINDOW for theta in (1.0, 0.95, 0.9, 0.8)),
    *({"threshold": theta, "group_k_block": group} | WINDOW
      for group, theta in ((4, 1.0), (64, 0.9), (64, 0.6), (8192, 0.6), (8192, 0.1))),
    *({"threshold": 0.9, "q_pooling_size": pool, "q_block_size": 128} | WINDOW | more
      for pool in (64, 32) for more in ({}, AUTO)),
    *({"threshold": theta} | ROW for theta in (0.9, 0.5, 0.1)),
    *({"threshold": theta} | WIDE for theta in (0.5, 0.1)),
    *({"threshold": theta} | WINDOW | AUTO for theta in (1.0, 0.9)),
    *({"threshold": theta} | ROW | AUTO for theta in (0.9, 0.5)),
    *({"threshold": theta} | WIDE | AUTO for theta in (0.9, 0.5)),
]  # fmt: skip


def main(path: str) -> None:
    """Measure what is not there yet."""
    records = Records(path)
    model, processor = load()
    asked = []
    for film in range(FILMS):
        movie = movies.make(seed=FIRST + film, tokens=TOKENS, needles=8, depth=(film + 0.5) / FILMS)
        frames = movies.render(movie)
        others = [needle for needle in movie.needles if not needle.is_asked]
        for needle in [movie.asked, *others][:QUESTIONS]:
            asked.append((prepare(processor, frames, movie.fps, question_for(needle.shape)), needle.colour))
    for setting in [None, *SETTINGS]:
        key = {"study": "accuracy", "films": FILMS, "questions": QUESTIONS, "tokens": TOKENS, "setting": setting}
        if records.has(key):
            continue
        right, density = run(model, processor, asked, setting)
        records.add(key, {"right": right, "of": len(asked), "density": density} | provenance())
        print(setting, f"{right} of {len(asked)} right at density {density:.4f}", flush=True)


def run(model: Any, processor: Any, asked: list[tuple[Any, str]], setting: dict[str, Any] | None) -> tuple[int, float]:
    """Right answers, and the mean density over layers and heads (1 with full attention)."""
    with torch.no_grad():
        if setting is None:
            return sum(answer(model, processor, inputs) == colour for inputs, colour in asked), 1.0
        arguments = {"table": calibrated(**setting)} if "density" in setting else setting
        with vecattention.apply(model, **arguments) as sparse:
            right = sum(answer(model, processor, inputs) == colour for inputs, colour in asked)
        return right, sparse.stats.mean_density


def calibrated(density: float, **settings: Any) -> vecattention.ThresholdTable:
    """The threshold of each layer and head that reaches a density on one other film."""
    rows = []
    for one in capture_movies(tokens=TOKENS, seeds=(FIRST - 1,)):
        wanted = torch.full((one.query.shape[1],), density, dtype=torch.float64)
        rule = rule_of(one.query.shape[3], scale=one.scale, **settings)
        alpha = alpha_for(one.query, one.key, wanted, "density", rule)
        rows.append((-alpha[0].double()).exp().clamp(1e-30, 1.0).tolist())
    return vecattention.ThresholdTable(rows, **settings, provenance={"density": density})


if __name__ == "__main__":
    main(sys.argv[1])
