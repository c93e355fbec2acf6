"""Writes what a demonstration found: the picture, the film and the record."""

from __future__ import annotations

from pathlib import Path

from vecattention.atomic import replacing
from vecattention.demo import ask, picture, record
from vecattention.demo.run import Outcome


def write(outcome: Outcome) -> list[tuple[Path, str]]:
    """Write into the settings' folder, which is made if need be: each file whole or not at all.

    Returns:
        The paths, and what each is.
    """
    out = outcome.settings.out
    out.mkdir(parents=True, exist_ok=True)
    image, log, film = out / "demo.png", out / "demo.jsonl", out / "demo.mp4"
    picture.save(outcome.shown.film, outcome.shown.map, caption(outcome), image)
    written = [(image, "the film, the needles and one head's attention")]
    if outcome.film is not None:
        with replacing(film) as name:
            Path(name).write_bytes(outcome.film)
        written.append((film, "the film of the picture"))
    record.save(outcome, log)
    return [*written, (log, "the record: machine, versions, settings, every answer")]


def caption(outcome: Outcome) -> picture.Caption:
    """The words on the picture."""
    shown, row = outcome.shown, next(r for r in outcome.rows if r.method == ask.SPARSE)
    head = f"layer {shown.map.layer + 1} of {shown.layers}, head {shown.map.head + 1} of {shown.heads}"
    return picture.Caption(
        shown.question.text,
        tuple(shown.said.items()),
        (f"{head}, {shown.map.tokens:,} vision tokens", f"VecAttention attends {100 * row.density:.1f} % of the pairs"),
    )
