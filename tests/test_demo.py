"""The demonstration: what it measures, what it draws and writes, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image

import vecattention
from vecattention import cli
from vecattention.demo import ask, films, maps, mass, picture, results, run, settings, table, write
from vecattention.integrations.capture import Captured
from vecattention.recall import recall
from vecattention.testbed import load, movies, prepare, question_for

SMALL = ["--tokens", "256", "--timing-tokens", "0", "--depths", "0.4", "--films", "1"]
RULE: Mapping[str, Any] = settings.RULE


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    return load()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> run.Outcome:
    told: list[tuple[str, float]] = []
    asked = settings.Settings(
        out=tmp_path_factory.mktemp("demo"), tokens=512, timing_tokens=1024, depths=(0.2, 0.8), films=1, seed=1
    )
    found = run.run(asked, lambda what, done: told.append((what, done)))
    assert sum(done for _, done in told) == run.work(asked), "the progress bar ends at its end"
    assert any("film 2 of 2" in what for what, _ in told)
    return found


def test_both_methods_answer_every_question_of_every_film(outcome: run.Outcome) -> None:
    assert [(r.tokens, r.method, r.asked) for r in outcome.rows] == [
        (512, ask.FULL, 8), (512, ask.SPARSE, 8), (1024, ask.FULL, 3), (1024, ask.SPARSE, 3),
    ]  # fmt: skip
    full, sparse = outcome.rows[0], outcome.rows[1]
    assert full.right == 8 and full.density == 1.0 and full.recall == 1.0
    assert sparse.right >= 7 and 0.05 < sparse.density < 0.6 and 0.4 < sparse.recall < 1.0
    assert outcome.rows[3].density < sparse.density
    for row in outcome.rows:
        assert 0 < row.attention_seconds[1] < row.prefill_seconds[1] < 60
    assert not outcome.remarks, "no call that was to be sparse stayed dense"


def test_the_first_needle_asked_for_is_at_its_depth(outcome: run.Outcome) -> None:
    first = [r.question.depth for r in outcome.results if r.tokens == 512 and r.method == ask.FULL][::4]
    assert first == pytest.approx([0.2, 0.8], abs=0.02)
    parts = results.by_depth([r for r in outcome.results if r.tokens == 512], ask.FULL)
    assert sum(asked for _, asked in parts) == 8 and all(right == asked for right, asked in parts)


@torch.no_grad()
def test_full_attention_through_the_hook_is_the_stock_model(trained: tuple[Any, Any]) -> None:
    model, processor = trained
    movie = movies.make(seed=5, tokens=256)
    inputs = prepare(processor, movies.render(movie), movie.fps, question_for(movie.asked.shape))
    stock = model(**inputs).logits
    with vecattention.apply(model, **ask.methods(RULE)[0].arguments) as applied:
        hooked = model(**inputs).logits
    assert torch.equal(stock, hooked) and applied.stats.sparse_calls == 0
    assert 0 < applied.stats.seconds


def test_times_are_those_of_the_prefill_alone(trained: tuple[Any, Any]) -> None:
    model, processor = trained
    movie = movies.make(seed=5, tokens=256)
    inputs = prepare(processor, movies.render(movie), movie.fps, question_for(movie.asked.shape))
    begun = time.perf_counter()
    heard = ask.ask(model, processor, inputs, ask.methods(RULE)[0], 4)
    whole = time.perf_counter() - begun
    assert 0 < heard.attention_seconds < heard.prefill_seconds < whole
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("pool, block", [(64, None), (32, 128)])
def test_recall_over_spread_blocks_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, pool: int, block: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 700, 32, generator=generator) * 2
    key, value = (torch.randn(1, 2, 700, 32, generator=generator) for _ in range(2))
    rule = {**RULE, "q_pooling_size": pool, "q_block_size": block}
    whole = recall(query, key, mass.select(query, key, rule, None)).mean()
    monkeypatch.setattr(mass, "BLOCKS", 1000)
    got = mass.mean_recall([Captured(query, key, value, None)], (0, 700), rule)
    assert got == pytest.approx(float(whole), abs=1e-6)
    text = mass.mean_recall([Captured(query, key, value, None)], (0, 640), rule)
    part = recall(query[:, :, :640], key[:, :, :640], mass.select(query[:, :, :640], key[:, :, :640], rule, None))
    assert text == pytest.approx((float(part.mean()) * 640 + 60) / 700, abs=1e-6)


def planted(needle: int) -> Captured:
    """Two heads: the second looks at one key from everywhere, the first nowhere in particular."""
    query, key = torch.zeros(1, 2, 400, 16), torch.zeros(1, 2, 400, 16)
    query[0, 1, :, 0] = 8.0
    key[0, 1, needle, 0] = 8.0
    return Captured(query, key, torch.zeros(1, 2, 400, 16), 1.0)


def test_the_map_shows_the_head_that_looks_at_the_needle() -> None:
    layers = {3: planted(200)}
    film, needles = (8, 392), [(190, 194)]
    assert maps.choose(layers, film, needles, 192) == (3, 1) == maps.choose(layers, film, [], 192)
    drawn = maps.draw(layers, film, needles, 192, {**RULE, "max_scope": "row"})
    assert drawn.weight.shape == drawn.kept.shape == (6, 384) and drawn.tokens == 384
    assert drawn.weight[4, 192] > 0.99 and drawn.kept[4, 192] == 1.0
    assert drawn.kept[4, 191] == 0.0, "a neighbour of the needle is left out"
    assert drawn.keys == (160, 224) and drawn.part_weight.shape == drawn.part_kept.shape == (256, 64)
    assert drawn.part_kept[-1].nonzero().squeeze(1).tolist() == [32]
    weights = maps.probabilities(layers[3], 1, slice(300, 310))
    torch.testing.assert_close(weights.sum(1), torch.ones(10))
    assert not weights[0, 301:].any()


def test_it_writes_a_picture_a_film_and_a_record(outcome: run.Outcome) -> None:
    written = write.write(outcome)
    out = outcome.settings.out
    assert {path.name for path, _ in written} == {path.name for path in out.iterdir()}
    with Image.open(out / "demo.png") as image:
        assert image.size == (1950, 1470) and len(image.convert("RGB").getcolors(2**22) or ()) > 5000
    assert len(movies.read(out / "demo.mp4")[0]) == 1024
    head, *rest = [json.loads(line) for line in (out / "demo.jsonl").read_text().splitlines()]
    assert head["kind"] == "demo" and head["schema"] == 1
    assert head["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert head["settings"]["tokens"] == 512 and head["settings"]["rule"]["threshold"] == 0.9
    assert head["commit"] is None or len(head["commit"]["hash"]) == 40
    assert [line["kind"] for line in rest] == ["row"] * 4 + ["answer"] * 22
    answers = [line for line in rest if line["kind"] == "answer" and line["tokens"] == 512]
    assert sum(line["right"] for line in answers if line["method"] == ask.SPARSE) == rest[1]["right"]


def test_the_same_seed_gives_the_same_films_and_answers(outcome: run.Outcome) -> None:
    again = run.run(outcome.settings, lambda what, done: None)
    assert [(r.question, r.said) for r in again.results] == [(r.question, r.said) for r in outcome.results]
    # Matrix products may round differently from run to run, and a key at the cut-off may then fall either way.
    assert [r.density for r in again.results] == pytest.approx([r.density for r in outcome.results], rel=1e-2)


def test_times_that_were_not_taken_are_said_not_to_be() -> None:
    assert table._time(0.0, 0.0, True).strip() == table._time(0.0, 0.5, False).strip() == "not timed"
    assert table._time(0.5, 0.0, False).strip() == "0.500 s" and table._time(0.5, 1.0, False) == "0.500 s (2.0x)"


def test_the_command_prints_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *SMALL, "--out", str(tmp_path / "new" / "folder")]) == 0
    told = capsys.readouterr().out
    for words in ("vision tokens", "density", "recall", "attention", "whole prefill", "4 of 4", "100.0 %", "40-60 %"):
        assert words in told
    assert str(tmp_path / "new" / "folder" / "demo.png") in told


def test_a_film_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    movie = movies.make(seed=9, tokens=300)
    movies.write(movie, tmp_path / "mine.mp4")
    questions = [f"--question={question_for(needle.shape)}" for needle in movie.needles[:2]]
    words = ["demo", "--video", str(tmp_path / "mine.mp4"), *questions, "--tokens", "256", "--out", str(tmp_path / "o")]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "same answer" in told and "2 of 2" in told and movie.needles[0].colour in told
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["demo.jsonl", "demo.png"]
    head = json.loads((tmp_path / "o" / "demo.jsonl").read_text().splitlines()[0])
    assert head["settings"]["video"] == "mine.mp4", "of a path only the name is kept"


def test_a_film_is_sampled_at_two_frames_a_second(tmp_path: Path) -> None:
    frames = torch.arange(90, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3).contiguous()
    movies.write(frames, tmp_path / "fast.mp4", fps=15.0)
    film = films.take(tmp_path / "fast.mp4", ("?",))
    assert film.fps == pytest.approx(2.0) and len(film.frames) == 12
    levels = film.frames.float().mean((1, 2, 3))
    torch.testing.assert_close(levels, torch.arange(0, 90, 7.5).ceil(), atol=3.0, rtol=0)


def broken(folder: Path, kind: str) -> str:
    path = folder / "broken.mp4"
    if kind == "cut off":
        movies.write(movies.make(seed=0, tokens=64), path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"once upon a time\n" * 100}[kind])
    return str(path)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "wanted a video file; there is no such file"),
        ("empty", "is an empty file, wanted a video"),
        ("text", "cannot be decoded"),
        ("cut off", "cut off"),
    ],
)
def test_a_broken_video_is_one_line(
    tmp_path: Path, kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["--video", broken(tmp_path, kind), "--question", "which colour was the star ?"], message, tmp_path, capsys)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--video {film} --question what?is:it", "question has words that the tokenizer cannot spell: 'what?is:it'"),
        ("--question x", "--question came without --video, wanted both"),
        ("--video x", "--video came without --question, wanted both"),
        ("--model {folder}", "has no config.json, wanted a checkpoint directory"),
        ("--model {bare}", "has no weights (*.safetensors), wanted a trained model"),
        ("--model {folder}/none", "wanted a checkpoint directory; there is none"),
        ("--tokens 20", "--tokens 20 --timing-tokens 16384, wanted at least 32 for 4 needles"),
        ("--timing-tokens -1", "wanted at least 32 for 4 needles; --timing-tokens 0 leaves that film out"),
        ("--depths 0.1,2", "--depths is (0.1, 2.0), wanted parts of the film from 0 to 1"),
        ("--depths deep", "--depths is 'deep', wanted numbers from 0 to 1"),
        ("--films 0", "--films is 0, wanted at least 1"),
        ("--seed -1", "--seed is -1, wanted 0 to"),
        ("--dtype int8", "--dtype is 'int8', wanted one of float32"),
        ("--device tpu", "--device is 'tpu', wanted cpu or cuda"),
        ("--threshold 0", "threshold is 0.0, wanted a number in (0, 1]"),
        ("--q-pooling-size 48", "q_pooling_size is 48, wanted one of"),
        ("--out {film}", "wanted a folder; that is a file: name another, or remove it"),
        ("--out {film}/deeper", "is a file: name another"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    film, bare, folder = tmp_path / "film.mp4", tmp_path / "bare", tmp_path / "folder"
    movies.write(movies.make(seed=0, tokens=64), film)
    bare.mkdir()
    folder.mkdir()
    (bare / "config.json").write_text("{}")
    refused(words.format(film=film, bare=bare, folder=folder).split(), message, tmp_path, capsys)


def refused(words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command refuses with one line on stderr and exit code 2, and leaves the folder as it was."""
    before = sorted(folder.rglob("*"))
    out = [] if "--out" in words else ["--out", str(folder / "out")]
    assert cli.main(["demo", *words, *out]) == 2
    told = capsys.readouterr()
    assert message in told.err and not told.out
    assert told.err.strip().count("\n") == 0 and told.err.startswith("vecattention demo: ")
    assert sorted(folder.rglob("*")) == before


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    refused(["--device", "cuda"], "--device is 'cuda', wanted a device that torch sees", tmp_path, capsys)


