"""The tables of a demonstration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vecattention.demo import ask
from vecattention.demo.results import Row, by_depth
from vecattention.demo.run import Outcome


def heading(outcome: Outcome) -> str:
    """What ran where, and by which rule: two lines."""
    asked, rule = outcome.settings, outcome.settings.rule
    model = asked.model.name if asked.model is not None else "the small trained Qwen2.5-VL"
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU thread{'s' * (threads > 1)}"
    place = cpu if asked.device == "cpu" else torch.cuda.get_device_name()
    sizes = f"threshold {rule['threshold']}, blocks of {rule['q_block_size'] or rule['q_pooling_size']} queries"
    return f"{model}, {asked.dtype}, {place}\n{ask.SPARSE}: {sizes}, {rule['max_scope']} rule, text rows dense"


def figures(outcome: Outcome) -> Table:
    """Each method on the films of each length: right answers, density, recall and times, with the gain over full."""
    given = outcome.settings.video is not None
    table = Table(box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("vision tokens", justify="right")
    table.add_column("method")
    for name in ("same answer" if given else "right", "density", "recall", "attention", "whole prefill"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in _pairs(outcome.rows):
        for row in pair:
            table.add_row(*_cells(row, pair[0]), style="bold" if row.method == ask.SPARSE else None)
        table.add_section()
    return table


def _pairs(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """The rows of each length together, full attention first."""
    return [rows[i : i + 2] for i in range(0, len(rows), 2)]


def _cells(row: Row, full: Row) -> list[str]:
    first = row.method == full.method
    return [
        f"{row.tokens:,}" if first else "",
        row.method,
        f"{row.right} of {row.asked}",
        f"{100 * row.density:.1f} %",
        f"{row.recall:.3f}",
        _time(row.attention_seconds[1], full.attention_seconds[1], first),
        _time(row.prefill_seconds[1], full.prefill_seconds[1], first),
    ]


def _time(seconds: float, full: float, first: bool) -> str:
    if not seconds:  # calls that are too short to be timed on a GPU
        return "not timed       "
    gain = f" ({full / seconds:3.1f}x)" if full and not first else "       "
    return f"{seconds:.3f} s{gain}"


def depths(outcome: Outcome) -> Table:
    """Right answers by where in the film the needle was."""
    table = Table(box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("right answers, needle at")
    short = [r for r in outcome.results if r.tokens == outcome.rows[0].tokens]
    parts = len(by_depth(short, ask.FULL))
    for i in range(parts):
        table.add_column(f"{100 * i // parts}-{100 * (i + 1) // parts} %", justify="right")
    for method in (ask.FULL, ask.SPARSE):
        cells = [f"{right} of {asked}" if asked else "-" for right, asked in by_depth(short, method)]
        table.add_row(method, *cells, style="bold" if method == ask.SPARSE else None)
    return table


def answers(outcome: Outcome) -> Table:
    """What each method said to each question about a given film."""
    table = Table(box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("question", ask.FULL, ask.SPARSE):
        table.add_column(name)
    for full, sparse in zip(outcome.results[::2], outcome.results[1::2], strict=True):
        table.add_row(full.question.text, full.said, sparse.said)
    return table
