"""`vecattention demo --generate`: the same video dense and sparse, with figures, side by side; tiny random weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vecattention import cli
from vecattention.demo import generation, sheet
from vecattention.demo.generation import Made, Settings
from vecattention.evals.video import psnr, ssim
from vecattention.testbed import movies
from vecattention.testbed.generate import Sizes, network

TINY = Sizes(size=64, frames=9, base=4, width=32, heads=2, layers=2, wide=32, text=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    network.save(network.build(TINY, 0).pipeline(), path)
    return path


def _settings(model: Path, out: Path, **more: object) -> Settings:
    plain = {"densities": (1.0, 0.3), "steps": 3, "size": (64, 64), "frames": 9, "model": model, "out": out}
    return Settings(**{**plain, "rule": {"q_pooling_size": 16}, **more})


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    return generation.run(_settings(model, tmp_path_factory.mktemp("out")), lambda what, done: None)


def test_the_dense_video_is_that_of_the_stock_pipeline_bit_for_bit(made: list[Made], model: Path) -> None:
    pipe = network.load(model)
    frames = pipe(
        generation.CAPTION, height=64, width=64, num_frames=9, num_inference_steps=3, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).frames[0]  # fmt: skip
    stock = (frames * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert made[0].name == "dense" and torch.equal(made[0].frames, stock)
    assert (made[0].density, made[0].psnr, round(made[0].ssim, 9)) == (1.0, 100.0, 1.0)


def test_densities_are_met_and_fewer_pairs_differ_more(made: list[Made]) -> None:
    _, full, sparse = made
    assert (full.name, sparse.name) == ("density 1", "density 0.3")
    assert full.density > 0.99 and full.psnr > 50
    assert 0.25 < sparse.density < 0.36 and sparse.psnr < full.psnr and sparse.ssim < full.ssim
    assert all(entry.seconds > entry.attention > 0 for entry in made)


def test_it_writes_film_picture_and_record(made: list[Made], model: Path, tmp_path: Path) -> None:
    settings = _settings(model, tmp_path / "new")
    written = sheet.write(settings, made)
    assert sorted(path.name for path, _ in written) == sorted(path.name for path in (tmp_path / "new").iterdir())
    film, fps = movies.read(tmp_path / "new" / "generate.mp4")
    assert film.shape == (9, 64, 3 * 64 + 2 * 4, 3) and fps == sheet.FPS
    with Image.open(tmp_path / "new" / "generate.png") as image:
        assert image.size == (7 * (128 + 4) - 4, sheet.LINE + 3 * (128 + sheet.LINE + 6))
    head, *videos = map(json.loads, (tmp_path / "new" / "generate.jsonl").read_text().splitlines())
    assert head["kind"] == "generation" and head["settings"]["model"] == "tiny" and "out" not in head["settings"]
    assert str(tmp_path) not in json.dumps(head)
    assert [video["name"] for video in videos] == ["dense", "density 1", "density 0.3"]
    assert videos[2]["psnr"] == made[2].psnr and videos[0]["shape"] == [9, 64, 64, 3]


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "--densities 0.4 --steps 2 --size 64x64 --frames 5 --dense-steps 1 --q-pooling-size 16"
    words = ["demo", "--generate", "--model", str(model), "--out", str(tmp_path / "out"), *asked.split()]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "a red circle moves left over stripes" in told and "density 0.4" in told and "PSNR" in told
    assert told.count("wrote ") == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"generate.mp4", "generate.png", "generate.jsonl"}


@pytest.mark.parametrize(("words", "message"), [
    ("--densities 0.5,1.5", "--densities is (0.5, 1.5), wanted shares over 0 up to 1"),
    ("--densities half", "--densities is 'half', wanted shares over 0 up to 1"),
    ("--threshold 0.5", "--threshold is 0.5 beside --generate, wanted --densities there"),
    ("--dense-steps few", "--dense-steps is 'few', wanted a number or a share"),
    ("--dense-steps 5 --steps 3 --size 64x64 --frames 5", "dense_steps is 5, wanted at most the 3 steps"),
    ("--steps 0", "--steps is 0, wanted at least 1"),
    ("--size 64", "--size is '64', wanted HEIGHTxWIDTH"),
    ("--dtype int8", "--dtype is 'int8', wanted one of"),
    ("--device tpu", "--device is 'tpu', wanted cpu or cuda"),
    ("--q-pooling-size 48", "q_pooling_size is 48, wanted one of"),
    ("--model {none}", "wanted the directory of a Wan pipeline, with model_index.json"),
])  # fmt: skip
def test_wrong_input_is_one_line(
    model: Path, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words.format(none=tmp_path).split()
    chosen = [] if "--model" in given else ["--model", str(model)]
    assert cli.main(["demo", "--generate", *chosen, *given, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.strip().count("\n") == 0 and not told.out
    assert not (tmp_path / "out").exists()


def test_without_trained_weights_it_says_how_to_get_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "SHIPPED", tmp_path / "lacking")
    assert cli.main(["demo", "--generate", "--out", str(tmp_path / "out")]) == 2
    assert "vecattention.testbed.generate.train" in capsys.readouterr().err


def test_psnr_and_ssim_against_their_formulas() -> None:
    torch.manual_seed(0)
    one = torch.randint(256, (3, 20, 24, 3), dtype=torch.uint8)
    other = (one.float() + 20 * torch.randn(one.shape)).clamp(0, 255).byte()
    errors = [((a.double() - b.double()) / 255).pow(2).mean() for a, b in zip(one, other, strict=True)]
    assert psnr(one, other) == pytest.approx(sum(float(-10 * e.log10()) for e in errors) / 3)
    x, y = one[:1].double() / 255, other[:1].double() / 255
    total, half = 0.0, 5
    for row in range(20):
        for column in range(24):
            rows, columns = slice(max(row - half, 0), row + half + 1), slice(max(column - half, 0), column + half + 1)
            a, b = x[0, rows, columns].flatten(0, 1), y[0, rows, columns].flatten(0, 1)
            ma, mb = a.sum(0) / 121, b.sum(0) / 121
            va, vb = (a * a).sum(0) / 121 - ma**2, (b * b).sum(0) / 121 - mb**2
            ab = (a * b).sum(0) / 121 - ma * mb
            like = (2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
            total += float(like.mean())
    assert ssim(one[:1], other[:1]) == pytest.approx(total / (20 * 24), abs=1e-9)


def test_videos_that_cannot_be_compared_are_refused_by_name() -> None:
    video = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match="one is torch.float32, wanted a uint8 tensor"):
        psnr(video.float(), video)
    with pytest.raises(ValueError, match=r"other has shape \(1, 16, 16, 3\), wanted \(2, 16, 16, 3\) like one"):
        ssim(video, video[:1])
    with pytest.raises(ValueError, match=r"one has shape \(16, 16, 3\), wanted \[T, H, W, 3\]"):
        psnr(video[0], video[0])


@pytest.mark.parametrize(("asked", "rule"), [
    ("", {"q_pooling_size": 16, "q_block_size": 16}),
    ("--q-pooling-size 64", {"q_pooling_size": 64, "q_block_size": 64}),
    ("--q-block-size 64 --max-scope window", {"q_pooling_size": 16, "q_block_size": 64, "max_scope": "window"}),
    ("--model somewhere", {}),
])  # fmt: skip
def test_the_rule_is_what_is_given_and_suits_the_generator(asked: str, rule: dict[str, object]) -> None:
    from vecattention.commands import demo, generation

    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert generation.settings_of(parser.parse_args(["--generate", *asked.split()])).rule == rule
