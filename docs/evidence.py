"""Fills the tables of the evidence pages with what `vecattention eval fidelity --show` prints.

python docs/evidence.py            says which pages are not up to date
python docs/evidence.py --write    brings them up to date

A table stands between a comment that holds its command and the next ``<!-- end -->``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path

from vecattention import cli

ROOT = Path(__file__).parent.parent
PAGES = tuple(
    ROOT / "docs" / name for name in ("evidence.md", "decisions/maximum-rule.md", "decisions/pool-and-share.md")
)
PLACE = re.compile(r"(<!-- vecattention (eval fidelity --show .+?) -->\n\n)(.*?)(<!-- end -->)", re.DOTALL)


def placed(text: str) -> str:
    """A page's text with every table as its command prints it."""
    return PLACE.sub(lambda found: found[1] + printed(found[2]) + found[4], text)


def printed(command: str) -> str:
    """What a command prints, run in the root of the checkout."""
    told = io.StringIO()
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(told):
            code = cli.main(shlex.split(command))
    finally:
        os.chdir(before)
    if code:
        raise ValueError(f"vecattention {command} ended with {code}, wanted 0; correct the comment above its table")
    return told.getvalue()


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if placed(text) == text:
            continue
        sys.stdout.write(f"{page.relative_to(ROOT)}\n")
        if sys.argv[1:] == ["--write"]:
            page.write_text(placed(text), encoding="utf-8")
