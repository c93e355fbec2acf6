"""Writes the table "what runs where" of the README from what the backends themselves say.

python docs/what_runs_where.py            prints it
python docs/what_runs_where.py --write    puts it into README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vecattention import dispatch, ops
from vecattention.spec import Problem

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
PLACES = {
    "CPU, float32, bfloat16, float16": ("cpu", (torch.float32, torch.bfloat16, torch.float16)),
    "CPU, float64": ("cpu", (torch.float64,)),
    "NVIDIA GPU from compute capability 8.0 on, bfloat16, float16": ("cuda", (torch.bfloat16, torch.float16)),
    "NVIDIA GPU from compute capability 8.0 on, float32": ("cuda", (torch.float32,)),
    "NVIDIA GPU, float64": ("cuda", (torch.float64,)),
}
HEADS, LENGTH, DIM = 8, 4096, 128


def table() -> str:
    """The table in Markdown: a place and its types in each row, a backend in each column."""
    head = ["tensors", *(f"`{name}`" for name in dispatch.BACKENDS), '`backend="auto"` takes']
    rows = [head, ["---"] * len(head)]
    for place, (device, dtypes) in PLACES.items():
        problems = [problem(device, dtype) for dtype in dtypes]
        runs = {name: not any(dispatch.why_not(name, p) for p in problems) for name in dispatch.BACKENDS}
        first = next((f"`{name}`" for name, yes in runs.items() if yes), "-")
        rows.append([place, *("yes" if yes else "-" for yes in runs.values()), first])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


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
