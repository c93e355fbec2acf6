"""Training: the same numbers as the real processor and model, and a run that can be cut and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vecattention.testbed import batches, curriculum, load, movies, network, prepare, question_for, score, train, words
from vecattention.testbed.run import Settings

GREY_LEVEL = 1 / 255 / 0.26


def test_patches_are_those_of_the_processor(trained: tuple[Any, Any]) -> None:
    frames = movies.render(movies.make(seed=2, tokens=64))
    wanted = prepare(trained[1], frames, 2.0, question_for("star"))["pixel_values_videos"]
    got = batches.patches(frames.permute(0, 3, 1, 2).float())
    assert got.shape == wanted.shape == (256, 1176)
    assert (got - wanted).abs().max() <= 2 * GREY_LEVEL, "the processor rounds once more, between rows and columns"
    assert (got - wanted).abs().mean() <= 0.2 * GREY_LEVEL


@torch.no_grad()
def test_the_bulk_network_is_the_real_one(trained: tuple[Any, Any]) -> None:
    model, _ = trained
    plan = batches.Plan(tokens=64, batch=1, asked=2)
    batch = batches.draw(plan, torch.Generator().manual_seed(0))
    grid = torch.tensor([[64, 2, 2]])
    torch.testing.assert_close(
        network.see(model.model.visual, batch.patches),
        model.model.visual(batch.patches, grid_thw=grid).pooler_output,
        atol=1e-4,
        rtol=1e-4,
    )
    pad = torch.full((1, 64), words.IDS["<|video_pad|>"])
    ids = torch.cat([batch.before[None], pad, batch.after], 1)
    kinds = (ids == words.IDS["<|video_pad|>"]).int() * 2
    real = model(
        input_ids=ids,
        pixel_values_videos=batch.patches,
        video_grid_thw=grid,
        mm_token_type_ids=kinds,
        second_per_grid_ts=torch.ones(1),
    )
    hidden, _ = network.think(model, batch)
    got = network.answer_logits(model, hidden, batch.answer_at)
    torch.testing.assert_close(got, real.logits[:, batch.answer_at], atol=1e-3, rtol=1e-3)
    assert torch.equal(got.argmax(-1), batch.answers)


def test_the_text_of_a_batch_is_what_the_template_says(trained: tuple[Any, Any]) -> None:
    tokenizer = trained[1].tokenizer
    batch = batches.draw(batches.Plan(tokens=64, batch=1), torch.Generator().manual_seed(1))
    shape = next(w for w in tokenizer.decode(batch.after[0]).split() if w in words.SHAPES)
    frames = torch.zeros(128, 56, 56, 3, dtype=torch.uint8)
    wanted = prepare(trained[1], frames, 2.0, question_for(shape))["input_ids"]
    got = torch.cat([batch.before, torch.full((64,), words.IDS["<|video_pad|>"]), batch.after[0]])
    assert got[: wanted.shape[1]].tolist() == wanted[0].tolist()
    assert int(batch.answer_at) == wanted.shape[1] - 1
    assert got[wanted.shape[1]] == batch.answers[0, 0]


def test_labels_say_what_each_token_shows() -> None:
    plan = batches.Plan(tokens=64, batch=3, needles=4)
    batch = batches.draw(plan, torch.Generator().manual_seed(2))
    shown = (batch.seen_shape >= 0) & (batch.seen_shape != batches.NONE)
    assert torch.equal(shown, (batch.seen_colour >= 0) & (batch.seen_colour != batches.NONE))
    assert shown.any(1).all() and (batch.seen_shape == batches.NONE).any(1).all()
    assert all(len(row[keep].unique()) == 4 for row, keep in zip(batch.seen_shape, shown, strict=True))


def test_a_resumed_run_ends_where_an_uncut_one_does(tmp_path: Path) -> None:
    settings = {"steps": 3, "budget": 128, "longest": 1, "seed": 4}
    whole = train.train(Settings(out=tmp_path / "whole", **settings))
    train.train(Settings(out=tmp_path / "cut", pause=1e-9, **settings))
    resumed = train.train(Settings(out=tmp_path / "cut", **settings), resume=True)
    assert resumed.standing.step == whole.standing.step == 3
    for name, weight in whole.named.items():
        assert torch.equal(weight, resumed.named[name]), name
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    load(tmp_path / "cut" / "model")


def test_the_command_trains_scores_and_records(tmp_path: Path) -> None:
    train.main(
        ["--out", str(tmp_path), "--steps", "2", "--device", "cpu", "--budget", "128", "--longest", "256"]
        + ["--questions", "2"]
    )
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 2 and record["rendered"][0]["asked"] >= 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_trained_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds is None and steps None, wanted one of the two"):
        train.train(Settings(out=tmp_path))
    with pytest.raises(FileNotFoundError, match="--resume finds no .*, wanted a run that was saved"):
        train.train(Settings(out=tmp_path, steps=1), resume=True)


def test_the_curriculum_opens_lengths_when_they_are_passed_or_time_is_short() -> None:
    standing = curriculum.Standing()
    for _ in range(9):
        standing = curriculum.advance(standing, 0, 1.0, 0.0, 8)
    assert standing.level == 0
    assert curriculum.advance(standing, 0, 1.0, 0.0, 8).level == 1
    assert curriculum.advance(curriculum.Standing(), 0, 0.1, 0.5, 8).level == 8
    assert curriculum.advance(curriculum.Standing(level=8), 8, 1.0, 1.0, 8).level == 8
    rates = [curriculum.learn_rate(p, 1000, 1e-3) for p in (0.1, 0.5, 0.75, 1.0)]
    assert rates[0] == rates[1] == pytest.approx(1e-3) and rates[1] > rates[2] > rates[3] == pytest.approx(2e-5)


def test_a_score_counts_by_depth() -> None:
    result = score.tally(64, [0.0, 0.19, 0.5, 1.0], [True, False, True, True])
    assert result.accuracy == 0.75 and result.asked_by_depth == (2, 0, 1, 0, 1)
    assert result.record()["accuracy_by_depth"] == [0.5, None, 1.0, None, 1.0]
