"""What is known of a GPU: launch shapes of the kernels, and from which length on a sparse call is the faster one.

A profile is a JSON file for one GPU. Those in ``vecattention/profiles`` ship with the package; the environment variable
``VECATTENTION_PROFILE`` names another one, such as ``vecattention bench tune`` writes, for its launch shapes: they
change how fast a call is, never its result. Without a profile the kernels' own defaults serve. The crossovers of a
shipped profile tell `vecattention.apply` which calls to leave dense; those of another file are only shown, since no
environment variable may decide a result: pass them on as ``min_length``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Shape = TypeVar("Shape", bound="DataclassInstance")

SCHEMA = 1
VARIABLE = "VECATTENTION_PROFILE"
SHIPPED = Path(__file__).parent / "profiles"

ENTRIES = ("schema", "gpu", "source", "shapes", "crossovers")
"""What a file may hold."""

KERNELS = frozenset(
    [f"hopper.{kind}{causal}" for kind in ("attend", "attend_pairs", "select") for causal in ("", "_causal")]
    + [
        f"triton.attend_r{rows}_d{head_dim}_{precision}"
        for rows in range(16, 129, 16)
        for head_dim in (16, 32, 64, 80, 96, 128, 256)
        for precision in ("half", "single")
    ]
    + [f"triton.select_d{dim}_{kind}" for dim in (16, 32, 64, 80, 96, 128, 256) for kind in ("half", "single")]
)
"""The kernels that ask a profile for their launch shape."""

logger = logging.getLogger(__name__)


class ProfileError(ValueError):
    """A profile file that cannot be used; the message names the file, what is wrong and the remedy."""


@dataclasses.dataclass(frozen=True)
class Crossover:
    """The least measured length from which on a call of this kind, or a denser one, took no longer than a dense one.

    Dense: by the fastest kernel that was there. No longer: within 2 percent.

    Attributes:
        causal, q_block_size: the kind of call.
        density: kept pairs over all allowed pairs, up to which this holds.
        k_len: keys; None: dense was faster at the longest measured length.
        width: query heads times head_dim of the calls that were measured; 0: not known.
    """

    causal: bool
    q_block_size: int
    density: float
    k_len: int | None
    width: int = 0

    def keys(self, width: int) -> int | None:
        """The length for calls of this width (B H D; 0: as measured); None: beyond what was measured.

        A sparse call takes the host a time of its own, however little there is to compute, and a dense call's work
        is as the width times the square of the length: by this estimate narrower calls need to be longer by the root of
        the ratio.

        >>> Crossover(True, 128, 0.5, 8192, width=28 * 128).keys(4 * 64)
        30652
        """
        if self.k_len is None or not 0 < width < self.width:
            return self.k_len
        return math.ceil(self.k_len * math.sqrt(self.width / width))


@dataclasses.dataclass(frozen=True)
class Profile:
    """What is known of one GPU.

    Attributes:
        gpu: its name, as torch gives it.
        shapes: fields of a launch shape by kernel, such as {"hopper.attend": {"stages": 3}}; others have their default.
        crossovers: measured ones.
        source: where the figures come from.
        path: the file; None for the empty profile.
    """

    gpu: str = ""
    shapes: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    crossovers: tuple[Crossover, ...] = ()
    source: str = ""
    path: Path | None = None
    _made: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def shape(self, kernel: str, default: Shape) -> Shape:
        """The launch shape of a kernel: the default with the fields that the profile has for it.

        Raises:
            ProfileError: the profile has a field that the shape has not, or a value that it cannot take.
        """
        if kernel not in self.shapes:
            return default
        if kernel in self._made:
            made: Shape = self._made[kernel]
            return made
        names = [field.name for field in dataclasses.fields(default)]
        if unknown := [name for name in self.shapes[kernel] if name not in names]:
            what = f"shapes[{kernel!r}] has {_listed(unknown)}, wanted some of {', '.join(names)}"
            raise ProfileError(_bad(self.path, what))
        try:
            return self._made.setdefault(kernel, dataclasses.replace(default, **self.shapes[kernel]))  # type: ignore[no-any-return]
        except (TypeError, ValueError) as error:
            raise ProfileError(_bad(self.path, f"shapes[{kernel!r}] does not fit: {error}")) from error

    def pays_from(self, causal: bool, q_block_size: int, density: float = 0.5, width: int = 0) -> int:
        """Keys from which on calls of at most this density are the faster ones; 0: not known; `NEVER`: at no length.

        ``width``: B H D of the calls (`Crossover.keys`).

        >>> known = (Crossover(True, 64, 0.2, 4096), Crossover(True, 64, 0.5, 8192))
        >>> Profile(crossovers=known).pays_from(True, 64, 0.3)
        8192
        """
        alike = [c for c in self.crossovers if (c.causal, c.q_block_size) == (causal, q_block_size)]
        fits = [c for c in alike if c.density >= density]
        if not fits:
            return 0
        known = min(fits, key=lambda c: c.density).keys(width)
        return NEVER if known is None else known


NEVER = 2**31 - 1
"""More keys than any call has."""

EMPTY = Profile()


def of(device: torch.device) -> Profile:
    """The profile of a device: the one that the environment names, the shipped one, or the empty one.

    What a GPU without a profile runs with is said once, in a warning.

    Raises:
        ProfileError: the file that the environment names is none.
    """
    gpu = _gpu(device)
    return EMPTY if gpu is None else for_gpu(gpu, os.environ.get(VARIABLE) or None)


def shipped(device: torch.device) -> Profile:
    """The profile of a device that ships with the package, or the empty one."""
    gpu = _gpu(device)
    path = SHIPPED / f"{slug(gpu or 'none')}.json"
    return _read(path) if path.is_file() else EMPTY


def _gpu(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _name(index: int) -> str:
    return str(torch.cuda.get_device_name(index))


@functools.cache
def for_gpu(gpu: str, path: str | None = None) -> Profile:
    """The profile for a GPU of this name; ``path``: the file to take if it is one for this GPU.

    Raises:
        ProfileError: the file at ``path`` is none.

    Example:
        >>> for_gpu("NVIDIA H100 80GB HBM3").gpu
        'NVIDIA H100 80GB HBM3'
    """
    if path is not None:
        given = read(Path(path))
        if given.gpu == gpu:
            return given
        logger.warning("vecattention: %s is %s, a profile of %s; it is not used for %s", VARIABLE, path, given.gpu, gpu)
    own = SHIPPED / f"{slug(gpu)}.json"
    if own.is_file():
        return _read(own)
    logger.warning(
        "vecattention: there is no profile of %s; the default launch shapes are used, which are right but may be "
        "slower than need be. `vecattention bench tune` measures one", gpu,
    )  # fmt: skip
    return EMPTY


def slug(gpu: str) -> str:
    """The file name for a GPU.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())


