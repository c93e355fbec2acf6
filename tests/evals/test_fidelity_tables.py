"""Tables against numbers worked out by hand or counted in masks, and the command that prints them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vecattention import cli
from vecattention.evals.fidelity import matches, maximum, measure, show, study
from vecattention.evals.fidelity.candidates import parse
from vecattention.evals.fidelity.records import Records
from vecattention.evals.fidelity.samples import Sample
from vecattention.evals.fidelity.synthetic import synthetic
from vecattention.evals.fidelity.tables import Table, of, place_of, price

Row = dict[str, Any]


@pytest.fixture(scope="module")
def causal() -> Sample:
    return synthetic(seed=5, frames=4)


@pytest.fixture(scope="module")
def records(causal: Sample, tmp_path_factory: pytest.TempPathFactory) -> Records:
    found = Records(tmp_path_factory.mktemp("records") / "rows.jsonl")
    names = ("full", "xattention", "anchorattention:step=2", "vecattention:max_scope=row")
    plan = study.Plan("synthetic-causal-1024", candidates=names, targets=(0.2, 0.4), repeats=3)
    study.study([causal], found, plan, lambda *_: None)
    return found


def row(study_name: str, values: Row, **key: object) -> Row:
    """A row as a file would hold it."""
    return {"key": {"study": study_name, "data": "testbed-9", "fingerprint": "f", **key}, **values}


def match(method: str, target: float, setting: float, density: float, recall: float) -> Row:
    """A row of the matched study with two samples of two heads around these means."""
    heads = {"density": [density - 0.01, density + 0.01], "recall": [recall] * 2, "l1": [0.5, 0.7], "l2": [0.3, 0.3]}
    samples = [{"sample": name, **heads} for name in ("a", "b")]
    return row("matched", {"knob": "threshold", "setting": setting, "samples": samples}, method=method, target=target)


def time(method: str, device: str, seconds: list[float], **key: object) -> Row:
    """A row of the times study whose selection takes a tenth of its attention."""
    spent = {"select": [s / 10 for s in seconds], "attend": seconds}
    values = {"seconds": spent, "dtype": "float32", "threads": 1, "backend": "cpu"}
    return row("times", values, device=device, method=method, **key)


class TestMatched:
    ROWS = [
        match("xattention", 0.2, 0.5, 0.201, 0.6),
        match("vecattention", 0.2, 0.4, 0.2, 0.8),
        match("xattention", 0.1, 1e-9, 0.15, 0.9),
        match("vecattention", 0.1, 0.9, 0.12, 0.5),
        time("torch SDPA", "GPU", [9.0]),
        time("xattention", "GPU", [9.0], target=0.2),
        time("torch SDPA", "cpu", [0.4, 0.3, 0.5]),
        time("xattention", "cpu", [0.1, 0.3, 0.2], target=0.2),
    ]

    def test_lines_stand_by_target_then_recall_and_say_what_was_missed(self) -> None:
        lines = matches.matched(self.ROWS).rows
        assert lines[0][:6] == ["10 %", "xattention", "threshold=1e-09", "15.0 % (cannot reach 10 %)", "0.900", "0.600"]
        assert lines[1][1:4] == ["vecattention G=16 (published)", "threshold=0.9", "12.0 % (nearest step)"]
        assert lines[2][3:5] == ["20.0 %", "0.800"] and lines[3][3:5] == ["20.1 %", "0.600"]

    def test_what_reached_its_target_stands_first(self) -> None:
        better_but_denser = match("xattention", 0.2, 1e-9, 0.3, 0.99)
        assert [line[1] for line in matches.matched([better_but_denser, self.ROWS[1]]).rows][1] == "xattention"

    def test_times_are_medians_of_the_device_measured_last(self) -> None:
        table = matches.matched(self.ROWS)
        assert table.rows[3][7:] == ["20", "200"] and table.rows[2][7:] == ["", ""]
        assert table.rows[4] == ["100 %", "torch SDPA", *[""] * 6, "400"]
        assert "cpu, float32, 1 thread(s), attend on backend cpu" in table.title

    def test_by_length_both_parts_count(self) -> None:
        (line,) = matches.lengths(self.ROWS).rows
        assert line == ["testbed-9", "xattention", "20.1 %", "0.600", "20", "200", "400", "1.82x"]

    def test_heads_keep_their_order(self) -> None:
        best = row("oracle", {"densities": [0.2], "recall": {"1 key x 64 queries": [[0.9], [0.7]]}})
        table = matches.kinds([best, *self.ROWS], 0.2)
        assert table.columns == ("method", "head 0", "head 1")
        assert table.rows[0] == ["oracle 1 key x 64 queries", "0.90", "0.70"]
        assert table.rows[1] == ["xattention", "0.60 (19 %)", "0.60 (21 %)"]


class TestMaximum:
    def rule(self, name: str, layer: int, recall: list[float | None], at: list[list[float]]) -> Row:
        values = {"densities": [0.1], "recall": [[x] for x in recall], "floor": [0.1, 0.1]}
        values |= {"thetas": list(maximum.THETAS), "at": [[pair] * len(maximum.THETAS) for pair in at]}
        return row("maximum", values, sample=f"movie0-layer{layer}", rule=name)

    def rows(self) -> list[Row]:
        best = {"densities": [0.1], "recall": {maximum.ORACLE: [[0.9], [0.8]]}}
        found = [row("oracle", best, sample=f"movie0-layer{layer}") for layer in (0, 1)]
        for layer in (0, 1):
            found += [self.rule(name, layer, [0.7, 0.6], [[0, 0]] * 2) for name in ("row", "top-p")]
            for group in maximum.GROUPS:
                recall = [0.5, 0.65] if layer == 0 else [0.7, None]
                found.append(self.rule(f"window {group} running", layer, recall, [[0.5, 0.8], [0.3, 0.6]]))
                found.append(self.rule(f"window {group} final", layer, recall, [[0.3, 0.7], [0.1, 0.5]]))
        return found

    def test_heads_are_counted_where_both_rules_reach_the_density(self) -> None:
        table = maximum.heads(self.rows(), 0.1)
        assert table.rows[0][:5] == ["layer0 head 0", "0.900", "0.700", "0.700", "0.500"]
        assert table.rows[4][:5] == ["mean", "0.850", "0.650", "0.650", "-"]
        assert table.rows[3][4] == "-" and table.rows[-1][3:5] == ["0 of 4", "1 of 3"]  # 0.7 is not ahead of 0.7

    def test_waste_is_a_share_of_the_chosen(self) -> None:
        line = maximum.waste(self.rows()).rows[0]
        assert line == ["4", "0.9", "40.0 %", "20.0 %", "66.7 %", "0.700", "0.600"]

    def test_waste_is_what_the_masks_say(self, causal: Sample, records: Records) -> None:
        """The keys of `select` that a maximum of the whole window would not keep, counted one by one."""
        theta, dropped, chosen = 0.4, 0, 0
        mask = parse("vecattention:group_k_block=4").select(causal, theta).mask()[0]
        for h in range(8):
            for g in range(2, -(-mask.shape[1] // 64)):  # before that, no block has a candidate
                score = causal.query[0, h, g * 64 : g * 64 + 64].mean(0) @ causal.key[0, h // 2].T / 8
                windows = score[64 : g * 64].unflatten(0, (-1, 64))
                kept = (windows - windows.amax(1, keepdim=True) >= torch.tensor(theta).log()).flatten()
                span = mask[h, g * 64 : g * 64 + 64, 64 : g * 64]
                chosen += int(span.sum())
                dropped += int((span & ~kept).sum())
        line = next(line for line in maximum.waste(list(records)).rows if line[:2] == ["4", f"{theta:g}"])
        assert 0 < dropped < chosen and float(line[4].rstrip(" %")) == pytest.approx(100 * dropped / chosen, abs=0.06)


class TestPrice:
    def test_density_is_read_off_between_the_recorded_ones(self) -> None:
        densities = list(study.DENSITIES)
        recall = {64: [2 * d for d in densities], 32: [4 * d for d in densities], 128: [None] * len(densities)}
        found = [row("pooling", {"densities": densities, "together": values}, rule="row", P=pool, R=64, sample=sample)
                 for sample in "ab" for pool, values in recall.items()]  # fmt: skip
        lines = {line[0]: line[1:] for line in price(found).rows}
        assert lines["row P=64 R=64"] == ["1.00x"] * 5
        assert lines["row P=32 R=64"] == ["-", "0.50x", "0.50x", "0.50x", "0.50x"]  # 1 % was not recorded
        assert lines["row P=128 R=64"] == ["-"] * 5


class TestTables:
    def test_every_table_is_made_and_whole(self, records: Records) -> None:
        tables = show.tables(list(records), at=0.2)
        assert len(tables) == 8
        for table in tables:
            assert table.rows and table.title.startswith("synthetic-causal-1024. ")
            assert {len(line) for line in table.rows} == {len(table.columns)}
            text = table.markdown().splitlines()
            assert len(text) == 2 + len(table.rows) and {line.count(" | ") for line in text} == {len(table.columns) - 1}
            assert table.rich().row_count == len(table.rows)

    def test_methods_that_cannot_be_so_sparse_are_said_to_be(self, records: Records) -> None:
        lines = matches.matched(list(records)).rows
        (line,) = [line for line in lines if line[:2] == ["20 %", "anchorattention:step=2"]]
        assert line[3].endswith("% (cannot reach 20 %)") and float(line[3].split()[0]) > 21

    def test_densities_that_were_not_recorded_are_refused(self, records: Records) -> None:
        with pytest.raises(ValueError, match=r"--at is 0.11, wanted one of \[0.02, "):
            place_of(of(records, "oracle")[0], 0.11)

    def test_cells_are_text_and_numbers(self) -> None:
        assert Table("", ("a", "b"), [["x", "1"]], words=0).markdown() == "| a | b |\n| ---: | ---: |\n| x | 1 |\n"


class TestProvenance:
    def test_a_run_row_is_written_when_something_changed(
        self, causal: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = Records(tmp_path / "rows.jsonl")
        commits = iter(["one", "one", "two"])
        monkeypatch.setattr(study, "provenance", lambda: {"commit": next(commits)})
        for methods in (("full",), ("full", "xattention"), ("full", "xattention", "flexprefill")):
            plan = study.Plan("data", ("sweep",), methods)
            study.study([causal], found, plan, lambda *_: None)
        marks = [(place, row["commit"]) for place, row in enumerate(found) if row["key"]["study"] == "run"]
        sweep = {name: len(knob.sweep) for name in ("xattention", "flexprefill") if (knob := parse(name).knob)}
        assert marks == [(0, "one"), (2 + sweep["xattention"], "two")]
        study.study([causal], found, plan, lambda *_: None)  # nothing to do, nobody asks where

    def test_times_say_what_ran(self, causal: Sample) -> None:
        selection = parse("xattention").select(causal, 0.5)
        assert measure.where(causal.to(torch.device("cpu"), torch.float64), selection) == {
            "dtype": "float64", "threads": torch.get_num_threads(), "backend": "cpu",
        }  # fmt: skip
        assert measure.device_name(causal) == "cpu"


class TestShow:
    def run(self, *arguments: str) -> int:
        return cli.main(["eval", "fidelity", *arguments])

    def test_a_file_is_shown_again(self, records: Records, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("--show", str(records.path), "--tables", "matched", "heads", "--at", "0.2", "--markdown") == 0
        told = capsys.readouterr().out
        tables = show.tables(list(records), ("matched", "heads"), 0.2)
        assert told == "".join(f"{table.title}\n\n{table.markdown()}\n" for table in tables)

    def test_the_picture_is_drawn_again(
        self, records: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run("--show", str(records.path), "--tables", "waste", "--png", str(tmp_path / "again.png")) == 0
        assert (tmp_path / "again.png").read_bytes()[:4] == b"\x89PNG"
        assert "again.png" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments, message", [
        (["--show", "nowhere.jsonl"], "--show is nowhere.jsonl, wanted a file that this command wrote"),
        (["--synthetic", "--tables", "best"], "--tables has 'best', wanted some of oracle, maximum, heads"),
        (["--synthetic", "--frames", "2", "--dtype", "int8"], "--dtype is 'int8', wanted one of float32"),
    ])  # fmt: skip
    def test_wrong_input_is_told(
        self, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(*arguments, "--out", str(tmp_path)) == cli.WRONG
        assert message in capsys.readouterr().err

    def test_maps_are_rounded_to_a_dtype(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--synthetic", "--frames", "2", "--studies", "matched", "times", "--methods", "xattention",
                     "--matched", "0.6", "--repeats", "1", "--dtype", "bfloat16"]  # fmt: skip
        assert self.run(*arguments, "--out", str(tmp_path)) == 0
        rows = list(Records(tmp_path / "fidelity.jsonl"))
        assert {one["dtype"] for one in of(rows, "times")} == {"bfloat16"}
        plain = synthetic(0, 2)
        rounded = plain.to(torch.device("cpu"), torch.bfloat16)
        assert F.mse_loss(rounded.query.float(), plain.query) > 0 and rounded.frames == plain.frames
