"""Writes the table "what runs where" of the README from what the backends themselves say.

python docs/what_runs_where.py            prints it
python docs/what_runs_where.py --write    puts it into README.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from vecattention import dispatch, ops
from vecattention.spec import Problem

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
FP16, HALF = torch.float16, (torch.bfloat16, torch.float16)
PLACES = {
    "CPU, float32, bfloat16, float16": ("cpu", None, (torch.float32, *HALF)),
    "CPU, float64": ("cpu", None, (torch.float64,)),
    "H100, H200 (compute capability 9.0), bfloat16, float16": ("cuda", (9, 0), HALF),
    "other NVIDIA GPU from compute capability 8.0 on, bfloat16, float16": ("cuda", (8, 0), HALF),
    "NVIDIA GPU from compute capability 8.0 on, float32": ("cuda", (9, 0), (torch.float32,)),
    "older NVIDIA GPU, float16": ("cuda", (7, 5), (FP16,)),
    "NVIDIA GPU, float64": ("cuda", (9, 0), (torch.float64,)),
}
"""Device, compute capability and types of each row; the capability is what the backends are told, GPU or not."""

HEADS, LENGTH, DIM = 8, 4096, 128


def table() -> str:
    """The table in Markdown: a place and its types in each row, a backend in each column."""
    head = ["tensors", *(f"`{name}`" for name in dispatch.BACKENDS), '`backend="auto"` takes']
    rows = [head, ["---"] * len(head)]
    for place, (device, capability, dtypes) in PLACES.items():
        problems = [problem(device, dtype) for dtype in dtypes]
        with told(capability):
            runs = {name: not any(dispatch.why_not(name, p) for p in problems) for name in dispatch.BACKENDS}
        first = next((f"`{name}`" for name, yes in runs.items() if yes), "-")
        rows.append([place, *("yes" if yes else "-" for yes in runs.values()), first])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@contextmanager
def told(capability: tuple[int, int] | None) -> Iterator[None]:
    """A machine whose GPU has this compute capability, as far as a backend can ask."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=capability is not None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
    ):
        yield


def problem(device: str, dtype: torch.dtype) -> Problem:
    """An ordinary causal problem with grouped heads."""
    return Problem(1, HEADS, HEADS // 4, LENGTH, LENGTH, DIM, dtype, torch.device(device), ops.rule_of(DIM))


def placed(text: str) -> str:
    """The README's text with the table in its place."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(placed(README.read_text()))
    else:
        sys.stdout.write(table())
