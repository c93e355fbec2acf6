"""The trained generator that ships: it loads by the public door, is small, and makes what captions say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import vecattention
from vecattention.testbed import generate
from vecattention.testbed.generate import compare, network, report, scenes


@pytest.fixture(scope="module")
def pipe() -> Any:
    return generate.load()


def test_the_weights_that_ship_are_small_half_and_recorded() -> None:
    from safetensors.torch import load_file

    weights = sorted(network.SHIPPED.rglob("*.safetensors"))
    assert [path.parent.name for path in weights] == ["text_encoder", "transformer", "vae"]
    assert sum(path.stat().st_size for path in weights) <= 6_000_000
    assert {x.dtype for path in weights for x in load_file(path).values()} == {torch.float16}
    record = json.loads((network.SHIPPED / "training.json").read_text())
    assert {"settings", "device", "seconds", "steps", "versions", "autoencoder_psnr", "generated"} <= set(record)
    assert record["generated"]["films"] >= 48 and record["autoencoder_psnr"] > 30


def test_plain_from_pretrained_loads_the_real_classes_at_the_default_sizes() -> None:
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    pipe = WanPipeline.from_pretrained(network.SHIPPED, dtype=torch.float32)
    assert type(pipe.vae) is AutoencoderKLWan and type(pipe.transformer) is WanTransformer3DModel
    fresh = network.build(generate.Sizes())
    for mine, theirs in ((fresh.vae, pipe.vae), (fresh.transformer, pipe.transformer)):
        assert {n: p.shape for n, p in mine.state_dict().items()} == {
            n: p.shape for n, p in theirs.state_dict().items()
        }


def test_films_come_through_the_autoencoder(pipe: Any) -> None:
    assert report.fidelity(pipe, generate.Sizes(), seed=71, count=4) > 30


def test_it_makes_what_captions_say(pipe: Any) -> None:
    captions = report.captions_of(12, seed=2026)
    films = torch.cat([generate.make(pipe, captions[i : i + 6], seed=50 + i) for i in (0, 6)])
    seen = report.judged(films, captions)
    assert seen["colour"] >= COLOUR and seen["direction"] >= DIRECTION and seen["shape"] >= SHAPE, seen


COLOUR, DIRECTION, SHAPE = 0.9, 0.9, 0.33
"""Over 96 captions 1.0, 1.0 and 0.6 were measured; less here, for the chance of 12."""


def test_the_caption_decides(pipe: Any) -> None:
    captions = ["a red circle moves left over grey", "a blue circle moves left over grey"]
    films = generate.make(pipe, captions, seed=3)
    assert [generate.look(film).colour for film in films] == ["red", "blue"]


def test_sparse_attention_keeps_what_the_film_shows(pipe: Any) -> None:
    captions = ["a green square moves right over dots", "a yellow circle moves up over stripes"]
    with vecattention.apply(pipe, density=0.5, q_pooling_size=16, dense_steps=0.25) as run:
        films = generate.make(pipe, captions, seed=4)
    assert 0.6 < run.stats.mean_density < 0.66
    shown = [scenes.Scene.parse(caption) for caption in captions]
    assert [generate.look(film).colour for film in films] == [scene.colour for scene in shown]
    assert [generate.look(film).direction for film in films] == [scene.direction for scene in shown]


def test_the_comparison_over_many_captions(pipe: Any) -> None:
    captions = report.captions_of(3, seed=8)
    dense, full, sparse = compare.compare(pipe, captions, [1.0, 0.2], steps=4, dense_steps=1, q_pooling_size=16)
    assert (dense.density, full.density, dense.psnr) == (1.0, 1.0, 100.0) and full.psnr > 45
    assert 0.35 < sparse.density < 0.45 and sparse.psnr < 40 and sparse.ssim < full.ssim
    assert set(dense.seen) == {"colour", "shape", "direction", "all"} and dense.seen == full.seen


def test_the_command_of_the_comparison() -> None:
    told = compare.main("--films 1 --steps 2 --densities 0.4 --dense-steps 0.5".split())
    assert len(told.splitlines()) == 4 and told.startswith("| pairs attended |") and "70." in told.splitlines()[-1]
