"""The progress bar of the demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def watched(work: float, how_far: str, run: Callable[[Callable[[str, float], None]], Result]) -> Result:
    """Run with a progress bar on stderr, where that is a terminal.

    Args:
        work: all that there is to do.
        how_far: what stands behind the bar, in rich's words.
        run: does it; it is given a function to call with what is done now and how much of the work is done since.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(28), TextColumn(how_far), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=work)
        return run(lambda what, done: progress.update(task, description=what, advance=done))
