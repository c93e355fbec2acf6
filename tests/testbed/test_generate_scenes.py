"""Captioned films: what is drawn is what the caption says, and the judge reads it back from the pixels."""

from __future__ import annotations

import pytest
import torch

from vecattention.testbed.generate import Scene, judge, scenes


def _films(count: int, seed: int = 0, frames: int = 9, size: int = 64) -> tuple[torch.Tensor, list[Scene]]:
    films = scenes.draw(count, torch.Generator().manual_seed(seed))
    return scenes.pixels(scenes.paint(films, frames, size)), films.scenes()


def test_the_judge_reads_every_film_right() -> None:
    films, shown = _films(96)
    assert judge.score(films, shown) == {"colour": 1.0, "shape": 1.0, "direction": 1.0, "all": 1.0}
    for words in (scenes.COLOURS, scenes.SHAPES, scenes.DIRECTIONS, scenes.GROUNDS):
        assert set(words) <= {word for scene in shown for word in scene.caption.split()}


def test_the_judge_tells_films_that_show_something_else() -> None:
    films, shown = _films(96)
    other = [Scene(c, s, d, "grey") for c in ("red",) for s in ("star",) for d in ("left",)] * len(shown)
    wrong = judge.score(films, other)
    assert wrong["colour"] < 0.4 and wrong["shape"] < 0.5 and wrong["direction"] < 0.5 and wrong["all"] < 0.1
    back = judge.score(films.flip(1), shown)  # played backwards, everything moves the other way
    assert back["colour"] == back["shape"] == 1.0 and back["direction"] == 0.0


def test_the_judge_sees_nothing_where_nothing_is() -> None:
    films, _ = _films(4)
    nothing = judge.Seen(None, None, None)
    assert judge.look(torch.full_like(films[0], 128)) == nothing
    assert judge.look(films[0].float().mean(-1, keepdim=True).expand(-1, -1, -1, 3).byte()) == nothing
    still = films[0][:1].expand(9, -1, -1, -1)
    assert judge.look(still).direction is None and judge.look(still).colour is not None


def test_the_judge_forgives_noise_and_blur() -> None:
    films, shown = _films(48, size=96)
    noisy = films.float() + 12 * torch.randn(films.shape, generator=torch.Generator().manual_seed(1))
    soft = torch.nn.functional.avg_pool2d(noisy.permute(0, 1, 4, 2, 3).flatten(0, 1), 3, 1, 1)
    soft = soft.unflatten(0, films.shape[:2]).permute(0, 1, 3, 4, 2).round().clamp(0, 255).byte()
    assert judge.score(soft, shown)["all"] > 0.9


def test_no_films_are_an_error() -> None:
    with pytest.raises(ValueError, match="films has none"):
        judge.score([], [])


def test_a_seed_decides_everything() -> None:
    first, shown = _films(6, seed=3)
    again, _ = _films(6, seed=3)
    other, _ = _films(6, seed=4)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({scene.caption for scene in shown}) > 1


def test_a_part_of_the_frames_is_that_part() -> None:
    films = scenes.draw(3, torch.Generator().manual_seed(0))
    whole = scenes.paint(films, 9, 32)
    assert torch.equal(scenes.paint(films, 9, 32, 4, 9), whole[:, :, 4:9])
    assert whole.shape == (3, 3, 9, 32, 32) and -1 <= whole.min() and whole.max() <= 1
    assert scenes.paint(films, 1, 32).shape == (3, 3, 1, 32, 32)


def test_grounds_are_grey_and_differ() -> None:
    films, shown = _films(60)
    corner = films[:, 0].float()
    chroma = (corner.amax(-1) - corner.amin(-1)).flatten(1)
    assert (chroma.quantile(0.5, dim=1) == 0).all()
    spread = {ground: [] for ground in scenes.GROUNDS}
    for image, scene in zip(corner, shown, strict=True):
        spread[scene.ground].append(float(image[image.amax(-1) == image.amin(-1)].std()))
    assert max(spread["grey"]) < 1 and min(min(values) for name, values in spread.items() if name != "grey") > 8


def test_captions_are_read_back() -> None:
    _, shown = _films(40)
    assert [Scene.parse(scene.caption) for scene in shown] == shown


@pytest.mark.parametrize("caption", [
    "", "a red circle", "a red circle moves left over water", "red circle moves left over dots",
    "a red  circle moves left over dots", "a pink circle moves left over dots",
])  # fmt: skip
def test_other_captions_are_refused_with_the_words_that_are_known(caption: str) -> None:
    with pytest.raises(ValueError, match="wanted 'a COLOUR SHAPE moves DIRECTION over GROUND' with red, yellow"):
        Scene.parse(caption)
