"""Runs a demonstration: film by film, question by question, each by both methods in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vecattention.demo import ask, films, maps, mass
from vecattention.demo.films import Film, Question
from vecattention.demo.results import Result, Row, row
from vecattention.demo.settings import NEEDLES, Settings, check
from vecattention.integrations.capture import Captured, capture
from vecattention.testbed import COLOURS, load, prepare

STRIDE = 4096
"""Seeds between those of two demonstrations; film number i of one has the seed STRIDE * seed + i."""

TIMINGS = 3
"""Questions about the longer film, whose times are the second pair of rows."""

SHORT, LONG = 4, 32
"""Most new tokens of an answer: of the small model, which says one word, and of any other."""

Report = Callable[[str, float], None]
"""Told what is being done, and how much of the work, in vision tokens read, was done since it was last told."""


@dataclass(frozen=True)
class Seen:
    """What the layers' attention was given, and the film's tokens, [start, end), in the sequence."""

    layers: Mapping[int, Captured]
    span: tuple[int, int]


@dataclass(frozen=True)
class Shown:
    """What the picture shows: a film, the question, what each method said, and one head's map."""

    film: Film
    question: Question
    said: Mapping[str, str]
    map: maps.Map
    layers: int
    heads: int


@dataclass(frozen=True)
class Outcome:
    """All results, the rows of the table made from them, what to show, and remarks for the reader.

    Attributes:
        film: the bytes of the shown film's file; None when it was given.
    """

    settings: Settings
    results: tuple[Result, ...]
    rows: tuple[Row, ...]
    shown: Shown
    film: bytes | None
    remarks: tuple[str, ...]


def work(settings: Settings) -> float:
    """How much there is to do, in vision tokens read."""
    if settings.video is not None:
        return float(settings.tokens * 2 * len(settings.questions))
    short = settings.tokens * len(settings.depths) * settings.films * NEEDLES
    return float((short + settings.timing_tokens * TIMINGS) * 2)


@torch.no_grad()
def run(settings: Settings, report: Report) -> Outcome:
    """Make or take the films, ask the questions, measure.

    Raises:
        ValueError: settings that cannot serve; a video, a model or a question that cannot be read.
    """
    check(settings)
    demo = Demo(settings, report)
    with tempfile.TemporaryDirectory(prefix="vecattention-demo.") as folder:
        return demo.run(Path(folder))


