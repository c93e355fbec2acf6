"""What a demonstration is to do, checked before anything is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RULE = {"threshold": 0.9, "q_pooling_size": 64, "q_block_size": None, "k_local_size": 16, "group_k_block": 16,
        "max_scope": "window"}  # fmt: skip
"""The published rule and threshold."""

DTYPES = ("float32", "bfloat16", "float16")
NEEDLES = 4
SEEDS = 2**21


@dataclass(frozen=True)
class Settings:
    """What a demonstration is to do.

    Attributes:
        out: folder for the picture, the film and the record.
        rule: the arguments of `vecattention.select` that decide the set of keys.
        tokens: vision tokens of each film, or the most that are taken of a given one.
        timing_tokens: vision tokens of the longer film for the second pair of timings; 0: none.
        depths: where in its film, 0 to 1, the first needle asked for is.
        films: films for each depth; every film is asked about all its needles.
        seed: of the films.
        model: a Qwen2.5-VL checkpoint directory; None: the trained one that ships.
        device, dtype: where and in which precision the model runs.
        video, questions: a film to take, and what to ask about it, instead of making any.
    """

    out: Path
    rule: dict[str, Any] = field(default_factory=lambda: dict(RULE))
    tokens: int = 4096
    timing_tokens: int = 16384
    depths: tuple[float, ...] = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
    films: int = 1
    seed: int = 0
    model: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    video: Path | None = None
    questions: tuple[str, ...] = ()

    @property
    def apply(self) -> dict[str, Any]:
        """The arguments of `vecattention.apply`: the film's rows are sparse, the text's dense, as published."""
        return {**self.rule, "vision_span": "auto"}

    def record(self) -> dict[str, Any]:
        """The settings as JSON-ready values; of paths only the last part, which says what it was."""
        values = asdict(self) | {"vision_span": "auto", "needles": NEEDLES}
        del values["out"]
        for name in ("model", "video"):
            values[name] = values[name] and values[name].name
        return values


def check(settings: Settings) -> None:
    """Check what can be checked before the model is loaded.

    Raises:
        ValueError: a value that cannot serve, with what was wanted and what to do.
    """
    check_out(settings.out)
    if bool(settings.questions) != (settings.video is not None):
        given, other = ("--question", "--video") if settings.questions else ("--video", "--question")
        raise ValueError(f"{given} came without {other}, wanted both; a made film is asked about its own needles")
    least = 8 * NEEDLES
    if settings.tokens < least or 0 < settings.timing_tokens < least or settings.timing_tokens < 0:
        got = f"--tokens {settings.tokens} --timing-tokens {settings.timing_tokens}"
        raise ValueError(
            f"{got}, wanted at least {least} for {NEEDLES} needles; --timing-tokens 0 leaves that film out"
        )
    if not settings.depths or not all(0 <= depth <= 1 for depth in settings.depths):
        raise ValueError(
            f"--depths is {settings.depths}, wanted parts of the film from 0 to 1; for instance 0.1,0.5,0.9"
        )
    if settings.films < 1:
        raise ValueError(f"--films is {settings.films}, wanted at least 1 for each depth; the default is 1")
    if not 0 <= settings.seed < SEEDS:
        raise ValueError(f"--seed is {settings.seed}, wanted 0 to {SEEDS - 1}; pick another")
    if settings.dtype not in DTYPES:
        raise ValueError(f"--dtype is {settings.dtype!r}, wanted one of {', '.join(DTYPES)}; float32 is right on a CPU")
    check_device(settings.device)


def check_out(out: Path) -> None:
    """Refuse an output folder that cannot be made.

    Raises:
        ValueError: it is a file, or lies below one.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {str(out)!r}, wanted a folder; that is a file: name another, or remove it")
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"--out is {str(out)!r}, wanted a folder; {str(parent)!r} is a file: name another")


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        ValueError: neither cpu nor cuda, or cuda where torch sees no GPU.
    """
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device!r}, wanted cpu or cuda; cpu needs no GPU")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda', wanted a device that torch sees, and it sees no GPU; use cpu")