def test_an_interrupt_ends_it_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    # What a shell runs in the background ignores interrupts, and so does all that it starts, these tests among it.
    heed = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from vecattention import cli; "
    )
    program = [sys.executable, "-c", f"{heed}sys.exit(cli.main(sys.argv[1:]))", "demo", "--out", str(out)]
    running = subprocess.Popen(
        program, env={**os.environ, "TMPDIR": str(scratch), "PYTHONFAULTHANDLER": "1"}, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    begun = time.monotonic()
    while not list(scratch.rglob("*.mp4")) and time.monotonic() - begun < 200:
        assert running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    try:
        told, errors = running.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGABRT)  # upon which it says where its threads are
        pytest.fail(f"100 s after the interrupt it still ran:\n{running.communicate()[1]}")
    assert running.returncode == 130
    assert errors.strip().splitlines()[-1] == "vecattention demo: interrupted" and "Traceback" not in errors
    assert not told and not out.exists() and not list(scratch.iterdir())


def test_a_picture_that_fails_leaves_nothing(outcome: run.Outcome, tmp_path: Path) -> None:
    drawn = outcome.shown.map
    lame = picture.Caption("$\\frac{$", (), ())
    with pytest.raises(ValueError, match="ParseException|Expected"):
        picture.save(outcome.shown.film, drawn, lame, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_only_the_wanted_colour_counts() -> None:
    assert films.is_right("Red.", "red", ("red", "blue"))
    assert not films.is_right("red or blue", "red", ("red", "blue"))
    assert not films.is_right("blue", "red", ("red", "blue")) and not films.is_right("", "red", ("red",))


def test_quartiles_and_rows() -> None:
    question = films.Question("?", "red", 1.0)
    many = [results.Result(1, 64, question, "m", "red", i < 3, i + 1.0, i + 2.0, 0.5) for i in range(5)]
    row = results.row(many, 0.75)
    assert (row.right, row.asked, row.accuracy, row.density, row.recall) == (3, 5, 0.6, 0.5, 0.75)
    assert row.attention_seconds == (2.0, 3.0, 4.0)
    assert results.by_depth(many, "m")[-1] == (3, 5) and results.by_depth(many, "n")[-1] == (0, 0)


def test_the_mp4_of_the_picture_is_a_real_video(outcome: run.Outcome, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(outcome.film or b"")
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264" and container.streams.video[0].frames == 1024