class Demo:
    """One demonstration: the loaded model and what was found so far."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings, self._report = settings, report
        report("loading the model", 0)
        self.model, self.processor = load(settings.model, getattr(torch, settings.dtype), settings.device)
        self.methods = ask.methods(settings.apply)
        self.results: list[Result] = []
        self.rows: list[Row] = []
        self._remarks: dict[str, None] = {}

    def run(self, folder: Path) -> Outcome:
        """Everything, with a folder for the files of made films."""
        settings = self.settings
        if settings.video is not None:
            given = films.take(settings.video, settings.questions)
            film, seen = self._length([lambda: given], "the film")
        else:
            film, seen = self._length(self._makers(folder, settings.tokens), f"{settings.tokens:,} tokens")
            if settings.timing_tokens:
                longer = self._makers(folder, settings.timing_tokens)[:1]
                self._length(longer, f"{settings.timing_tokens:,} tokens", TIMINGS)
        shown = self._shown(film, seen)
        made = film.path.read_bytes() if film.movie is not None else None
        return Outcome(settings, tuple(self.results), tuple(self.rows), shown, made, tuple(self._remarks))

    def _makers(self, folder: Path, tokens: int) -> list[Callable[[], Film]]:
        """Functions that make the films of one length, the one to be shown first: the middle one of the depths."""
        settings = self.settings
        middle = settings.depths[(len(settings.depths) - 1) // 2]
        depths = sorted(settings.depths * settings.films, key=lambda depth: (depth != middle, depth))
        first = STRIDE * settings.seed

        def maker(number: int, depth: float) -> Callable[[], Film]:
            path = folder / f"{tokens}-{number}.mp4"
            return lambda: films.make(path, first + number, tokens, NEEDLES, depth)

        return [maker(number, depth) for number, depth in enumerate(depths)]

    def _length(self, makers: list[Callable[[], Film]], name: str, questions: int | None = None) -> tuple[Film, Seen]:
        """Ask about all films of one length, and add their rows; the first film, and what attention was given in it."""
        begun = len(self.results)
        film = self._film(makers, 0, name, questions)
        self._report(f"{name}: looking at its attention", 0)
        seen = self._look(film)
        recall = mass.mean_recall(seen.layers.values(), seen.span, self.settings.rule)
        for number in range(1, len(makers)):
            self._film(makers, number, name, questions)
        for method in self.methods:
            mine = [r for r in self.results[begun:] if r.method == method.name]
            self.rows.append(row(mine, 1.0 if method.name == ask.FULL else recall))
        return film, seen

    def _film(self, makers: list[Callable[[], Film]], number: int, name: str, questions: int | None) -> Film:
        """Make or take one of the films, and ask its questions, all or so many."""
        where = f"{name}, film {number + 1} of {len(makers)}"
        self._report(f"{where}: {'drawing it' if self.settings.video is None else 'reading it'}", 0)
        film = makers[number]()
        for question in film.questions[:questions]:
            self._ask(film, question, number, where)
        return film

    def _ask(self, film: Film, question: Question, number: int, where: str) -> None:
        """One question by both methods; which is first changes from question to question."""
        inputs, tokens = self._inputs(film, question)
        if not self.results:
            self._report("warming up", 0)
            for method in self.methods:
                ask.ask(self.model, self.processor, inputs, method, 1)
        heard: dict[str, ask.Heard] = {}
        turn = len(self.results) // 2 % 2
        limit = SHORT if self.settings.model is None else LONG
        for method in self.methods[turn:] + self.methods[:turn]:
            self._report(f"{where}: {question.text}", 0)
            heard[method.name] = ask.ask(self.model, self.processor, inputs, method, limit)
            self._report(f"{where}: {question.text}", tokens)
        for name, got in sorted(heard.items(), key=lambda item: item[0] != ask.FULL):
            right = got.said == heard[ask.FULL].said
            if question.wanted is not None:
                right = films.is_right(got.said, question.wanted, COLOURS)
            times = got.attention_seconds, got.prefill_seconds
            self.results.append(Result(number, tokens, question, name, got.said, right, *times, got.density))
            self._remarks.update({f"stayed dense: {why}": None for why in got.why_dense})

    def _inputs(self, film: Film, question: Question) -> tuple[dict[str, Tensor], int]:
        """The model's inputs and how many vision tokens they hold."""
        most = self.settings.tokens if film.movie is None else film.movie.tokens
        inputs = prepare(self.processor, film.frames, film.fps, question.text, max_tokens=most)
        tokens = int((inputs["input_ids"] == self.model.config.video_token_id).sum())
        return ask.to_device(inputs, self.settings.device), tokens

    def _look(self, film: Film) -> Seen:
        """What attention is given when a film's first question is asked."""
        inputs, _ = self._inputs(film, film.questions[0])
        count = self.model.config.get_text_config().num_hidden_layers
        with capture(self.model, mass.layers_of(count)) as layers:
            self.model(**inputs, logits_to_keep=1)
        where = (inputs["input_ids"][0] == self.model.config.video_token_id).nonzero()
        return Seen(layers, (int(where[0]), int(where[-1]) + 1))

    def _shown(self, film: Film, seen: Seen) -> Shown:
        """What the picture shows of a film."""
        question, text = film.questions[0], self.model.config.get_text_config()
        tokens, total = seen.span[1] - seen.span[0], len(film.frames)
        said = {r.method: r.said for r in self.results if r.question == question and r.tokens == tokens}
        needles = film.movie.needles if film.movie is not None else ()
        spans = [(n.start_frame * tokens // total, max(-(-n.end_frame * tokens // total), 1)) for n in needles]
        asked = film.movie.asked if film.movie is not None else None
        focus = (asked.start_frame + asked.end_frame) * tokens // (2 * total) if asked is not None else tokens // 2
        drawn = maps.draw(seen.layers, seen.span, spans, focus, self.settings.rule)
        return Shown(film, question, said, drawn, text.num_hidden_layers, text.num_attention_heads)
