"""Tables of thresholds, one per layer and head, with the settings that they were tuned for; kept as JSON."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vecattention import checks

FORMAT = "vecattention-thresholds"
SCHEMA = 1
BRANCHES = ("cond", "uncond")
SETTINGS = ("q_pooling_size", "q_block_size", "k_local_size", "group_k_block", "max_scope", "causal")
Rows = tuple[tuple[float, ...], ...]


class TableError(ValueError):
    """A file that holds no usable threshold table; the message names the file and what is wrong with it."""


class MissingTableError(TableError, FileNotFoundError):
    """A threshold table that does not exist."""


@dataclass(frozen=True)
class ThresholdTable:
    """Thresholds in (0, 1] by [layer][head], and what they were tuned for.

    Attributes:
        cond: [layers][heads] thresholds (of the conditional branch, where a model has two).
        uncond: the same of the unconditional branch of classifier-free guidance, or None.
        q_pooling_size, q_block_size, k_local_size, group_k_block, max_scope, causal: the arguments of
            `vecattention.select` that the thresholds were tuned with; q_block_size None means q_pooling_size.
        model: name of the model, free text.
        provenance: anything worth knowing later (date, data, target): names to strings, numbers, booleans or None.

    Raises:
        TypeError, ValueError: ragged rows, a value that is no number in (0, 1], or a setting outside its values.

    Example:
        >>> table = ThresholdTable([[0.9, 0.5], [0.8, 0.7]], model="tiny", provenance={"target": 0.9})
        >>> table.layers, table.heads, table.row(1).tolist()
        (2, 2, [0.8, 0.7])
    """

    cond: Sequence[Sequence[float]]
    uncond: Sequence[Sequence[float]] | None = None
    q_pooling_size: int = 64
    q_block_size: int | None = None
    k_local_size: int = 16
    group_k_block: int = 16
    max_scope: str = "window"
    causal: bool = True
    model: str = ""
    provenance: Mapping[str, str | float | bool | None] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        cond = _rows("cond", self.cond)
        uncond = None if self.uncond is None else _rows("uncond", self.uncond)
        if uncond is not None and _shape(uncond) != _shape(cond):
            raise ValueError(
                f"uncond has shape {_shape(uncond)}, wanted {_shape(cond)} = (layers, heads) like cond; "
                "tune both branches of the same model"
            )
        rule = checks.rule(head_dim=64, scale=None, **{name: getattr(self, name) for name in SETTINGS})
        if not isinstance(self.model, str):
            raise TypeError(f"model is a {type(self.model).__name__}, wanted a string; pass the model's name")
        kept = {name: getattr(rule, name) for name in SETTINGS}
        for name, value in {"cond": cond, "uncond": uncond, "provenance": _provenance(self.provenance), **kept}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def uniform(cls, value: float, layers: int, heads: int, **settings: Any) -> ThresholdTable:
        """The table with one value everywhere; further arguments are those of the class.

        Example:
            >>> ThresholdTable.uniform(0.8, layers=2, heads=3).row(0).tolist()
            [0.8, 0.8, 0.8]
        """
        return cls(((value,) * heads,) * layers, **settings)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.cond)

    @property
    def heads(self) -> int:
        """Number of query heads of each layer."""
        return len(self.cond[0])

    @property
    def settings(self) -> dict[str, int | str | bool]:
        """The arguments of `vecattention.select` that the thresholds were tuned with.

        Example:
            >>> ThresholdTable.uniform(0.8, 1, 1, max_scope="row").settings["max_scope"]
            'row'
        """
        return {name: getattr(self, name) for name in SETTINGS}

    def row(self, layer: int, branch: str = "cond") -> Tensor:
        """Thresholds of one layer: float64 [H] on the CPU, as `vecattention.select` takes them.

        Raises:
            ValueError: no such layer or branch.
        """
        if branch not in BRANCHES:
            raise ValueError(f"branch is {branch!r}, wanted one of {BRANCHES}; pass 'cond' for models with one branch")
        rows = self.cond if branch == "cond" else self.uncond
        if rows is None:
            raise ValueError("branch is 'uncond', wanted 'cond': this table has one branch; tune the other one as well")
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer is {layer}, wanted 0 to {self.layers - 1}; use the table of this model")
        return torch.tensor(rows[layer], dtype=torch.float64)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made like the first one, and checked like it."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return partial(type(self), **{**values, "provenance": dict(self.provenance)}), ()

    def check(self, layers: int, heads: int, **settings: int | str | bool | None) -> None:
        """Refuse to serve a model or settings that the table was not tuned for.

        Args:
            layers: layers of the model.
            heads: query heads of each layer.
            settings: those of `SETTINGS` that are asked for; one that is left out is not compared.

        Raises:
            TypeError: a name that is not a setting.
            ValueError: another shape or other settings, with both in the message.
        """
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise TypeError(f"settings has {unknown}, wanted names among {SETTINGS}; leave the others out")
        if (layers, heads) != (self.layers, self.heads):
            raise ValueError(
                f"table has shape ({self.layers}, {self.heads}){f' of {self.model}' if self.model else ''}, wanted "
                f"({layers}, {heads}) = (layers, heads) of this model; load its own table, or tune one"
            )
        asked = dict(settings)
        if "q_block_size" in asked and asked["q_block_size"] is None:
            asked["q_block_size"] = asked.get("q_pooling_size", self.q_pooling_size)
        other = {name: value for name, value in asked.items() if value != getattr(self, name)}
        if other:
            tuned = ", ".join(f"{name}={getattr(self, name)!r}" for name in other)
            given = ", ".join(f"{name}={value!r}" for name, value in other.items())
            raise ValueError(
                f"table of shape ({self.layers}, {self.heads}) was tuned for {tuned}, got {given}; "
                "leave the settings to the table, or tune one for these"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, all of it or nothing: a file that is there stays whole until the new one is.

        Example:
            >>> import tempfile, pathlib
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = pathlib.Path(folder, "table.json")
            ...     ThresholdTable.uniform(0.8, 2, 4).save(path)
            ...     ThresholdTable.load(path) == ThresholdTable.uniform(0.8, 2, 4)
            True
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise MissingTableError(f"path is {target}, wanted a file in a folder that exists; make {target.parent}")
        text = json.dumps(_document(self), indent=1, allow_nan=False) + "\n"
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ThresholdTable:
        """Read a table that `save` wrote.

        Raises:
            MissingTableError: there is no such file.
            TableError: not JSON, not such a table, another schema version, or values that are none.
        """
        document = _read(Path(path))
        more = {name: document[name] for name in ("model", "provenance") if name in document}
        try:
            return cls(**document["thresholds"], **document["settings"], **more)
        except (TypeError, ValueError) as error:
            raise TableError(f"path is {path}, wanted a threshold table, got a damaged one: {error}") from error


def _document(table: ThresholdTable) -> dict[str, Any]:
    branches = {"cond": table.cond} | ({} if table.uncond is None else {"uncond": table.uncond})
    return {
        "format": FORMAT, "schema": SCHEMA, "model": table.model, "settings": table.settings,
        "provenance": dict(table.provenance), "thresholds": branches,
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a table file, its envelope checked."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingTableError(f"path is {path}, wanted a threshold table, got no file; check the name") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(f"path is {path}, wanted JSON, got what cannot be read ({error}); save it again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise TableError(
            f"path is {path}, wanted a threshold table (format {FORMAT!r}), got other JSON; "
            "build one with ThresholdTable(...).save(path)"
        )
    if document.get("schema") != SCHEMA:
        raise TableError(
            f"path is {path}, wanted schema {SCHEMA}, got {document.get('schema')!r}; "
            "use the version of vecattention that wrote it, or tune again"
        )
    for name, known, needed in (("thresholds", BRANCHES, BRANCHES[:1]), ("settings", SETTINGS, SETTINGS)):
        entries = document.get(name)
        got = sorted(entries) if isinstance(entries, dict) else entries
        if not isinstance(entries, dict) or not set(needed) <= set(entries) <= set(known):
            raise TableError(f"path is {path}, wanted {name!r} with {list(known)}, got {got}; save it again")
    return document


def _rows(name: str, values: Sequence[Sequence[float]]) -> Rows:
    """The values as tuples of floats, checked."""
    if isinstance(values, Tensor):
        values = values.double().tolist()
    if not _is_list(values) or not all(_is_list(row) for row in values):
        raise TypeError(f"{name} is a {type(values).__name__}, wanted rows of numbers; pass [layers][heads] thresholds")
    lengths = sorted({len(row) for row in values})
    if not values or lengths == [0]:
        raise ValueError(f"{name} is empty, wanted at least one layer and one head; pass [layers][heads] thresholds")
    if len(lengths) > 1:
        raise ValueError(
            f"{name} has rows of {lengths} values, wanted the same number of heads in every layer; fill up"
        )
    return tuple(tuple(_value(name, i, j, x) for j, x in enumerate(row)) for i, row in enumerate(values))


def _value(name: str, layer: int, head: int, value: object) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:  # type: ignore[operator]
        raise ValueError(
            f"{name}[{layer}][{head}] is {value!r}, wanted a number in (0, 1]; tune this head again, 0.9 is the default"
        )
    return float(value)  # type: ignore[arg-type]


def _provenance(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A frozen copy: names to plain values, so that JSON gives back what it got."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"provenance is a {type(given).__name__}, wanted a dict of plain values; pass {{'date': '...'}}"
        )
    for key, value in given.items():
        plain = (
            value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and value - value == 0)
        )
        if not isinstance(key, str) or not plain:
            raise TypeError(
                f"provenance[{key!r}] is {value!r}, wanted a string, a finite number, a boolean or None under a string "
                "name; write it as text"
            )
    return MappingProxyType(dict(given))


def _shape(rows: Rows) -> tuple[int, int]:
    return len(rows), len(rows[0])


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
