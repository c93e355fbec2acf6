"""Threshold tables: what they hold, what they refuse, and that a file is whole or not there."""

from __future__ import annotations

import copy
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecattention import ThresholdTable
from vecattention.thresholds import SETTINGS, MissingTableError, TableError

THETA = st.floats(min_value=0, max_value=1, exclude_min=True)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@st.composite
def tables(draw: st.DrawFn) -> ThresholdTable:
    layers, heads = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rows = st.lists(st.lists(THETA, min_size=heads, max_size=heads), min_size=layers, max_size=layers)
    pool = draw(st.sampled_from([16, 32, 64, 128]))
    return ThresholdTable(
        draw(rows),
        draw(st.none() | rows),
        q_pooling_size=pool,
        q_block_size=draw(st.sampled_from([None, pool, 128])),
        k_local_size=16,
        group_k_block=draw(st.integers(1, 99)),
        max_scope=draw(st.sampled_from(["window", "row"])),
        causal=draw(st.booleans()),
        model=draw(st.text()),
        provenance=draw(st.dictionaries(st.text(), PLAIN, max_size=3)),
    )


@settings(max_examples=60, deadline=None)
@given(tables())
def test_what_is_saved_is_what_is_loaded(tmp_path_factory: pytest.TempPathFactory, table: ThresholdTable) -> None:
    path = tmp_path_factory.mktemp("tables") / "table.json"
    table.save(path)
    assert ThresholdTable.load(path) == table
    assert os.listdir(path.parent) == ["table.json"]
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@settings(max_examples=20, deadline=None)
@given(tables())
def test_a_table_is_a_value(table: ThresholdTable) -> None:
    assert copy.deepcopy(table) == copy.copy(table) == pickle.loads(pickle.dumps(table)) == table
    assert hash(copy.deepcopy(table)) == hash(table)
    for name in ("cond", "model", "q_pooling_size"):
        with pytest.raises(AttributeError):
            setattr(table, name, None)
    with pytest.raises(TypeError):
        table.provenance["more"] = 1  # type: ignore[index]


def test_rows_are_what_select_takes() -> None:
    table = ThresholdTable([[0.9, 0.5], [0.25, 1]], [[0.1, 0.2], [0.3, 0.4]])
    assert table.row(1).dtype == torch.float64 and table.row(1).tolist() == [0.25, 1.0]
    assert table.row(0, "uncond").tolist() == [0.1, 0.2]
    assert (table.layers, table.heads, table.q_block_size) == (2, 2, 64)
    assert table.settings == {name: getattr(table, name) for name in SETTINGS}
    assert ThresholdTable(torch.tensor([[0.5, 0.25]])) == ThresholdTable([[0.5, 0.25]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="branch is 'neither', wanted one of"):
        table.row(0, "neither")
    with pytest.raises(ValueError, match="layer is 2, wanted 0 to 1; use the table of this model"):
        table.row(2)
    with pytest.raises(ValueError, match="branch is 'uncond', wanted 'cond': this table has one branch"):
        ThresholdTable([[0.5]]).row(0, "uncond")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cond": [[0.5], [0.5, 0.6]]}, ValueError, r"cond has rows of \[1, 2\] values, wanted the same number of heads"),
    ({"cond": []}, ValueError, "cond is empty, wanted at least one layer and one head"),
    ({"cond": [[], []]}, ValueError, "cond is empty, wanted at least one layer and one head"),
    ({"cond": [0.5, 0.6]}, TypeError, "cond is a list, wanted rows of numbers"),
    ({"cond": "0.5"}, TypeError, "cond is a str, wanted rows of numbers"),
    ({"cond": 0.5}, TypeError, "cond is a float, wanted rows of numbers"),
    ({"cond": [[0.5, float("nan")]]}, ValueError, r"cond\[0\]\[1\] is nan, wanted a number in \(0, 1\]"),
    ({"cond": [[0.0]]}, ValueError, r"cond\[0\]\[0\] is 0.0, wanted a number in \(0, 1\]"),
    ({"cond": [[1.5]]}, ValueError, r"cond\[0\]\[0\] is 1.5, wanted"),
    ({"cond": [[10**400]]}, ValueError, r"cond\[0\]\[0\] is 1000"),
    ({"cond": [[True]]}, ValueError, r"cond\[0\]\[0\] is True, wanted"),
    ({"cond": [["0.5"]]}, ValueError, r"cond\[0\]\[0\] is '0.5', wanted"),
    ({"cond": [[None]]}, ValueError, r"cond\[0\]\[0\] is None, wanted"),
    ({"uncond": [[0.5, 0.5]]}, ValueError, r"uncond has shape \(1, 2\), wanted \(1, 1\) = \(layers, heads\) like cond"),
    ({"uncond": [[2]]}, ValueError, r"uncond\[0\]\[0\] is 2, wanted"),
    ({"q_pooling_size": 48}, ValueError, "q_pooling_size is 48"),
    ({"causal": 1}, TypeError, "causal is 1"),
    ({"model": 5}, TypeError, "model is a int, wanted a string"),
    ({"provenance": [1]}, TypeError, "provenance is a list, wanted a dict of plain values"),
    (
        {"provenance": {"loss": float("inf")}},
        TypeError,
        r"provenance\['loss'\] is inf, wanted a string, a finite number",
    ),
    ({"provenance": {"data": [1, 2]}}, TypeError, r"provenance\['data'\] is \[1, 2\]"),
    ({"provenance": {1: "a"}}, TypeError, r"provenance\[1\] is 'a'"),
]


