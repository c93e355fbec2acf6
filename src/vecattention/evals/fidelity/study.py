"""The studies of a fidelity run, as rows that are skipped when they are there: resumable at any point.

* run: where the rows that follow were made, and with what;
* oracle: best recall at each density for each granularity, per head;
* sweep: every candidate at every value of its knob: density, recall, output error, per head;
* matched: every candidate at three densities, its knob found by bisection over all samples;
* times: seconds of selection and attention at the settings that matched found, on the first sample;
* maximum: the row rule against windows of G tiles, running and final maximum, and top-p, at equal density;
* pooling: P queries pooled and R rows sharing a list, by the row rule and by the published window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vecattention.evals.fidelity import curves
from vecattention.evals.fidelity.candidates import CAUSAL, FREE, Candidate, matched, parse
from vecattention.evals.fidelity.dense import Head, dense
from vecattention.evals.fidelity.maximum import GROUPS
from vecattention.evals.fidelity.measure import dense_times, device_name, figures, times, where
from vecattention.evals.fidelity.records import Records, provenance
from vecattention.evals.fidelity.samples import Sample, fingerprint
from vecattention.spec import Rule

STUDIES = ("oracle", "sweep", "matched", "times", "maximum", "pooling")
DENSITIES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Densities, of all allowed pairs, at which curves are recorded."""

THETAS = (0.9, 0.8, 0.6, 0.4, 0.1, 0.01, 0.001, 1e-4)
PUBLISHED = {True: 16, False: 8192}
"""Published windows: of video understanding (causal), and of video generation."""