def read(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        ProfileError: there is no such file, or it holds something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProfileError(_bad(path, f"it cannot be read: {error}")) from error
    except RecursionError as error:
        raise ProfileError(_bad(path, "it cannot be read: it is nested too deeply")) from error
    if not isinstance(held, dict) or held.get("schema") != SCHEMA:
        found = held.get("schema") if isinstance(held, dict) else None
        raise ProfileError(_bad(path, f"its schema is {reprlib.repr(found)}, wanted {SCHEMA}"))
    if unknown := [name for name in held if name not in ENTRIES]:
        raise ProfileError(_bad(path, f"it has {_listed(unknown)}, wanted {', '.join(ENTRIES)} alone"))
    gpu, shapes, source = held.get("gpu"), held.get("shapes", {}), held.get("source", "")
    if not isinstance(gpu, str) or not gpu:
        raise ProfileError(_bad(path, f"gpu is {reprlib.repr(gpu)}, wanted the name of one"))
    if not isinstance(source, str):
        raise ProfileError(_bad(path, f"source is {reprlib.repr(source)}, wanted a text"))
    if not isinstance(shapes, dict) or not all(_numbers(fields) for fields in shapes.values()):
        raise ProfileError(_bad(path, f"shapes is {reprlib.repr(shapes)}, wanted integers by field by kernel"))
    if unknown := [name for name in shapes if name not in KERNELS]:
        wanted = ", ".join(sorted(name for name in KERNELS if name.startswith("hopper.")))
        wanted += " or, with _half or _single, triton.attend_rR_dD and triton.select_dD for lists of R rows and "
        wanted += "head_dim D, such as triton.attend_r64_d128_half"
        raise ProfileError(_bad(path, f"shapes has {_listed(unknown)}, wanted {wanted}"))
    return Profile(gpu, shapes, _crossovers(held.get("crossovers", []), path), source, path)


_read = functools.cache(read)


def as_json(profile: Profile) -> dict[str, Any]:
    """What a profile's file holds.

    >>> as_json(Profile("X"))
    {'schema': 1, 'gpu': 'X', 'source': '', 'shapes': {}, 'crossovers': []}
    """
    return {
        "schema": SCHEMA, "gpu": profile.gpu, "source": profile.source,
        "shapes": {kernel: dict(fields) for kernel, fields in profile.shapes.items()},
        "crossovers": [dataclasses.asdict(c) for c in profile.crossovers],
    }  # fmt: skip


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _numbers(fields: object) -> bool:
    return isinstance(fields, dict) and all(isinstance(x, int) and not isinstance(x, bool) for x in fields.values())


def _crossovers(held: object, path: Path) -> tuple[Crossover, ...]:
    try:
        if not isinstance(held, list):
            raise TypeError("no list")
        found = tuple(Crossover(**entry) for entry in held)
        if not all(type(c.causal) is bool and 0 < c.density <= 1 and _length(c.k_len) for c in found):
            raise ValueError("a value is out of range")
        if not all(type(c.q_block_size) is int and c.q_block_size > 0 for c in found):
            raise ValueError("a q_block_size is out of range")
        if not all(type(c.width) is int and c.width >= 0 for c in found):
            raise ValueError("a width is out of range")
    except (TypeError, ValueError) as error:
        wanted = (
            "a list of {causal: bool, q_block_size: rows, density: 0..1, k_len: keys or null, width: heads x head_dim}"
        )
        raise ProfileError(_bad(path, f"crossovers is {reprlib.repr(held)}, wanted {wanted} ({error})")) from error
    return found


def _length(k_len: object) -> bool:
    return k_len is None or (type(k_len) is int and k_len > 0)


def _bad(path: Path | None, what: str) -> str:
    remedy = f"write it anew with `vecattention bench tune`, or unset {VARIABLE}"
    return f"profile {str(path)!r} cannot be used: {what}; {remedy}"
