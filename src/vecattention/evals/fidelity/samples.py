"""What fidelity is measured on: queries, keys and values of one attention layer, and files of them.

A file is safetensors with tensors ``<name>.query`` [B, H, Sq, D], ``<name>.key`` and ``<name>.value`` [B, Hkv, Sk, D],
and string metadata ``<name>.causal`` ("true" or "false"; "true" when absent), ``<name>.scale`` (absent: D ** -0.5),
``<name>.frames`` and ``<name>.context`` (the latent frames of a video and the text tokens behind it, for methods that
use them).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vecattention import checks

PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class Sample:
    """One layer's attention inputs.

    Attributes:
        name: of the layer and what it read, free of dots at its end.
        query: [1, H, Sq, D].
        key, value: [1, Hkv, Sk, D].
        causal: whether row i sees only keys at positions up to i + Sk - Sq.
        scale: factor of the dot products, None for D ** -0.5.
        frames: latent frames of the video that the first keys are, None where there is no such order.
        context: text tokens behind the video.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    scale: float | None = None
    frames: int | None = None
    context: int = 0

    @property
    def factor(self) -> float:
        """The scale as a number."""
        return checks.scale_of(self.scale, self.query.shape[3])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Sample:
        """The same sample on another device, rounded to another dtype where one is given."""
        query, key, value = (x.to(device, dtype) for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)


def fingerprint(samples: Sequence[Sample]) -> str:
    """16 hexadecimal digits that change with any tensor, shape or setting of the samples."""
    digest = hashlib.sha256()
    for one in samples:
        digest.update(repr((one.name, one.causal, one.factor, one.frames, one.context)).encode())
        for x in (one.query, one.key, one.value):
            digest.update(repr((tuple(x.shape), x.dtype)).encode())
            digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save(samples: Sequence[Sample], path: str | os.PathLike[str]) -> None:
    """Write samples to one safetensors file; it appears whole or not at all."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for one in samples:
        tensors |= {f"{one.name}.{part}": getattr(one, part).detach().cpu().contiguous() for part in PARTS}
        notes[f"{one.name}.causal"] = str(one.causal).lower()
        notes[f"{one.name}.context"] = str(one.context)
        notes |= {} if one.scale is None else {f"{one.name}.scale": repr(one.scale)}
        notes |= {} if one.frames is None else {f"{one.name}.frames": str(one.frames)}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        save_file(tensors, partial, metadata=notes)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> list[Sample]:
    """The samples of a safetensors file.

    Raises:
        ValueError: no such file, no safetensors, or tensors that are not named or shaped as described above.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"path is {str(path)!r}, wanted a safetensors file of queries, keys and values; it says: {error}"
        ) from error
    stems = sorted({name.rpartition(".")[0] for name in names})
    samples = [_sample(stem, tensors, notes, path) for stem in stems]
    if not samples:
        raise ValueError(f"path {str(path)!r} holds no tensors, wanted <name>.query, .key and .value; save some")
    return samples


def _sample(stem: str, tensors: dict[str, Tensor], notes: dict[str, str], path: str | os.PathLike[str]) -> Sample:
    prefix = f"{stem}." if stem else ""
    missing = [part for part in PARTS if f"{prefix}{part}" not in tensors]
    if missing:
        raise ValueError(
            f"path {str(path)!r} holds {stem or 'a tensor'} without {prefix}{missing[0]}, wanted query, key and "
            "value of each; name the tensors <name>.query, <name>.key, <name>.value"
        )
    query, key, value = (tensors[f"{prefix}{part}"] for part in PARTS)
    causal = notes.get(f"{prefix}causal", "true")
    if causal not in ("true", "false"):
        raise ValueError(f"{prefix}causal is {causal!r} in the metadata of {str(path)!r}, wanted true or false")
    checks.tensors(causal == "true", query=query, key=key, value=value)
    scale, frames = notes.get(f"{prefix}scale"), notes.get(f"{prefix}frames")
    return Sample(
        stem or "layer", query, key, value, causal == "true",
        None if scale is None else _number(f"{prefix}scale", scale, float, path),
        None if frames is None else int(_number(f"{prefix}frames", frames, int, path)),
        int(_number(f"{prefix}context", notes.get(f"{prefix}context", "0"), int, path)),
    )  # fmt: skip


def _number(name: str, text: str, kind: type[int] | type[float], path: str | os.PathLike[str]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r} in the metadata of {str(path)!r}, wanted a number; correct it") from None
