"""Makes docs/figures/attention.png, the README's figure, from a run of the demonstration.

python docs/figures/attention.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from vecattention.demo import picture
from vecattention.demo.run import run
from vecattention.demo.settings import Settings
from vecattention.demo.write import caption

SEED = 0
TARGET = Path(__file__).with_suffix(".png")


def main(path: Path) -> None:
    """Ask about one film and save its picture."""
    settings = Settings(out=path.parent, timing_tokens=0, depths=(0.5,), films=1, seed=SEED)
    outcome = run(settings, lambda what, done: None)
    picture.save(outcome.shown.film, outcome.shown.map, caption(outcome), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else TARGET)
