"""Samples, records, candidates, the study as a whole, and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vecattention import cli, methods
from vecattention.evals.fidelity import candidates, measure, show, study
from vecattention.evals.fidelity.dense import dense
from vecattention.evals.fidelity.records import Records
from vecattention.evals.fidelity.samples import Sample, fingerprint, load, save
from vecattention.evals.fidelity.synthetic import HEADS, KINDS, PREFIX, SINK, synthetic
from vecattention.evals.fidelity.tables import of
from vecattention.recall import recall


@pytest.fixture(scope="module")
def causal() -> Sample:
    return synthetic(seed=3, frames=3)


@pytest.fixture(scope="module")
def video() -> Sample:
    return synthetic(seed=3, frames=4, causal=False)


class TestSynthetic:
    def test_is_seeded_and_leaves_the_caller_s_dice_alone(self) -> None:
        state = torch.get_rng_state()
        assert fingerprint([synthetic(1, 2)]) == fingerprint([synthetic(1, 2)]) != fingerprint([synthetic(2, 2)])
        assert torch.equal(torch.get_rng_state(), state)

    def test_shapes(self, causal: Sample, video: Sample) -> None:
        assert causal.query.shape == (1, 8, 3 * 256 + 48, 64) and causal.key.shape == (1, 4, 3 * 256 + 48, 64)
        assert video.query.shape == (1, 8, 4 * 256, 64) and video.frames == 4 and not video.causal

    def test_heads_look_where_their_kind_says(self, video: Sample) -> None:
        """Mass on the sink, on loud keys, near in time and near in space is largest for the heads made for it."""
        share = {name: [] for name in ("time", "space")}  # type: dict[str, list[float]]
        place = torch.arange(1024)
        for h in range(8):
            logits = video.query[0, h] @ video.key[0, h // 2].T / 8
            weight = torch.softmax(logits, -1)
            share["time"].append(float((weight * (place[:, None] // 256 == place // 256)).sum(1).mean()))
            near = [(place[:, None] % 256 // n % m - place % 256 // n % m).abs() <= 1 for n, m in ((16, 16), (1, 16))]
            share["space"].append(float((weight * (near[0] & near[1])).sum(1).mean()))
        assert HEADS[max(range(8), key=lambda h: share["time"][h])] == "spatial"
        assert HEADS[max(range(8), key=lambda h: share["space"][h])] == "temporal"

    def test_the_sink_has_the_weight_of_its_kind(self, causal: Sample) -> None:
        for h in range(8):
            logits = (causal.query[0, h] @ causal.key[0, h // 2].T / 8)[PREFIX + 1 :]
            gain = float(logits[:, :SINK].mean() - logits[:, SINK:PREFIX].mean())
            assert gain == pytest.approx(KINDS[HEADS[h]].sink, abs=0.6)

    @pytest.mark.parametrize("bad", [{"frames": 1}, {"height": 1}, {"dim": 32}])
    def test_too_small_is_refused(self, bad: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*, wanted at least"):
            synthetic(**bad)


class TestFiles:
    def test_samples_come_back(self, causal: Sample, video: Sample, tmp_path: Path) -> None:
        save([causal, video], tmp_path / "maps.safetensors")
        back = load(tmp_path / "maps.safetensors")
        assert fingerprint(back) == fingerprint([causal, video])
        assert [one.name for one in back] == [causal.name, video.name] and back[1].frames == 4
        assert list(tmp_path.iterdir()) == [tmp_path / "maps.safetensors"]

    def test_plain_files_are_one_causal_layer(self, causal: Sample, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        parts = {name: getattr(causal, name) for name in ("query", "key", "value")}
        save_file(parts, tmp_path / "plain.safetensors")
        (one,) = load(tmp_path / "plain.safetensors")
        assert one.name == "layer" and one.causal and one.scale is None and torch.equal(one.value, causal.value)

    def test_other_files_are_refused(self, causal: Sample, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        with pytest.raises(ValueError, match="wanted a safetensors file of queries, keys and values"):
            load(tmp_path / "none.safetensors")
        (tmp_path / "text").write_text("no tensors")
        with pytest.raises(ValueError, match="wanted a safetensors file"):
            load(tmp_path / "text")
        save_file({"a.query": causal.query, "a.key": causal.key}, tmp_path / "half")
        with pytest.raises(ValueError, match="holds a without a.value, wanted query, key and value of each"):
            load(tmp_path / "half")
        whole = {f"a.{name}": getattr(causal, name) for name in ("query", "key", "value")}
        save_file(whole, tmp_path / "note", metadata={"a.causal": "maybe"})
        with pytest.raises(ValueError, match="a.causal is 'maybe' in the metadata"):
            load(tmp_path / "note")
        save_file(whole, tmp_path / "scale", metadata={"a.scale": "big"})
        with pytest.raises(ValueError, match="a.scale is 'big' in the metadata"):
            load(tmp_path / "scale")


class TestRecords:
    def test_rows_are_found_again(self, tmp_path: Path) -> None:
        records = Records(tmp_path / "deep" / "rows.jsonl")
        assert not records.has({"a": 1})
        records.add({"a": 1, "b": "x"}, {"value": [1.5]})
        again = Records(records.path)
        assert again.has({"b": "x", "a": 1}) and not again.has({"a": 2}) and len(again) == 1
        assert next(iter(again))["value"] == [1.5]

    def test_an_unfinished_line_is_dropped(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        Records(path).add({"a": 1}, {})
        whole = path.read_text()
        path.write_text(whole + '{"schema": 1, "key": {"a"')
        records = Records(path)
        assert len(records) == 1 and path.read_text() == whole
        records.add({"a": 2}, {})
        assert len(Records(path)) == 2

    @pytest.mark.parametrize("line", ["[]", '{"schema": 1}', "word", '{"schema": 9, "key": {}}'])
    def test_foreign_files_are_refused(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "rows.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=r"line 1 of .*(is no row of a fidelity study|has schema 9, wanted 2)"):
            Records(tmp_path / "rows.jsonl")

    def test_nothing_that_is_not_json_is_written(self, tmp_path: Path) -> None:
        records = Records(tmp_path / "rows.jsonl")
        with pytest.raises(ValueError):
            records.add({"a": 1}, {"value": float("nan")})
        assert not (tmp_path / "rows.jsonl").exists()


class TestFigures:
    @pytest.mark.parametrize("label", ["vecattention:max_scope=row", "xattention", "svg"])
    def test_recall_and_errors(self, causal: Sample, video: Sample, label: str) -> None:
        one = video if label == "svg" else causal
        selection = candidates.parse(label).select(one, 0.3)
        got = measure.figures(one, [dense(one, h) for h in range(8)], selection)
        assert got.density == selection.density()[0].tolist()
        assert got.recall == pytest.approx(recall(one.query, one.key, selection)[0].tolist(), abs=1e-5)
        logits = one.query[0].double() @ one.key[0].double().repeat_interleave(2, 0).mT / 8
        value = one.value[0].double().repeat_interleave(2, 0)
        allowed = torch.ones_like(logits[0], dtype=torch.bool)
        allowed = allowed.tril() if one.causal else allowed
        exact, sparse = (torch.softmax(logits.masked_fill(~mask, -torch.inf), -1) @ value
                         for mask in (allowed, selection.mask()[0]))  # fmt: skip
        for h in range(8):
            assert got.l1[h] == pytest.approx(
                float((sparse[h] - exact[h]).abs().sum() / exact[h].abs().sum()), rel=1e-3
            )
            assert got.l2[h] == pytest.approx(float((sparse[h] - exact[h]).norm() / exact[h].norm()), rel=1e-3)

    def test_full_attention_misses_nothing(self, causal: Sample) -> None:
        heads = [dense(causal, h) for h in range(8)]
        got = measure.figures(causal, heads, candidates.parse("full").select(causal, None))
        assert got.density == [1.0] * 8 and min(got.recall) > 1 - 1e-5 and max(got.l2) < 1e-5

    def test_times_are_of_every_run(self, causal: Sample) -> None:
        one = candidates.parse("xattention")
        got = measure.times(causal, lambda: one.select(causal, 0.5), repeats=3)
        assert {name: len(values) for name, values in got.items()} == {"select": 3, "attend": 3}
        assert min(got["select"] + got["attend"]) > 0


class TestCandidates:
    def test_labels_are_read_and_written(self) -> None:
        for label in candidates.CAUSAL + candidates.FREE:
            one = candidates.parse(label)
            assert one.label == label and one.method in methods.names()
        assert candidates.parse("vecattention:max_scope=row,q_block_size=128").fixed == {
            "max_scope": "row", "q_block_size": 128,
        }  # fmt: skip

    def test_coverage_is_a_target_for_each_head(self, causal: Sample) -> None:
        one = candidates.parse("vecattention@coverage:max_scope=row,q_pooling_size=32,q_block_size=128")
        target = one.parameters(causal, 0.8)["coverage"]
        assert isinstance(target, torch.Tensor) and target.tolist() == [0.8] * 8
        setting, reached = candidates.matched(one, [causal], 0.4)
        assert reached == pytest.approx(0.4, rel=0.03) and 0.01 < setting < 1

    @pytest.mark.parametrize("text", [
        "flash", "xattention:stride", "xattention:strde=8", "xattention@coverage", "vecattention@gamma",
    ])  # fmt: skip
    def test_wrong_ones_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="wanted"):
            candidates.parse(text)

    @pytest.mark.parametrize("label, target", [
        ("vecattention", 0.4), ("vecattention:max_scope=row", 0.3), ("flexprefill", 0.6), ("xattention", 0.5),
        ("svg", 0.8),
    ])  # fmt: skip
    def test_matched_density_is_reached(self, causal: Sample, video: Sample, label: str, target: float) -> None:
        one, samples = candidates.parse(label), [video if label == "svg" else causal]
        setting, reached = candidates.matched(one, samples, target)
        assert reached == candidates.mean_density(one, samples, setting)
        assert reached == pytest.approx(target, rel=0.25 if label == "svg" else 0.03)  # svg moves in blocks

    def test_a_floor_above_the_target_is_told(self, causal: Sample) -> None:
        setting, reached = candidates.matched(candidates.parse("anchorattention:step=2"), [causal], 0.1)
        assert setting == -30.0 and reached > 0.1

    def test_a_method_without_a_knob_has_no_match(self, causal: Sample) -> None:
        with pytest.raises(ValueError, match="full has no knob"):
            candidates.matched(candidates.parse("full"), [causal], 0.1)


class TestStudy:
    PLAN = study.Plan("data", candidates=("full", "xattention"), targets=(0.5,), repeats=1)

    def test_it_goes_on_where_it_stopped(self, causal: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        records = Records(tmp_path / "rows.jsonl")

        def stop(done: int, total: int, what: str) -> None:
            if done == 9:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            study.study([causal], records, self.PLAN, stop)
        assert len(records) == 1 + 9  # where they were made, and they
        seen: list[tuple[int, int]] = []
        more = study.study(
            [causal], Records(records.path), self.PLAN, lambda done, total, _: seen.append((done, total))
        )
        total = seen[-1][1]
        assert seen[-1] == (total, total) and more == total - 9
        monkeypatch.setattr(study, "dense", None)  # nothing left to compute
        assert study.study([causal], Records(records.path), self.PLAN, lambda *_: None) == 0

    def test_times_need_the_matched_settings(self, causal: Sample, tmp_path: Path) -> None:
        plan = study.Plan("data", studies=("times",), candidates=("xattention",), repeats=1)
        with pytest.raises(
            ValueError, match="no matched setting of xattention at density 0.1, wanted one; run the matched"
        ):
            study.study([causal], Records(tmp_path / "rows.jsonl"), plan, lambda *_: None)

    def test_other_data_is_other_rows(self, causal: Sample, video: Sample, tmp_path: Path) -> None:
        plan = study.Plan("data", studies=("pooling",))
        records = Records(tmp_path / "rows.jsonl")
        first = study.study([causal], records, plan, lambda *_: None)
        assert study.study([video], records, plan, lambda *_: None) == first > 0
        with pytest.raises(ValueError, match="both modes"):
            study.study([causal, video], records, plan, lambda *_: None)

    def test_rows_say_what_was_found(self, causal: Sample, tmp_path: Path) -> None:
        records = Records(tmp_path / "rows.jsonl")
        study.study([causal], records, self.PLAN, lambda *_: None)
        rows = list(records)
        (run,) = of(rows, "run")
        assert rows[0] is run
        assert run["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
        (oracle,) = of(rows, "oracle")
        single, block = (oracle["recall"][name] for name in ("1 key x 1 query", "128 keys x 128 queries"))
        assert all(a >= b - 0.01 for x, y in zip(single, block, strict=True) for a, b in zip(x, y, strict=True))
        best = oracle["recall"]["1 key x 64 queries"]
        for row in of(rows, "maximum") + [r for r in of(rows, "pooling") if r["key"]["R"] == 64]:
            for head, bound in zip(row["recall"], best, strict=True):
                assert all(x is None or x <= y + 1e-6 for x, y in zip(head, bound, strict=True))
        row = next(r for r in of(rows, "matched") if r["key"]["method"] == "xattention")
        assert row["knob"] == "threshold" and row["reached"] == pytest.approx(0.5, rel=0.03)
        timed = {row["key"]["method"]: row for row in of(rows, "times")}
        assert set(timed) == {study.DENSE, "full", "xattention"}
        assert timed["xattention"]["setting"] == row["setting"] and len(timed["xattention"]["seconds"]["select"]) == 1
        show.pareto(rows, tmp_path / "pareto.png")
        assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
        made = show.tables(rows, at=0.5)
        assert len(made) == 8 and all(len(line) == len(table.columns) for table in made for line in table.rows)


class TestCommand:
    def run(self, *arguments: str) -> int:
        return cli.main(["eval", "fidelity", *arguments])

    def test_synthetic_maps_then_the_saved_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, file = str(tmp_path / "out"), str(tmp_path / "maps.safetensors")
        few = ("--methods", "full", "xattention", "--targets", "0.6", "--out", out)
        assert self.run("--synthetic", "--frames", "2", "--save", file, *few) == 0
        told = capsys.readouterr().out
        assert "Oracle" in told and "At matched density" in told and "pareto.png" in told
        rows = [json.loads(line) for line in (tmp_path / "out" / "fidelity.jsonl").read_text().splitlines()]
        assert f"wrote {len(rows) - 1} rows" in told  # and one that says where
        assert self.run("--synthetic", "--frames", "2", *few) == 0
        assert "wrote 0 rows" in capsys.readouterr().out
        assert self.run("--qk", file, "--studies", "oracle", "--out", out) == 0
        assert "wrote 1 rows" in capsys.readouterr().out

    def test_maps_of_the_testbed_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--tokens", "160", "--layers", "1", "--studies", "sweep", "--methods", "xattention", "flexprefill"]
        assert self.run("--testbed", *arguments, "--out", str(tmp_path)) == 0
        rows: list[Any] = [json.loads(line) for line in (tmp_path / "fidelity.jsonl").read_text().splitlines()]
        sweep = [row for row in rows if row["key"]["study"] == "sweep"]
        assert {row["key"]["sample"] for row in sweep} == {"movie0-layer1"}
        assert all(len(row["recall"]) == 4 and max(row["recall"]) <= 1 + 1e-5 for row in sweep)
        assert "wrote" in capsys.readouterr().out

    def test_maps_of_a_checkpoint_are_those_of_the_testbed(self, tmp_path: Path) -> None:
        from vecattention.testbed.model import DATA

        arguments = ["--tokens", "160", "--layers", "2", "--studies", "oracle"]
        for name, data in (("shipped", ["--testbed"]), ("path", ["--model", str(DATA / "model")])):
            assert self.run(*data, *arguments, "--save", str(tmp_path / name), "--out", str(tmp_path / "out")) == 0
        assert fingerprint(load(tmp_path / "shipped")) == fingerprint(load(tmp_path / "path"))

    @pytest.mark.parametrize("arguments, message", [
        (["--qk", "nowhere.safetensors"], "path is 'nowhere.safetensors', wanted a safetensors file"),
        (["--model", "nowhere"], "path is 'nowhere', wanted a checkpoint directory"),
        (["--synthetic", "--frames", "1"], "frames is 1, wanted at least 2"),
        (["--synthetic", "--frames", "2", "--methods", "flash"], "name is 'flash', wanted one of"),
        (["--synthetic", "--frames", "2", "--methods", "svg"], "causal is True, wanted False"),
    ])  # fmt: skip
    def test_wrong_input_is_one_line_and_a_code(
        self, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(*arguments, "--out", str(tmp_path)) == cli.WRONG
        assert message in capsys.readouterr().err