@pytest.mark.parametrize("arguments, error, message", WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_values_that_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ThresholdTable(**{"cond": [[0.5]], **arguments})


def test_a_table_for_another_model_or_other_settings() -> None:
    table = ThresholdTable.uniform(0.5, 60, 24, model="HunyuanVideo", q_pooling_size=64, max_scope="row")
    table.check(60, 24)
    table.check(60, 24, **table.settings)
    table.check(60, 24, q_block_size=None)
    shapes = r"table has shape \(60, 24\) of HunyuanVideo, wanted \(40, 40\) = \(layers, heads\) of this model"
    with pytest.raises(ValueError, match=shapes):
        table.check(40, 40)
    with pytest.raises(ValueError, match=r"table has shape \(1, 1\), wanted \(2, 1\)"):
        ThresholdTable([[0.5]]).check(2, 1)
    other = (
        r"of shape \(60, 24\) was tuned for max_scope='row', k_local_size=16, got max_scope='window', k_local_size=32"
    )
    with pytest.raises(ValueError, match=other):
        table.check(60, 24, max_scope="window", k_local_size=32, causal=True)
    with pytest.raises(ValueError, match="was tuned for q_block_size=64, got q_block_size=128"):
        table.check(60, 24, q_pooling_size=64, q_block_size=128)
    with pytest.raises(ValueError, match="q_pooling_size=64, q_block_size=64, got q_pooling_size=32, q_block_size=32"):
        table.check(60, 24, q_pooling_size=32, q_block_size=None)
    with pytest.raises(TypeError, match=r"settings has \['p'\], wanted names among"):
        table.check(60, 24, p=64)


GOOD: dict[str, Any] = {
    "format": "vecattention-thresholds",
    "schema": 1,
    "model": "",
    "settings": ThresholdTable.uniform(0.5, 1, 1).settings,
    "provenance": {},
    "thresholds": {"cond": [[0.5]]},
}


def changed(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


FILES: list[tuple[str | bytes, str]] = [
    ("", "wanted JSON, got what cannot be read"),
    ("{", "wanted JSON, got what cannot be read"),
    (b"\x80\x04\x95\xff", "wanted JSON, got what cannot be read"),
    ("[" * 100_000, "wanted JSON, got what cannot be read"),
    (json.dumps(GOOD)[:-20], "wanted JSON, got what cannot be read"),
    ("[[0.5]]", r"wanted a threshold table \(format 'vecattention-thresholds'\), got other JSON"),
    ('{"thresholds": [[0.5]]}', "got other JSON"),
    ("null", "got other JSON"),
    (changed(schema=2), "wanted schema 1, got 2; use the version of vecattention that wrote it"),
    (changed(schema=None), "wanted schema 1, got None"),
    (changed(thresholds=[[0.5]]), r"wanted 'thresholds' with \['cond', 'uncond'\], got \[\[0.5\]\]"),
    (changed(thresholds={}), r"wanted 'thresholds' with \['cond', 'uncond'\], got \[\]"),
    (changed(thresholds={"cond": [[0.5]], "third": [[1]]}), r"got \['cond', 'third'\]"),
    (changed(settings={}), r"wanted 'settings' with \['q_pooling_size', .*\], got \[\]"),
    (changed(settings={**GOOD["settings"], "cond": [[1]]}), r"wanted 'settings' with .*, got \['causal', 'cond', "),
    (changed(settings={**GOOD["settings"], "max_scope": "all"}), "got a damaged one: max_scope is 'all'"),
    (changed(settings={**GOOD["settings"], "k_local_size": "16"}), "got a damaged one: k_local_size is '16'"),
    (changed(thresholds={"cond": [[0.5], []]}), r"got a damaged one: cond has rows of \[0, 1\]"),
    (changed(thresholds={"cond": [[float("nan")]]}), r"got a damaged one: cond\[0\]\[0\] is nan"),
    (changed(thresholds={"cond": 0.5}), "got a damaged one: cond is a float"),
    (changed(thresholds={"cond": [[10**400]]}), r"got a damaged one: cond\[0\]\[0\] is 1000"),
    (changed(model=5), "got a damaged one: model is a int"),
    (changed(provenance=None), "got a damaged one: provenance is a NoneType"),
]


@pytest.mark.parametrize("content, message", FILES, ids=[f"{i}" for i in range(len(FILES))])
def test_files_that_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TableError, match=message) as caught:
        ThresholdTable.load(path)
    assert str(path) in str(caught.value) and isinstance(caught.value, ValueError)


def test_a_file_that_is_good(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(changed())
    assert ThresholdTable.load(str(path)) == ThresholdTable([[0.5]])


def test_a_file_or_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingTableError, match="wanted a threshold table, got no file; check the name") as caught:
        ThresholdTable.load(tmp_path / "none.json")
    assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, ValueError)
    with pytest.raises(MissingTableError, match="wanted a file in a folder that exists; make"):
        ThresholdTable([[0.5]]).save(tmp_path / "none" / "table.json")
    with pytest.raises(TableError, match="wanted JSON, got what cannot be read"):
        ThresholdTable.load(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_in_the_middle_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path, old = tmp_path / "table.json", ThresholdTable([[0.5]])
    old.save(path)

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(KeyboardInterrupt):
        ThresholdTable([[0.25, 0.25]]).save(path)
    monkeypatch.undo()
    assert ThresholdTable.load(path) == old
    assert os.listdir(tmp_path) == ["table.json"]


def test_others_may_read_what_is_saved(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    ThresholdTable([[0.5]]).save(tmp_path / "table.json")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "table.json")]
    assert modes[0] == modes[1]


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "bang"),)

    path = tmp_path / "table.json"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TableError, match="wanted JSON"):
        ThresholdTable.load(path)
    assert not (tmp_path / "bang").exists()