DENSE = "torch SDPA"
POOLS = ((16, 64), (32, 64), (64, 64), (16, 128), (32, 128), (64, 128), (128, 128))


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        data: name of the samples, for tables.
        studies: some of `STUDIES`.
        candidates: as `candidates.parse` reads them; None for the usual ones of the samples' mode.
        targets: densities of the matched study.
        repeats: timed runs of each call of the times study.
    """

    data: str
    studies: tuple[str, ...] = STUDIES
    candidates: tuple[str, ...] | None = None
    targets: tuple[float, ...] = (0.1, 0.2, 0.4)
    repeats: int = 5


@dataclass(frozen=True)
class Task:
    """One row to be: its key, and what makes its values."""

    key: dict[str, Any]
    make: Callable[[], dict[str, Any]]


def study(samples: Sequence[Sample], records: Records, plan: Plan, step: Callable[[int, int, str], None]) -> int:
    """Write every row of the plan that is not there yet; how many were.

    Args:
        samples: all causal or all not.
        records: the file.
        plan: what to measure.
        step: called before each row and at the end with rows done, rows in all and the row's description.

    Raises:
        ValueError: samples of both modes, or a plan that does not fit them.
    """
    if len({sample.causal for sample in samples}) != 1:
        raise ValueError(f"samples are {len(samples)} of both modes, wanted all causal or all not; measure them apart")
    tasks = list(_Tasks(samples, records, plan).all())
    written = 0
    for done, task in enumerate(tasks):
        step(done, len(tasks), " ".join(str(x) for x in task.key.values()))
        if records.has(task.key):
            continue
        if not written:
            _mark(records, samples, plan)
        records.add(task.key, task.make())
        written += 1
    step(len(tasks), len(tasks), "done")
    return written


def _mark(records: Records, samples: Sequence[Sample], plan: Plan) -> None:
    """Say where the rows that follow are made, unless the last such row of these samples says the same."""
    key = {"study": "run", "data": plan.data, "fingerprint": fingerprint(samples)}
    before = [row for row in records if row["key"].items() >= key.items()]
    facts = provenance()
    if not before or any(before[-1].get(name) != value for name, value in facts.items()):
        records.add(key | {"number": len(before)}, facts)


class _Tasks:
    """The rows of a plan; dense attention of a sample is computed when the first row asks for it."""

    def __init__(self, samples: Sequence[Sample], records: Records, plan: Plan) -> None:
        self.samples, self.records, self.plan = samples, records, plan
        usual = CAUSAL if samples[0].causal else FREE
        self.candidates = [parse(text) for text in plan.candidates or usual]
        self.mark = fingerprint(samples)
        self._dense: dict[int, list[Head]] = {}
        self._best: dict[int, curves.Best] = {}

    def all(self) -> Iterator[Task]:
        """Every row, those of one sample together."""
        for index in range(len(self.samples)):
            for name in ("oracle", "maximum", "pooling", "sweep"):
                if name in self.plan.studies:
                    yield from getattr(self, f"_{name}")(index)
        if "matched" in self.plan.studies:
            yield from self._matched()
        if "times" in self.plan.studies:
            yield from self._timed()

    def _key(self, study: str, sample: int | None = None, **more: Any) -> dict[str, Any]:
        where = {} if sample is None else {"sample": self.samples[sample].name}
        return {"study": study, "data": self.plan.data, "fingerprint": self.mark} | where | more

    def _heads(self, index: int) -> list[Head]:
        if index not in self._dense:
            sample = self.samples[index]
            heads, self._best[index] = [], curves.Best(sample, DENSITIES)
            for h in range(sample.query.shape[1]):
                head = dense(sample, h)
                self._best[index].add(head.units)
                heads.append(replace(head, units={}))  # the units are large, and done with
            self._dense[index] = heads
        return self._dense[index]

    def _oracle(self, index: int) -> Iterator[Task]:
        def make() -> dict[str, Any]:
            self._heads(index)
            return self._best[index].row()

        yield Task(self._key("oracle", index), make)

    def _sweep(self, index: int) -> Iterator[Task]:
        sample = self.samples[index]
        for one in self.candidates:
            for setting in one.knob.sweep if one.knob else (None,):

                def make(one: Candidate = one, setting: float | None = setting) -> dict[str, Any]:
                    return figures(sample, self._heads(index), one.select(sample, setting)).row()

                yield Task(self._key("sweep", index, method=one.label, setting=setting), make)

    def _matched(self) -> Iterator[Task]:
        for one in self.candidates:
            for target in self.plan.targets if one.knob else (1.0,):

                def make(one: Candidate = one, target: float = target) -> dict[str, Any]:
                    setting, reached = matched(one, self.samples, target) if one.knob else (None, 1.0)
                    rows = []
                    for index, sample in enumerate(self.samples):
                        found = figures(sample, self._heads(index), one.select(sample, setting)).row()
                        rows.append({"sample": sample.name, **found})
                    knob = one.knob.name if one.knob else None
                    return {"knob": knob, "setting": setting, "reached": reached, "samples": rows}

                yield Task(self._key("matched", method=one.label, target=target), make)

    def _timed(self) -> Iterator[Task]:
        sample, repeats = self.samples[0], self.plan.repeats
        device = device_name(sample)
        yield Task(
            self._key("times", device=device, method=DENSE),
            lambda: {"seconds": dense_times(sample, repeats)} | where(sample),
        )
        for one in self.candidates:
            for target in self.plan.targets if one.knob else (1.0,):

                def make(one: Candidate = one, target: float = target) -> dict[str, Any]:
                    setting = self._setting(one, target)
                    selection = one.select(sample, setting)
                    spent = times(sample, lambda: one.select(sample, setting), repeats)
                    density = float(selection.density().mean())
                    return {"setting": setting, "density": density, "seconds": spent} | where(sample, selection)

                yield Task(self._key("times", device=device, method=one.label, target=target), make)

    def _setting(self, one: Candidate, target: float) -> float | None:
        row = self.records.get(self._key("matched", method=one.label, target=target))
        if row is None:
            raise ValueError(
                f"the times study has no matched setting of {one.label} at density {target}, wanted one; "
                "run the matched study first"
            )
        setting: float | None = row["setting"]
        return setting

    def _maximum(self, index: int) -> Iterator[Task]:
        sample = self.samples[index]
        rules = [("row", "gap", curves.rule_for(sample)), ("top-p", "share", curves.rule_for(sample))]
        for group in GROUPS:
            rule = curves.rule_for(sample, scope="window", group=group)
            rules += [(f"window {group} running", "gap", rule), (f"window {group} final", "final", rule)]
        for name, measure, rule in rules:
            yield Task(self._key("maximum", index, rule=name), self._curve_of(index, rule, measure))

    def _pooling(self, index: int) -> Iterator[Task]:
        sample = self.samples[index]
        group = PUBLISHED[sample.causal]
        for name, scope in (("row", "row"), (f"window {group}", "window")):
            for pool, block in POOLS:
                rule = curves.rule_for(sample, pool, block, scope, group)
                key = self._key("pooling", index, rule=name, P=pool, R=block)
                yield Task(key, self._curve_of(index, rule, "gap"))

    def _curve_of(self, index: int, rule: Rule, measure: str) -> Callable[[], dict[str, Any]]:
        """Recall at equal density for each head alone and for all under one cut-off, and what thetas reach."""

        def make() -> dict[str, Any]:
            sample, heads = self.samples[index], self._heads(index)
            found = [curves.units(sample, h, rule, head.columns, measure) for h, head in enumerate(heads)]
            values: dict[str, Any] = {"densities": list(DENSITIES)}
            alone = [one.curve() for one in found]
            values["recall"] = [curves.rounded(one.recall(DENSITIES)) for one in alone]
            values["floor"] = curves.rounded([one.floor for one in alone])
            values["together"] = curves.rounded(curves.Units.join(found).curve().recall(DENSITIES))
            if measure != "share":
                reached = [[one.at(curves.alpha_of(theta)) for theta in THETAS] for one in found]
                values |= {"thetas": list(THETAS), "at": [[curves.rounded(pair) for pair in row] for row in reached]}
            return values

        return make
